"""generate(): LLaDA's own signature, so that a script changes one import."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from dllm_engine import checks, inputs
from dllm_engine.engine import Engine
from dllm_engine.model import LLaDA
from dllm_engine.options import Options
from dllm_engine.policies import Random, TopK
from dllm_engine.uncompiled import uncompiled

_LLADA_MASK_ID = 126336  # the default of LLaDA's generate(): here it means the model's own mask id
_REMASKING = {"low_confidence": TopK, "random": Random}


@uncompiled
@torch.inference_mode()
def generate(
    model: LLaDA | nn.Module,
    prompt: Tensor,
    attention_mask: Tensor | None = None,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int = _LLADA_MASK_ID,
    logits_eos_inf: bool = False,
    confidence_eos_eot_inf: bool = False,
) -> Tensor:
    """LLaDA's ``generate`` (arXiv 2502.09992): the static schedule, no cache, every position decoded.

    In float32 at temperature 0 with ``low_confidence`` and unpadded prompts the tokens equal the original's; otherwise
    they have the same distribution. The mask id is never written. A seed for sampling is drawn from torch's global
    generator, so ``torch.manual_seed`` makes a run repeatable.

    Args:
        model: a `LLaDA`, or a loaded transformers ``LLaDAModelLM``.
        prompt: LongTensor [B, P], left-padded where ``attention_mask`` is 0.
        steps: total steps; the number of blocks must divide it.
        remasking: ``"low_confidence"`` or ``"random"``.
        mask_id: the default means the model's own; any other value must equal it.
        logits_eos_inf: the end id is never chosen and leaves the normaliser.
        confidence_eos_eot_inf: all end ids get confidence 0 and leave the normaliser; they can still be chosen last.

    Returns:
        LongTensor [B, P + gen_length].

    Raises:
        TypeError, ValueError: a bad argument, before the first forward pass.
    """
    engine = Engine.kept(model)
    model = engine.model
    if not isinstance(remasking, str) or remasking not in _REMASKING:
        raise ValueError(f"remasking: {remasking!r} given; known: {', '.join(_REMASKING)}")
    if mask_id not in (_LLADA_MASK_ID, model.mask_id):
        raise ValueError(f"mask_id: {mask_id} given; this model's mask id is {model.mask_id}")
    ids, padding = inputs.check_prompt(model, prompt, attention_mask)
    longest = ids.shape[1] - int(padding.min())  # host: input checks, once per call
    options = Options.resolve(
        model,
        longest_prompt=longest,
        gen_length=gen_length,
        block_length=block_length,
        steps=steps,
        policy=_REMASKING[remasking](),
        cache="none",
        end_of_text="off",
        backend="auto",
        temperature=temperature,
        cfg_scale=cfg_scale,
    )
    never = (model.fill_id,) if logits_eos_inf else ()
    options = replace(options, extra_banned=never, excluded_ids=model.end_ids if confidence_eos_eot_inf else never)
    return engine.run(ids, padding, options, checks.check_seeds(None, len(ids))).sequences

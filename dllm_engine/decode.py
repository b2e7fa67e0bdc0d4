"""decode(): a batch of prompts, all options, on an engine that the model keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dllm_engine.engine import Engine
from dllm_engine.model import LLaDA
from dllm_engine.outputs import DecodeOutput
from dllm_engine.policies import Policy
from dllm_engine.refresh import Cache
from dllm_engine.uncompiled import uncompiled

__all__ = ["DecodeOutput", "decode"]


@uncompiled
@torch.inference_mode()
def decode(
    model: LLaDA | nn.Module,
    input_ids: Tensor | Sequence[Sequence[int]],
    *,
    attention_mask: Tensor | None = None,
    gen_length: int | None = None,
    block_length: int | None = None,
    steps: int | None = None,
    policy: Policy | str | None = None,
    cache: str | Cache | None = None,
    temperature: float | None = None,
    cfg_scale: float | None = None,
    end_of_text: str | None = None,
    seed: int | Sequence[int] | None = None,
    backend: str = "auto",
    streamer: Any = None,
) -> DecodeOutput:
    """Decode prompts block by block; a batch gives each sequence the tokens that it gets alone.

    The model keeps an `Engine` for the next call, grown when needed; calls from several threads queue. What is left out
    (None) is read from ``generation_config.json`` beside the model's weights (see docs/transformers.md), else it is the
    default in brackets.

    Args:
        model: a `LLaDA`, or a loaded transformers module of those that `LLaDA.from_transformers` names (its tensors are
            shared).
        input_ids: LongTensor [B, P], left-padded where ``attention_mask`` [B, P] is 0; or a list of lists of ints,
            of tensors [P] or of numpy's arrays.
        gen_length: tokens to generate, a multiple of ``block_length`` (128).
        block_length: tokens of a block (32). Of a block-causal model (LLaDA2, SDAR) it is the attention's, counted from
            a sequence's first token (`LLaDAConfig.block_size`); of Fast-dLLM v2 that of the parts in which the model's
            blocks are decoded (8).
        steps: total steps of LLaDA's static schedule; without it one position a step is guaranteed.
        policy: a name of `policies.names`, alone or with a value as on the command line (``"threshold=0.95"``,
            ``"topk=4"``), a policy object, or ``"auto"`` (see `policies.resolve`; ``"auto"``).
        cache: ``"none"``, ``"prefix"`` or ``"dual"`` (Fast-dLLM, arXiv 2505.22618), refreshed when a block begins;
            ``"dual/8"`` refreshes every 8 calls, ``"dual/never"`` never; or a `refresh.Cache` (``"dual"``). Of a
            block-causal model it is exact, ``"prefix"`` the same, and never refreshed.
        temperature: 0 takes the best token; above, tokens are drawn from softmax(logits / temperature) (0).
        cfg_scale: classifier-free guidance; 0 is off (0).
        end_of_text: ``"committed"`` stops a sequence after an end id that it committed; ``"predicted"`` also cuts off,
            at the first call of a block, what is predicted to be end ids to the last (see `end_of_text`); ``"off"``
            decodes every position; ``"auto"`` is ``"committed"`` (``"auto"``).
        seed: int (sequence i gets seed + i) or one a sequence; None draws one, told in ``settings``.
        backend: ``"auto"`` or a name that ``dllm-engine info`` lists.
        streamer: a callable, called once a committed block with the sequence's index and a LongTensor of its tokens;
            or, for a batch of one, an object with ``put``, ``put_draft`` and ``end``, such as transformers'
            ``TextDiffusionStreamer``.

    Raises:
        TypeError, ValueError: a bad argument, before the first forward pass.
        MemoryError: the KV cache does not fit, before the first forward pass.
        RuntimeError: the model gave NaN, naming sequence and position.
    """
    return Engine.kept(model).decode(
        input_ids,
        attention_mask=attention_mask,
        gen_length=gen_length,
        block_length=block_length,
        steps=steps,
        policy=policy,
        cache=cache,
        temperature=temperature,
        cfg_scale=cfg_scale,
        end_of_text=end_of_text,
        seed=seed,
        backend=backend,
        streamer=streamer,
    )

"""decode(): the loop. Model call, statistics, rule, commit; then one small read tells the host where each one is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dllm_engine import backends, inputs, ops, policies
from dllm_engine.end_of_text import predict_end_
from dllm_engine.forward import Forward
from dllm_engine.model import LLaDA
from dllm_engine.policies import Policy
from dllm_engine.reference import commit_
from dllm_engine.state import DecodeState
from dllm_engine.streaming import SequenceStream


@dataclass(frozen=True)
class DecodeOutput:
    """What `decode` returns.

    Attributes:
        sequences: LongTensor [B, P + gen_length]; positions after the end of the text hold the end token.
        forward_passes: model calls made; a refresh, or guidance's doubled batch, is one.
        sequence_passes: LongTensor [B], calls that a sequence took part in.
        generated_tokens: LongTensor [B], tokens before the first end id.
        settings: what was resolved: policy, cache, end_of_text, backend, seed.
    """

    sequences: Tensor
    forward_passes: int
    sequence_passes: Tensor
    generated_tokens: Tensor
    settings: dict[str, Any]

    @property
    def tokens_per_forward(self) -> Tensor:
        """FloatTensor [B]: generated_tokens / sequence_passes."""
        return self.generated_tokens / self.sequence_passes


@torch.inference_mode()
def decode(
    model: LLaDA | nn.Module,
    input_ids: Tensor | Sequence[Sequence[int]],
    *,
    attention_mask: Tensor | None = None,
    gen_length: int = 128,
    block_length: int = 32,
    steps: int | None = None,
    policy: Policy | str = "auto",
    cache: str = "dual",
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    end_of_text: str = "auto",
    seed: int | Sequence[int] | None = None,
    backend: str = "auto",
    streamer: Any = None,
) -> DecodeOutput:
    """Decode prompts block by block; a batch gives each sequence the tokens that it gets alone.

    Args:
        model: a `LLaDA`, or a loaded transformers ``LLaDAModelLM`` (its tensors are shared).
        input_ids: LongTensor [B, P], left-padded where ``attention_mask`` [B, P] is 0; or a list of lists of ints.
        gen_length: tokens to generate, a multiple of ``block_length``.
        steps: total steps of LLaDA's static schedule; without it one position a step is guaranteed.
        policy: a name of `policies.names`, a policy object, or ``"auto"`` (see `policies.resolve`).
        cache: ``"none"``, ``"prefix"`` or ``"dual"`` (Fast-dLLM, arXiv 2505.22618).
        temperature: 0 takes the best token; above, tokens are drawn from softmax(logits / temperature).
        cfg_scale: classifier-free guidance; 0 is off.
        end_of_text: ``"committed"`` stops a sequence after an end id that it committed; ``"predicted"`` also cuts off,
            at the first call of a block, what is predicted to be end ids to the last (see `end_of_text`); ``"off"``
            decodes every position; ``"auto"`` is ``"committed"``.
        seed: int (sequence i gets seed + i) or one a sequence; None draws one, told in ``settings``.
        backend: ``"auto"`` or a name that ``dllm-engine info`` lists.
        streamer: object with ``put``, ``put_draft`` and ``end``, such as transformers' ``TextDiffusionStreamer``; for
            a batch of one.

    Raises:
        TypeError, ValueError: a bad argument, before the first forward pass.
        RuntimeError: the model gave NaN, naming sequence and position.
    """
    if not isinstance(model, LLaDA):
        model = LLaDA.from_transformers(model)
    inputs.check_options(cache=cache, end_of_text=end_of_text, temperature=temperature, cfg_scale=cfg_scale)
    prompt, padding = inputs.check_prompt(model, input_ids, attention_mask)
    longest_prompt = prompt.shape[1] - int(padding.min())  # host: input checks, once per decode
    inputs.check_lengths(model, longest_prompt, gen_length=gen_length, block_length=block_length, steps=steps)
    seeds = inputs.check_seeds(seed, len(prompt))
    policy = policies.resolve(policy, model, block_length=block_length, cache=cache)
    end_of_text = "committed" if end_of_text == "auto" else end_of_text
    backend = resolve_backend(backend, model, cfg_scale)
    settings = {"policy": policy, "cache": cache, "end_of_text": end_of_text, "backend": backend, "seed": seeds}
    return run(
        model,
        DecodeState(
            prompt,
            padding,
            gen_length=gen_length,
            block_length=block_length,
            steps=steps if steps is not None else policy.default_steps(gen_length),
            seeds=seeds,
            mask_id=model.mask_id,
            fill_id=model.fill_id,
        ),
        policy,
        settings,
        temperature=temperature,
        cfg_scale=cfg_scale,
        streamer=streamer,
    )


def resolve_backend(backend: str, model: LLaDA, cfg_scale: float) -> str:
    """The backend that will take the model's hidden states (float32 with guidance) and LM head."""
    dtype = torch.float32 if cfg_scale else model.dtype
    return backends.resolve(
        backend, torch.empty(1, model.lm_head.shape[1], dtype=dtype, device=model.device), model.lm_head
    )


def run(
    model: LLaDA,
    state: DecodeState,
    policy: Policy,
    settings: dict[str, Any],
    *,
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    extra_banned: tuple[int, ...] = (),
    excluded_ids: tuple[int, ...] = (),
    streamer: Any = None,
) -> DecodeOutput:
    """The loop behind `decode` and `generate`, on checked arguments."""
    device = model.device
    forward = Forward(model, state, cache=settings["cache"], cfg_scale=cfg_scale)
    stream = SequenceStream(streamer, state)
    banned = (model.mask_id, *range(model.vocab_size, len(model.lm_head)), *extra_banned)
    scoring: dict[str, Any] = {
        "banned_ids": ops.id_tensor(banned, device),
        "excluded_ids": ops.id_tensor(excluded_ids, device),
        "temperature": temperature,
        "backend": settings["backend"],
    }
    end_ids = torch.tensor(model.end_ids, device=device)
    stopping_ids = end_ids if settings["end_of_text"] != "off" else None
    predicts = settings["end_of_text"] == "predicted"
    scoring_ahead = scoring | {"temperature": 0.0}
    policy.begin(state)
    fused = policies.as_rule(policy, state.block_length, device)
    passes, sequence_passes = 0, [0] * state.batch
    where = state.progress.tolist()  # host: where every sequence starts

    while unfinished := [b for b, (*_, left) in enumerate(where) if left > 0]:
        beginning = [b for b in unfinished if where[b][2] == 0]
        refresh = settings["cache"] != "none" and bool(beginning)
        joining = beginning if refresh else unfinished
        starts, ends = [where[b][0] for b in joining], [where[b][1] for b in joining]
        width = min(state.block_length, max(end - start for start, end in zip(starts, ends, strict=True)))

        block_ends = {b: where[b][0] + state.block_length for b in beginning}
        ahead = [b for b, block_end in block_ends.items() if predicts and where[b][1] > block_end]

        sequences = torch.tensor(joining, device=device)
        rows = max(ends) - min(starts) if ahead else width
        hidden = forward(
            sequences, refresh=refresh, width=rows, first=min(starts), shortest=min(ends), longest=max(ends)
        )
        hidden, beyond = hidden[:, :width], hidden[:, state.block_length :]
        if fused is not None:
            ops.decode_step_(hidden, model.lm_head, state, sequences, fused, end_ids=stopping_ids, **scoring)
        else:
            block = state.block(sequences, width)
            stats = ops.block_stats(hidden, model.lm_head, block, reads_decided=policy.reads_decided, **scoring)
            decisions = [f(stats, block) for f in (policy.score, policy.select, policy.tokens)]
            commit_(state, block, stats, *decisions, end_ids=stopping_ids)

        if ahead:
            chosen = torch.tensor([joining.index(b) for b in ahead], device=device)
            first = torch.tensor([block_ends[b] for b in ahead], device=device)
            predict_end_(state, sequences[chosen], first, beyond[chosen], model.lm_head, end_ids, scoring_ahead)

        passes += 1
        for b in joining:
            sequence_passes[b] += 1
        where = state.progress.tolist()  # host: the one read between steps; decides who joins the next call
        for b in joining:
            if where[b][3] < state.length:
                raise RuntimeError(
                    f"no valid token for sequence {b} at position {where[b][3]}:"
                    " the model gave NaN or infinite logits, or every id is banned"
                )
        stream.step(where[0])

    stream.end()
    generated = state.tokens[:, state.prompt_length :]
    is_end = torch.isin(generated, end_ids)
    return DecodeOutput(
        sequences=state.tokens,
        forward_passes=passes,
        sequence_passes=torch.tensor(sequence_passes, device=device),
        generated_tokens=(is_end.cumsum(1) == 0).sum(1),
        settings=settings,
    )

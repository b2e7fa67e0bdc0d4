"""log p(target | context) of a masked diffusion model: LLaDA's Monte-Carlo estimate (arXiv 2502.09992).

Draw how many of the L target tokens are masked, l uniform in 1..L, then which; the loss is the cross-entropy summed
over them times L / l. Its expectation is a bound: log p is at least minus that. As published, the sizes of one target's
samples are stratified. Two things cost less and change no expectation: a mask drawn twice is computed once, and where
there are no more masks (2^L − 1) than samples, all are computed, each with its probability, and none is drawn.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dllm_engine import checks, inputs, ops
from dllm_engine.decode import decode
from dllm_engine.forward import additive, guided
from dllm_engine.model import LLaDA


class Estimate(NamedTuple):
    """value: nats. passes: times that the sequence went through the model."""

    value: float
    passes: int


class _Row(NamedTuple):
    request: int
    masked: list[int]
    weight: float


def log_likelihood(
    model: LLaDA,
    contexts: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    *,
    samples: int = 128,
    seed: int = 0,
    batch_size: int = 8,
    cfg_scale: float = 0.0,
    backend: str = "auto",
) -> Iterator[Estimate]:
    """Estimates of log p(target | context), in the order of the requests; logits of masked rows only, never in memory.

    A request's masks depend on the seed and on its ids alone, not on the others, their order or the batch.

    Args:
        contexts, targets: lists of token ids; a context may be empty.
        samples: masks drawn a target.
        batch_size: masked sequences a model call; those of several requests share one.
        cfg_scale: classifier-free guidance, as in `decode`.
        backend: as for `ops.row_stats`.

    Raises:
        TypeError, ValueError: not a context for each target, an empty target, ids or a length that the model has not,
            or a number out of range.
    """
    checks.check_counts(samples=samples, batch_size=batch_size)
    checks.check_options(cfg_scale=cfg_scale)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed: {seed!r} given; an int is needed")
    checks.check_seeds(seed, 1)
    if model.config.block_size:
        raise ValueError("model: a block-causal one given; the estimate is of models whose rows see all columns")
    _check_requests(model, contexts, targets)
    return _estimates(model, contexts, targets, samples, seed, batch_size, float(cfg_scale), backend)


def _check_requests(model: LLaDA, contexts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> None:
    if len(contexts) != len(targets):
        raise ValueError(f"targets: {len(targets)} given for {len(contexts)} contexts; one for each is needed")
    limit = model.config.max_sequence_length
    for i, (context, target) in enumerate(zip(contexts, targets, strict=True)):
        for name, ids in (("contexts", context), ("targets", target)):
            if not isinstance(ids, list | tuple):
                raise TypeError(f"{name}: request {i} has a {type(ids).__name__}; a list of ids is needed")
        if not target or len(context) + len(target) > limit:
            raise ValueError(
                f"targets: {len(context)} + {len(target)} tokens given in request {i};"
                f" a target of at least 1, {limit} together are allowed"
            )
        if stray := [token for token in (*context, *target) if not isinstance(token, int)]:
            raise TypeError(f"targets: request {i} holds {stray[0]!r}; ids are ints")
        inputs.check_ids(model, (*context, *target), f"targets: request {i}")


@torch.inference_mode()
def _estimates(
    model: LLaDA,
    contexts: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    samples: int,
    seed: int,
    batch_size: int,
    cfg_scale: float,
    backend: str,
) -> Iterator[Estimate]:
    batch: list[_Row] = []
    sums, passes, told = [0.0] * len(targets), [0] * len(targets), 0

    def run() -> None:
        with torch.autocast(model.device.type, enabled=False):  # the model's own type, as when decoding
            losses = _losses(model, contexts, targets, batch, cfg_scale, backend)
        for row, loss in zip(batch, losses, strict=True):
            sums[row.request] -= row.weight * loss
        batch.clear()

    for i, (context, target) in enumerate(zip(contexts, targets, strict=True)):
        for masked, weight in masks(len(target), samples, _generator(seed, context, target)):
            batch.append(_Row(i, masked, weight))
            passes[i] += 1
            if len(batch) == batch_size:
                run()
                yield from (Estimate(sums[j], passes[j]) for j in range(told, i))
                told = i
    if batch:
        run()
    yield from (Estimate(sums[j], passes[j]) for j in range(told, len(targets)))


def masks(length: int, samples: int, generator: torch.Generator) -> list[tuple[list[int], float]]:
    """Positions of a target of ``length`` to mask, and the weight of their summed cross-entropy in the estimate."""
    if length < 60 and 2**length - 1 <= samples:
        every = [[i for i in range(length) if bits >> i & 1] for bits in range(1, 2**length)]
        # a size has probability 1 / length, a mask of it 1 / C(length, size); the loss is times length / size
        return [(mask, 1 / (math.comb(length, len(mask)) * len(mask))) for mask in every]
    first = int(torch.randint(length, (), generator=generator, device="cpu"))
    sizes = [(first + j * length // samples) % length + 1 for j in range(samples)]
    orders = (torch.randperm(length, generator=generator, device="cpu").tolist() for _ in sizes)
    drawn = (tuple(sorted(order[:size])) for order, size in zip(orders, sizes, strict=True))
    weights: dict[tuple[int, ...], float] = {}
    for mask in drawn:
        weights[mask] = weights.get(mask, 0.0) + length / len(mask) / samples
    return [(list(mask), weight) for mask, weight in weights.items()]


def _generator(seed: int, context: Sequence[int], target: Sequence[int]) -> torch.Generator:
    digest = hashlib.sha256(repr((seed, list(context), list(target))).encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _losses(
    model: LLaDA,
    contexts: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    batch: list[_Row],
    cfg_scale: float,
    backend: str,
) -> list[float]:
    """Summed cross-entropy of each row's masked tokens, from one model call."""
    device = model.device
    whole = [[*contexts[row.request], *targets[row.request]] for row in batch]
    starts = [len(contexts[row.request]) for row in batch]
    length = max(map(len, whole))
    tokens = torch.tensor([ids + [model.fill_id] * (length - len(ids)) for ids in whole], device=device)
    rows = [(b, starts[b] + i) for b, row in enumerate(batch) for i in row.masked]
    b, at = torch.tensor(rows, device=device).unbind(1)
    wanted = tokens[b, at]
    tokens[b, at] = model.mask_id
    columns = torch.arange(length, device=device)
    padding = columns >= torch.tensor([len(ids) for ids in whole], device=device)[:, None]
    if cfg_scale > 0:  # as when decoding: the same with every context token masked
        prompt = columns < torch.tensor(starts, device=device)[:, None]
        tokens = torch.cat((tokens, tokens.masked_fill(prompt, model.mask_id)))
        padding = padding.repeat(2, 1)
    seen = additive(padding[:, None], model.dtype) if min(map(len, whole)) < length else None
    hidden: Tensor = model.hidden_states(tokens, model.rope_tables(columns[None]), seen, joined=model.joined_weights())
    if cfg_scale > 0:
        hidden = guided(hidden.chunk(2), cfg_scale)
    predicting = (at - 1).clamp_min(0) if model.config.shifted else at
    stats = ops.row_stats(
        hidden.flatten(0, 1),
        model.lm_head,
        b * length + predicting,
        probe_ids=wanted[:, None],
        backend=backend,
        values_known=True,
    )
    loss = (stats.logsumexp - stats.probe_logits[:, 0]).double()
    return torch.zeros(len(batch), dtype=torch.float64, device=device).index_add(0, b, loss).tolist()  # host: results


def greedy_matches(
    model: LLaDA,
    contexts: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    *,
    batch_size: int = 8,
    cfg_scale: float = 0.0,
    backend: str = "auto",
) -> list[bool]:
    """Whether decoding as many tokens as the target has, the most confident one a step, gives the target.

    The check of LLaDA's own evaluation: one block, no cache, no end of text. Contexts may not be empty.

    Raises:
        TypeError, ValueError: as `log_likelihood`, or what `decode` refuses.
    """
    checks.check_counts(batch_size=batch_size)
    _check_requests(model, contexts, targets)
    found = [False] * len(targets)
    order = sorted(range(len(targets)), key=lambda i: (len(targets[i]), len(contexts[i])))
    while order:
        length = len(targets[order[0]])
        part = [i for i in order[:batch_size] if len(targets[i]) == length]
        del order[: len(part)]
        out = decode(
            model,
            [contexts[i] for i in part],
            gen_length=length,
            block_length=length,
            steps=length,
            policy="topk",
            cache="none",
            temperature=0.0,
            cfg_scale=cfg_scale,
            end_of_text="off",
            backend=backend,
        )
        for i, ids in zip(part, out.sequences[:, -length:].tolist(), strict=True):
            found[i] = ids == list(targets[i])
    return found

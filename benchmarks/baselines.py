"""LLaDA's and Fast-dLLM's decoding loops on `dllm_engine.LLaDA`, for the benchmarks to be measured against.

Written from what the originals are known to do in every step: logits of all rows of the call, their softmax over the
whole vocabulary in float64, ``x == mask_id`` as the only state, a wait for the device wherever they ask it something.
Left out, in their favour, is what their *models* lose: Fast-dLLM's rotates every cached key again in every layer of
every call, and waits for the device five times a layer. `tests/test_baselines.py` holds both loops to the originals'
tokens and calls.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm_engine import LLaDA

CACHES = ("none", "prefix", "dual")


class Decoded(NamedTuple):
    """sequences: LongTensor [B, P + gen_length]. passes: model calls made."""

    sequences: Tensor
    passes: int


class Past:
    """Keys and values of one layer as Fast-dLLM keeps them; a model's layers `write` to it like to a cache of ours."""

    def __init__(self) -> None:
        self.k = self.v = torch.empty(0)
        self.block: slice | None = None
        self.frozen = False

    def freeze(self, first: int, last: int, cache: str) -> None:
        """After the refresh: ``prefix`` forgets what is right of ``first``, ``dual`` will overwrite the block."""
        self.frozen = True
        if cache == "dual":
            self.block = slice(first, last)
        else:
            self.k, self.v = self.k[:, :, :first], self.v[:, :, :first]

    def write(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, S, Dh] of the rows of this call; those that they may see."""
        if not self.frozen:
            self.k, self.v = k, v
        elif self.block is None:
            return torch.cat((self.k, k), dim=2), torch.cat((self.v, v), dim=2)
        else:
            self.k[:, :, self.block], self.v[:, :, self.block] = k, v
        return self.k, self.v


@torch.inference_mode()
def llada_generate(
    model: LLaDA,
    prompt: Tensor,
    *,
    steps: int,
    gen_length: int,
    block_length: int,
    softmax_dtype: torch.dtype | None = torch.float64,
) -> Decoded:
    """LLaDA's ``generate`` at temperature 0: every step is a call of the whole canvas, and the number is fixed.

    Args:
        prompt: LongTensor [B, P] without padding.
        steps: in all; they and ``gen_length`` must be multiples of the number of blocks.
        softmax_dtype: float64 as in LLaDA's first releases and what was derived from them; None: the logits' own, as
            in its releases since.
    """
    x = _canvas(model, prompt, gen_length)
    steps_a_block = steps * block_length // gen_length
    for first in range(prompt.shape[1], x.shape[1], block_length):
        last = first + block_length
        quota = _quota(x[:, first:last] == model.mask_id, steps_a_block)
        for step in range(steps_a_block):
            undecided = x == model.mask_id
            undecided[:, last:] = False
            token, chosen = _transfer(model(x), x, undecided, quota[:, step], softmax_dtype=softmax_dtype)
            x[chosen] = token[chosen]
    return Decoded(x, steps)


@torch.inference_mode()
def fast_dllm_generate(
    model: LLaDA,
    prompt: Tensor,
    *,
    steps: int,
    gen_length: int,
    block_length: int,
    threshold: float | None = None,
    cache: str = "dual",
) -> Decoded:
    """Fast-dLLM's three loops at temperature 0, one for each ``cache``.

    A block begins with a call of the whole canvas that fills the cache. The calls after it take the block (``dual``) or
    all from it on (``prefix``); there is always one, even if the first has decided the whole block. This is its code of
    June 2025; a later one compares with the threshold without asking the device about every position.

    Args:
        prompt: LongTensor [B, P] without padding.
        steps: of the static schedule, which ``threshold`` replaces.
        threshold: commit what is at least this confident, and the best.
    """
    if cache not in CACHES:
        raise ValueError(f"cache: {cache!r} given; known: {', '.join(CACHES)}")
    if model.config.shifted or model.config.block_size:
        how = "predict the column behind theirs" if model.config.shifted else "see no farther than their block"
        raise ValueError(f"model: its rows {how}; this is the loop for LLaDA")
    x = _canvas(model, prompt, gen_length)
    length = x.shape[1]
    rope = model.rope_tables(torch.arange(length, device=x.device)[None])
    passes = 0
    for first in range(prompt.shape[1], length, block_length):
        last = first + block_length
        quota = _quota(x[:, first:last] == model.mask_id, steps * block_length // gen_length)
        past: Any = None if cache == "none" else [Past() for _ in model.blocks]
        for step in range(block_length + 1):
            fills = past is not None and step == 0
            whole = past is None or fills
            rows = slice(0, length) if whole else slice(first, last if cache == "dual" else length)
            undecided = x[:, rows] == model.mask_id
            undecided[:, last - rows.start :] = False
            cos, sin = (table[:, :, rows] for table in rope)
            hidden = model.hidden_states(x[:, rows], (cos, sin), None, past)
            logits = F.linear(hidden, model.lm_head)
            passes += 1
            left = quota[:, min(step, quota.shape[1] - 1)]
            token, chosen = _transfer(logits, x[:, rows], undecided, left, threshold)
            x[:, rows][chosen] = token[chosen]
            if fills:
                for layer in past:
                    layer.freeze(first, last, cache)
            elif (x[:, first:last] == model.mask_id).sum() == 0:  # host: every step
                break
    return Decoded(x, passes)


def _canvas(model: LLaDA, prompt: Tensor, gen_length: int) -> Tensor:
    return F.pad(prompt.to(model.device), (0, gen_length), value=model.mask_id)


def _quota(masked: Tensor, steps: int) -> Tensor:
    """Positions to commit in each step of a block, int64 [B, steps]; the remainder goes to the first ones."""
    count = masked.sum(1, keepdim=True)
    return count // steps + (torch.arange(steps, device=masked.device) < count % steps)


def _transfer(
    logits: Tensor,
    x: Tensor,
    undecided: Tensor,
    quota: Tensor,
    threshold: float | None = None,
    softmax_dtype: torch.dtype | None = torch.float64,
) -> tuple[Tensor, Tensor]:
    """What a step writes and where: int64 [B, S], bool [B, S]. logits [B, S, V]; x, undecided [B, S]; quota [B]."""
    token = logits.argmax(-1)
    probabilities = F.softmax(logits if softmax_dtype is None else logits.to(softmax_dtype), dim=-1)
    confidence = probabilities.gather(-1, token[..., None])[..., 0]
    token = torch.where(undecided, token, x)
    confidence = torch.where(undecided, confidence, -torch.inf)
    count = quota if threshold is None else undecided.sum(1)
    chosen = torch.zeros_like(undecided)
    for b in range(len(x)):
        k = int(count[b])  # host: topk needs a number
        columns = confidence[b].topk(k).indices
        chosen[b, columns] = True
        for n in range(1, k):
            if threshold is not None and confidence[b, columns[n]] < threshold:  # host: for every undecided position
                chosen[b, columns[n]] = False
    return token, chosen

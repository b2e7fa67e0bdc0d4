"""Decoders that take turns on the same prompts."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from baselines import Decoded, fast_dllm_generate, llada_generate
from common import once, ratio
from torch import Tensor

from dllm_engine import LLaDA, decode

BLOCK, THRESHOLD = 32, 0.9
LLADA, FAST = "LLaDA's loop", f"Fast-dLLM's loop, dual, threshold {THRESHOLD}"


@dataclass
class Contender:
    """A way to decode, and what its turns gave.

    Attributes:
        run: prompt [1, P] -> what it decoded.
        same_as: name of the contender whose tokens it must give in float32.
        counts: generated tokens of each turn; right: whether it answered. Both are for the caller to fill.
    """

    name: str
    run: Callable[[Tensor], Decoded]
    same_as: str = ""
    turns: list[Decoded] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)

    def record(self, others: Sequence[Contender]) -> dict[str, Any]:
        """Figures of all its turns; factors over the two loops are medians over prompts, tokens/s by tokens/s."""
        passes = [decoded.passes for decoded in self.turns]
        found: dict[str, Any] = {
            "contender": self.name, "prompts": len(passes), "seconds": statistics.median(self.seconds),
            "forward_passes": statistics.mean(passes), "seconds_per_pass": sum(self.seconds) / sum(passes),
            "tokens_per_second": sum(self.counts) / sum(self.seconds),
        }  # fmt: skip
        for other in others:
            if other.name in (LLADA, FAST):
                turns = zip(self.counts, self.seconds, other.counts, other.seconds, strict=True)
                rates = [(mine / fast, theirs / slow) for mine, fast, theirs, slow in turns if theirs]
                key = "speedup_over_llada" if other.name == LLADA else "speedup_over_fast_dllm"
                found[key] = ratio(*zip(*rates, strict=True)) if rates else float("nan")
            if other.name == self.same_as:
                pairs = zip(self.turns, other.turns, strict=True)
                found["same_tokens"] = sum(torch.equal(a.sequences, b.sequences) for a, b in pairs) / len(passes)
        return found


def llada(model: LLaDA, gen_length: int, softmax_dtype: torch.dtype | None) -> Contender:
    """LLaDA's loop, one token a step."""
    lengths = {"steps": gen_length, "gen_length": gen_length, "block_length": BLOCK}
    return Contender(LLADA, lambda prompt: llada_generate(model, prompt, softmax_dtype=softmax_dtype, **lengths))


def fast_dllm(model: LLaDA, gen_length: int) -> Contender:
    """Fast-dLLM's loop with its dual cache and a threshold."""
    lengths: dict[str, Any] = {"steps": gen_length, "gen_length": gen_length, "block_length": BLOCK}
    return Contender(
        FAST, lambda prompt: fast_dllm_generate(model, prompt, threshold=THRESHOLD, cache="dual", **lengths)
    )


def ours(name: str, model: LLaDA, gen_length: int, same_as: str = "", **settings: str) -> Contender:
    """`decode` with these settings."""

    def run(prompt: Tensor) -> Decoded:
        out = decode(model, prompt, gen_length=gen_length, block_length=BLOCK, seed=0, **settings)  # type: ignore[arg-type]
        return Decoded(out.sequences, out.forward_passes)

    return Contender(name, run, same_as)


def take_turns(
    make: Callable[[int], list[Contender]], gen_length: int, prompts: Sequence[Tensor], *, exact: bool
) -> list[Contender]:
    """``make(gen_length)``, each of which has decoded every prompt once.

    Raises:
        AssertionError: with ``exact``, unequal tokens where they must be equal.
    """
    if gen_length > BLOCK:
        take_turns(make, BLOCK, prompts[:1], exact=exact)  # warm-up, and a comparison before anything is timed
    contenders = make(gen_length)
    if prompts[0].device.type == "cuda":  # buffers grow, and calls of this size are captured
        for one in contenders:
            for _ in range(2):
                one.run(prompts[0])
    for prompt in prompts:
        found: dict[str, Decoded] = {}
        for one in contenders:

            def run(one: Contender = one, prompt: Tensor = prompt, found: dict[str, Decoded] = found) -> None:
                found[one.name] = one.run(prompt)

            one.seconds.append(once(run, prompt.device))
            one.turns.append(found[one.name])
        for one in contenders:
            if exact and one.same_as and not torch.equal(found[one.name].sequences, found[one.same_as].sequences):
                raise AssertionError(f"{one.name!r} and {one.same_as!r} give different tokens")
    return contenders

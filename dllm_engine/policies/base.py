"""What a decoding rule is: it ranks positions and may pick some outright; quota, bans and commit are the engine's."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dllm_engine.reference import RowStats
from dllm_engine.rules import Rule, select
from dllm_engine.state import BlockState, DecodeState


def in_range(name: str, value: float, least: float, most: float = math.inf) -> float:
    """A parameter of a rule; ValueError, naming it, if it is not a finite number in the range."""
    if not (math.isfinite(value) and least <= value <= most):
        allowed = f"{least} to {most} allowed" if most < math.inf else f"a finite number ≥ {least} is allowed"
        raise ValueError(f"{name}: {value} given; {allowed}")
    return float(value)


def whole(name: str, value: float, least: int) -> int:
    """A parameter that counts; ValueError, naming it, if it is no whole number or too small."""
    if not math.isfinite(value) or value != int(value) or value < least:
        raise ValueError(f"{name}: {value} given; a whole number ≥ {least} is allowed")
    return int(value)


class Policy:
    """Base of the commit rules.

    At each step the engine commits what `select` returns together with the n best undecided positions by `score`, where
    n is the static schedule's quota if ``steps`` was given, else 1: a step always makes progress.
    """

    name: str
    reads_decided = (
        True  # False where `score` and `select` ignore the statistics of decided positions: saves their rows
    )
    of_one_batch = False  # True where the rule knows something of each sequence of its batch: not for `generate_many`

    def score(self, stats: RowStats, state: BlockState) -> Tensor:
        """Rank of each position, float32 [B, S], higher first; log-odds of ``token`` unless a rule says otherwise."""
        return stats.log_odds

    def select(self, stats: RowStats, state: BlockState) -> Tensor:
        """Positions to commit beyond the quota, bool [B, S]; decided ones are ignored. Nothing by default."""
        return torch.zeros_like(state.undecided)

    def tokens(self, stats: RowStats, state: BlockState) -> Tensor:
        """What is committed where, int64 [B, S]; the predictions unless a rule says otherwise."""
        return stats.token

    def rule(self, block_length: int, device: torch.device) -> Rule | None:
        """The rule as data, if a kernel can decide by it; None has `score` and `select` called after every pass."""
        return None

    def default_steps(self, gen_length: int) -> int | None:
        """Steps of the static schedule when the caller gives none; None means a quota of one position a step."""
        return None

    def check(self, model: object, *, block_length: int, cache: str) -> None:
        """Raise ValueError before the first forward pass if the rule cannot run with these settings."""

    def begin(self, state: DecodeState) -> None:
        """Called once before the first forward pass of a decode: where a rule with a memory makes or checks it."""

    def __repr__(self) -> str:
        values = ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if not k.startswith("_"))
        return f"{type(self).__name__}({values})"


class RulePolicy(Policy):
    """A policy that is a `Rule`: kernels decide by it, and `select` is its definition in torch."""

    def select(self, stats: RowStats, state: BlockState) -> Tensor:
        rule = self.rule(state.undecided.shape[1], stats.token.device)
        assert rule is not None
        return select(rule, stats, state)

"""Fast-dLLM's two parallel rules (arXiv 2505.22618)."""

from __future__ import annotations

import math

import torch

from dllm_engine.policies.base import RulePolicy
from dllm_engine.rules import Rule, by_bounds


class Threshold(RulePolicy):
    """Commit every undecided position whose confidence is at least ``threshold`` (float32 against float32)."""

    name = "threshold"
    reads_decided = False

    def __init__(self, threshold: float = 0.9) -> None:
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold: {threshold} given; 0 to 1 allowed")
        self.threshold = float(threshold)

    def rule(self, block_length: int, device: torch.device) -> Rule:
        return by_bounds((self.threshold,) * block_length, device)


class Factor(RulePolicy):
    """Commit the n most confident, n the largest with c₍ₙ₎ ≥ 1 − factor / (n + 1), in float32."""

    name = "factor"
    reads_decided = False

    def __init__(self, factor: float = 1.0) -> None:
        if not (math.isfinite(factor) and factor >= 0):
            raise ValueError(f"factor: {factor} given; a finite number ≥ 0 is allowed")
        self.factor = float(factor)

    def rule(self, block_length: int, device: torch.device) -> Rule:
        n = torch.arange(1, block_length + 1)
        bounds = 1 - torch.tensor(self.factor, dtype=torch.float32) / (n + 1)
        return by_bounds(tuple(bounds.tolist()), device)

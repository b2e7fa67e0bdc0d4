"""Fast-dLLM's two parallel rules (arXiv 2505.22618)."""

from __future__ import annotations

import torch

from dllm_engine.policies.base import Policy, in_range
from dllm_engine.rules import Rule, by_bounds


class Threshold(Policy):
    """Commit every undecided position whose confidence is at least ``threshold`` (float32 against float32)."""

    name = "threshold"
    reads_decided = False

    def __init__(self, threshold: float = 0.9) -> None:
        self.threshold = in_range("threshold", threshold, 0, 1)

    def rule(self, block_length: int, device: torch.device) -> Rule:
        return by_bounds((self.threshold,) * block_length, device)


class Factor(Policy):
    """Commit the n most confident, n the largest with c₍ₙ₎ ≥ 1 − factor / (n + 1), in float32."""

    name = "factor"
    reads_decided = False

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = in_range("factor", factor, 0)

    def rule(self, block_length: int, device: torch.device) -> Rule:
        n = torch.arange(1, block_length + 1, device="cpu")
        bounds = 1 - torch.tensor(self.factor, dtype=torch.float32, device="cpu") / (n + 1)
        return by_bounds(tuple(bounds.tolist()), device)

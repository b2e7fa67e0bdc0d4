"""Fast-dLLM's two parallel rules (arXiv 2505.22618)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dllm_engine.policies.base import Policy, undecided_confidence
from dllm_engine.reference import RowStats
from dllm_engine.state import BlockState


class Threshold(Policy):
    """Commit every undecided position whose confidence is at least ``threshold`` (float32 against float32)."""

    name = "threshold"
    reads_decided = False

    def __init__(self, threshold: float = 0.9) -> None:
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold: {threshold} given; 0 to 1 allowed")
        self.threshold = float(threshold)

    def select(self, stats: RowStats, state: BlockState) -> Tensor:
        return undecided_confidence(stats, state) >= self.threshold


class Factor(Policy):
    """Commit the n most confident, n the largest with c₍ₙ₎ ≥ 1 − factor / (n + 1), in float32."""

    name = "factor"
    reads_decided = False

    def __init__(self, factor: float = 1.0) -> None:
        if not (math.isfinite(factor) and factor >= 0):
            raise ValueError(f"factor: {factor} given; a finite number ≥ 0 is allowed")
        self.factor = float(factor)

    def select(self, stats: RowStats, state: BlockState) -> Tensor:
        # ranked by log-odds like the quota: confidences that round to the same float32 keep their order
        odds = stats.log_odds.masked_fill(~state.undecided, float("-inf"))
        order = odds.argsort(dim=1, descending=True, stable=True)
        ranked = undecided_confidence(stats, state).gather(1, order)
        n = torch.arange(1, ranked.shape[1] + 1, device=ranked.device)
        bound = 1 - torch.tensor(self.factor, dtype=torch.float32, device=ranked.device) / (n + 1)
        largest = torch.where((ranked >= bound) & (ranked >= 0), n, 0).amax(1, keepdim=True)
        return order.argsort(dim=1) < largest

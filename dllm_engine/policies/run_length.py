"""Left to right, as far as the whole run is likely to be right."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_engine.policies.base import Policy, in_range
from dllm_engine.state import BlockState
from dllm_engine.stats import RowStats


class RunLength(Policy):
    """From the leftmost undecided position on, commit while the product of the confidences stays ≥ ``threshold``.

    c₁ ⋯ cₙ is the probability that all n are right if they are independent, so the threshold bounds the risk of a step,
    not of a position. No paper's rule: a common way to take several tokens a step in the order of a left-to-right
    decoder, here as a baseline that keeps that order. At least the leftmost: score = −position.
    """

    name = "run_length"
    reads_decided = False

    def __init__(self, threshold: float = 0.9) -> None:
        self.threshold = in_range("threshold", threshold, 0, 1)

    def score(self, stats: RowStats, state: BlockState) -> Tensor:
        return -state.positions.float()

    def select(self, stats: RowStats, state: BlockState) -> Tensor:
        # in float64 and then rounded, so that no library's sigmoid or order of products decides
        confidence = torch.where(state.undecided, stats.log_odds.double().sigmoid(), 1.0)
        return confidence.cumprod(1).float() >= self.threshold

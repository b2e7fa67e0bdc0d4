"""dParallel's rule (arXiv 2509.26488): commit where the whole distribution is certain."""

from __future__ import annotations

from torch import Tensor

from dllm_engine.policies.base import Policy, in_range
from dllm_engine.state import BlockState
from dllm_engine.stats import RowStats


class Entropy(Policy):
    """Commit every undecided position with entropy ≤ ``threshold`` nats, at least the lowest: score = −entropy.

    Published with 0.5 (0.45 for code), for models trained to be certain; only the rule is here.
    """

    name = "entropy"
    reads_decided = False

    def __init__(self, threshold: float = 0.5) -> None:
        self.threshold = in_range("threshold", threshold, 0)

    def score(self, stats: RowStats, state: BlockState) -> Tensor:
        return -stats.entropy

    def select(self, stats: RowStats, state: BlockState) -> Tensor:
        return stats.entropy <= self.threshold

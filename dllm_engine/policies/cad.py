"""CD4LM's confidence-adaptive decoding (CAD): a threshold with a least and a most, and no early end of the text."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_engine.policies.base import Policy, in_range, whole
from dllm_engine.rules import least_log_odds, ranking
from dllm_engine.state import BlockState
from dllm_engine.stats import RowStats


class CAD(Policy):
    """Commit the k most confident candidates, k = clamp(#{confidence ≥ threshold}, k_min, k_max).

    Until ``eos_ratio`` of the text is decided, positions that predict an end id are no candidates. Where a block has no
    other undecided ones, the most confident of them is committed all the same, as in the authors' code: never stuck.
    Defaults are those of their GSM8K runs (their function's: 0.8, 1, 4, 0.5). Their student model is not needed.

    Args:
        max_entropy: count and rank by entropy instead: #{entropy ≤ max_entropy} nats (the authors' variant: 0.3).
    """

    name = "cad"
    reads_decided = False

    def __init__(
        self,
        threshold: float = 0.95,
        k_min: int = 1,
        k_max: int = 32,
        eos_ratio: float = 0.3,
        *,
        max_entropy: float | None = None,
    ) -> None:
        self.threshold = in_range("threshold", threshold, 0, 1)
        self.k_min = whole("k_min", k_min, 1)
        self.k_max = whole("k_max", k_max, self.k_min)
        self.eos_ratio = in_range("eos_ratio", eos_ratio, 0, 1)
        self.max_entropy = None if max_entropy is None else in_range("max_entropy", max_entropy, 0)
        self._bound = least_log_odds(self.threshold)

    def score(self, stats: RowStats, state: BlockState) -> Tensor:
        measure = stats.log_odds if self.max_entropy is None else -stats.entropy
        rank = ranking(measure, state.undecided).argsort(dim=1)
        return -(rank + rank.shape[1] * self._held_back(stats, state)).float()  # behind all others, in their order

    def select(self, stats: RowStats, state: BlockState) -> Tensor:
        candidates = state.undecided & ~self._held_back(stats, state)
        sure = stats.log_odds >= self._bound if self.max_entropy is None else stats.entropy <= self.max_entropy
        k = (candidates & sure).sum(1, keepdim=True).clamp(self.k_min, self.k_max)
        return candidates & (ranking(self.score(stats, state), candidates).argsort(dim=1) < k)

    def _held_back(self, stats: RowStats, state: BlockState) -> Tensor:
        return torch.isin(stats.token, state.end_ids) & (state.progress < self.eos_ratio)[:, None]

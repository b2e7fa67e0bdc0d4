"""dInfer's hierarchical rule (arXiv 2510.08666): split every gap in two, where the model is surest."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm_engine.policies.base import Policy, in_range
from dllm_engine.rules import least_log_odds, ranking
from dllm_engine.state import BlockState
from dllm_engine.stats import RowStats


class Hierarchical(Policy):
    """Of each maximal run of undecided positions commit the most confident one if its confidence is > ``low``.

    Besides it, everything with confidence > ``threshold`` (both strict, as published), and at least the best one.
    Equally confident ones of a run: the leftmost. ``low`` is 0.4 unless given, or ``threshold`` if that is less.
    """

    name = "hierarchical"
    reads_decided = False

    def __init__(self, threshold: float = 0.9, low: float | None = None) -> None:
        self.threshold = in_range("threshold", threshold, 0, 1)
        self.low = in_range("low", min(0.4, self.threshold) if low is None else low, 0, self.threshold)
        self._bounds = least_log_odds(self.threshold, above=True), least_log_odds(self.low, above=True)

    def select(self, stats: RowStats, state: BlockState) -> Tensor:
        undecided, width = state.undecided, state.undecided.shape[1]
        begins = undecided & ~F.pad(undecided, (1, 0))[:, :width]
        run = begins.cumsum(1)  # 1, 2, … from the left; decided positions behind one rank last
        rank = ranking(stats.log_odds, undecided).argsort(dim=1)  # all different, so that a run has one best
        best = torch.full((len(rank), width + 1), width, device=rank.device).scatter_reduce(1, run, rank, "amin")
        sure, enough = (stats.log_odds >= bound for bound in self._bounds)
        return undecided & (sure | (enough & (rank == best.gather(1, run))))

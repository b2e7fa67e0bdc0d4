"""Explore-then-exploit across blocks, after "From Bits to Rounds" (arXiv 2511.21103): a reconstruction."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_engine.policies.base import Policy, in_range, whole
from dllm_engine.rules import least_log_odds, ranking
from dllm_engine.state import BlockState
from dllm_engine.stats import RowStats


class ExploreExploit(Policy):
    """Commit every position of the next ``blocks`` blocks whose confidence is at least ``threshold``; where fewer than
    ``enough`` are, commit the position of highest entropy among them as well (never two: they may be coupled).

    A sure token tells the model little (at most −log threshold nats), an unsure one much: after it, others become sure.
    **A reconstruction**: the details of the published algorithm were not available, only what it claims; its
    look-ahead over candidate values is left out. ``enough`` is 2 by default because an independent simulation of such a
    rule then has the same figures on exact models (see benchmarks/oracle).

    Args:
        threshold: 0 to 1. blocks: ≥ 1, each of the decode's block length. enough: ≥ 1.
    """

    name = "ete"
    reads_decided = False

    def __init__(self, threshold: float = 0.95, blocks: int = 2, enough: int = 2) -> None:
        self.threshold = in_range("threshold", threshold, 0, 1)
        self.blocks, self.enough = whole("blocks", blocks, 1), whole("enough", enough, 1)
        self._bound = least_log_odds(threshold)

    def reach(self, block_length: int, gen_length: int) -> int:
        return min(gen_length, self.blocks * block_length)

    def select(self, stats: RowStats, state: BlockState) -> Tensor:
        return state.undecided & (stats.log_odds >= self._bound)

    def score(self, stats: RowStats, state: BlockState) -> Tensor:
        few = self.select(stats, state).sum(1, keepdim=True) < self.enough
        explored = ranking(stats.entropy, state.undecided).argsort(dim=1) == 0
        # the one to explore is ahead of all others, even those of infinite odds
        finite = stats.log_odds.clamp_max(torch.finfo(torch.float32).max)
        return torch.where(few & explored, torch.inf, finite)

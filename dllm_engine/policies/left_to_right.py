"""The order of an autoregressive model: what every parallel rule gives up."""

from __future__ import annotations

from torch import Tensor

from dllm_engine.policies.topk import TopK
from dllm_engine.state import BlockState
from dllm_engine.stats import RowStats


class LeftToRight(TopK):
    """Commit the quota's leftmost undecided positions: score = −position.

    A baseline (also ParallelBench's, arXiv 2510.04767). ``steps`` defaults to ``gen_length``: one token per step.
    """

    name = "left_to_right"

    def score(self, stats: RowStats, state: BlockState) -> Tensor:
        return -state.positions.float()

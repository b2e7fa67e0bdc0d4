"""WeDLM's rule (arXiv 2512.22737): certainty counts, the more so the further ahead of the text a position lies."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_engine.policies.base import Policy, in_range
from dllm_engine.state import BlockState
from dllm_engine.stats import RowStats


class WeDLM(Policy):
    """Commit where H + penalty · (i − leftmost undecided position) < ``threshold``, at least where that is least.

    Defaults are the published engine's (0.4 nats, 0.02 a position; the paper's tables use a penalty of 0.1 or 0.01).
    Text then grows from the left, which suits caches of prefixes. The commit rule alone: WeDLM's causal attention and
    streaming window need its model.
    """

    name = "wedlm"
    reads_decided = False

    def __init__(self, threshold: float = 0.4, penalty: float = 0.02) -> None:
        self.threshold = in_range("threshold", threshold, 0)
        self.penalty = in_range("penalty", penalty, 0)

    def score(self, stats: RowStats, state: BlockState) -> Tensor:
        never = torch.iinfo(torch.int64).max
        leftmost = torch.where(state.undecided, state.columns, never).amin(1, keepdim=True)
        return -(stats.entropy + self.penalty * (state.columns - leftmost).float())

    def select(self, stats: RowStats, state: BlockState) -> Tensor:
        return self.score(stats, state) > -self.threshold

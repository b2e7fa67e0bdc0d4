"""LocalLeap (arXiv 2510.07081): what stands next to a confident position may be a little less so."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dllm_engine.policies.base import Policy, in_range, whole
from dllm_engine.rules import least_log_odds
from dllm_engine.state import BlockState
from dllm_engine.stats import RowStats


class LocalLeap(Policy):
    """Commit undecided positions with confidence ≥ ``anchor``, and ≥ ``relaxed`` within ``window`` of such a one.

    Only undecided positions are anchors: a decided neighbour relaxes nothing, as in the published code. ``relaxed`` is
    0.75 unless given, or ``anchor`` if that is less.
    """

    name = "localleap"
    reads_decided = False

    def __init__(self, anchor: float = 0.9, relaxed: float | None = None, window: int = 4) -> None:
        self.anchor = in_range("anchor", anchor, 0, 1)
        self.relaxed = in_range("relaxed", min(0.75, self.anchor) if relaxed is None else relaxed, 0, self.anchor)
        self.window = whole("window", window, 0)
        self._bounds = least_log_odds(self.anchor), least_log_odds(self.relaxed)

    def select(self, stats: RowStats, state: BlockState) -> Tensor:
        sure, enough = (state.undecided & (stats.log_odds >= bound) for bound in self._bounds)
        # a maximum over a sliding window is the dilation of the anchors
        window = min(self.window, sure.shape[1])
        near = F.max_pool1d(sure.float()[:, None], 2 * window + 1, stride=1, padding=window)[:, 0] > 0
        return sure | (near & enough)

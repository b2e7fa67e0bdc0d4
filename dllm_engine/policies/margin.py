"""The static schedule by margin: how far the best token is ahead of the second."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm_engine.policies.topk import TopK
from dllm_engine.state import BlockState
from dllm_engine.stats import RowStats


class Margin(TopK):
    """Commit the quota's positions with the greatest p₁ − p₂ (top-k margin, Kim et al., arXiv 2502.06768).

    Ranked by −log(1 − (p₁ − p₂)), which grows with it: float32 probabilities of a sure model have all rounded to 1, and
    their margins would rank by position. ``steps`` defaults to ``gen_length``: one token per step.
    """

    name = "margin"

    def score(self, stats: RowStats, state: BlockState) -> Tensor:
        # 1 − (p₁ − p₂) = (1 − p₁) + p₂, both summands from their logarithms
        rest = F.logsigmoid(-stats.log_odds.double())
        second = stats.second_logit.double() - stats.logsumexp.double()
        score = -torch.logaddexp(rest, second).float()
        return torch.where(stats.logit == stats.second_logit, 0.0, score)  # exactly: ties are broken by position

"""The commit rules that a kernel can decide by, as data, and their definition in torch.

Everything is compared in log-odds, which decide exactly alike wherever they are compared: a confidence is a sigmoid,
and two libraries' sigmoids differ in the last place.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm_engine import features

if TYPE_CHECKING:
    from dllm_engine.state import BlockState
    from dllm_engine.stats import RowStats

_INF = float("inf")
MAX_FILTER = 128  # units; kernels keep a filter's hidden layer on the chip


@dataclass(frozen=True)
class Rule:
    """Which undecided positions of a block a step commits beside the quota's best.

    Attributes:
        bounds: float32 [block_length]: the n best by log-odds, n the largest whose n-th has log-odds ≥ bounds[n − 1].
            +inf throughout selects nothing (the static schedule), one value throughout is a threshold.
        weights: float32, a Learn2PD filter's matrix, bias, matrix, bias one after the other; empty if `bounds` decide.
            A position is selected if its output is above ``cut`` (a float32; the filter itself is computed in
            float64). The published kind takes a block's confidences: [2 F² + 2 F].
        decided_is_one: feed the published kind 1.0 for decided positions, not their confidence.
        position: the filter is the same at every position and takes `features.NAMES`: [(F + 2) units + 1].
        ends_wait: see `Policy.ends_wait`.
    """

    bounds: Tensor
    weights: Tensor
    cut: float = _INF
    decided_is_one: bool = False
    position: bool = False
    ends_wait: bool = False

    @property
    def filter_length(self) -> int:
        """Units of the hidden layer (of the published kind: positions too), 0 without a filter."""
        if self.position:
            return (len(self.weights) - 1) // (features.COUNT + 2)
        return int((len(self.weights) / 2 + 0.25) ** 0.5)

    @property
    def parameters(self) -> int:
        """Numbers in ``weights`` that a filter of this length has."""
        size = self.filter_length
        return (features.COUNT + 2) * size + 1 if self.position else 2 * size * size + 2 * size

    @property
    def reads_decided(self) -> bool:
        """Whether the statistics of decided positions matter."""
        return len(self.weights) > 0 and not self.decided_is_one and not self.position


def by_bounds(confidences: tuple[float, ...], device: torch.device) -> Rule:
    """Rule from bounds on the confidence, one for each n; above 1 means never."""
    return Rule(_log_odds_bounds(confidences).to(device), torch.empty(0, dtype=torch.float32, device=device))


def by_filter(
    weights: Tensor, threshold: float, block_length: int, *, decided_is_one: bool = False, position: bool = False
) -> Rule:
    """Rule ``sigmoid(filter) > threshold``."""
    cut = torch.logit(torch.tensor(threshold, dtype=torch.float64, device="cpu")).float().item()
    never = torch.full((block_length,), _INF, dtype=torch.float32, device=weights.device)
    return Rule(never, weights, cut, decided_is_one, position)


def least_log_odds(confidence: float, *, above: bool = False) -> float:
    """What log-odds are compared with: ``log_odds >= least_log_odds(c)`` is "confidence at least c" in float32.

    ``above``: "confidence above c" instead.
    """
    wanted = torch.tensor(confidence, dtype=torch.float32, device="cpu")
    if above:
        wanted = torch.nextafter(wanted, torch.full_like(wanted, _INF))
    return _log_odds_bounds((wanted.item(),)).item()


@lru_cache(maxsize=256)  # whoever asks a server may name any threshold
def _log_odds_bounds(confidences: tuple[float, ...]) -> Tensor:
    """The least float32 log-odds whose sigmoid, rounded to float32, is at least each confidence (as float32); bisected.

    In float64 first: torch's own float32 sigmoid is not monotonic in the last place, nor the same in tensors of
    different lengths.
    """
    wanted = torch.tensor(confidences, dtype=torch.float32, device="cpu")
    low, high = torch.full_like(wanted, -110.0), torch.full_like(wanted, 110.0)  # sigmoid is 0 and 1 there
    for _ in range(64):
        middle = (low / 2 + high / 2).float()
        enough = torch.sigmoid(middle.double()).float() >= wanted
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return torch.where(wanted <= 0, -_INF, torch.where(wanted > 1, _INF, high))


def select(rule: Rule, stats: RowStats, block: BlockState) -> Tensor:
    """Positions that the rule picks outright, bool [B, S]."""
    undecided, width = block.undecided, block.undecided.shape[1]
    if not len(rule.weights):
        order = ranking(stats.log_odds, undecided)
        n = torch.arange(1, width + 1, device=order.device)
        fits = (stats.log_odds.gather(1, order) >= rule.bounds[:width]) & undecided.gather(1, order)
        return undecided & (order.argsort(dim=1) < torch.where(fits, n, 0).amax(1, keepdim=True))
    size = rule.filter_length
    if rule.position:
        inputs, outputs = features.COUNT, 1
        margin = stats.logit - stats.second_logit
        stable = stats.token == block.predicted
        x = features.position_features(stats.log_odds, margin, stats.entropy, undecided, block.active, stable).double()
    else:
        inputs = outputs = size
        confidence = stats.log_odds.double().sigmoid().float()
        if rule.decided_is_one:
            confidence = confidence.masked_fill(~undecided, 1.0)
        x = F.pad(confidence.masked_fill(~block.active, 0.0).double(), (0, size - width))
    w1, b1, w2, b2 = rule.weights.double().split((size * inputs, size, outputs * size, outputs))
    x = F.linear(F.relu(F.linear(x, w1.view(size, inputs), b1)), w2.view(outputs, size), b2)
    return undecided & ((x[..., 0] if rule.position else x[:, :width]) > rule.cut)


def ranking(score: Tensor, undecided: Tensor) -> Tensor:
    """Columns of each row from the best undecided one down, equal scores by position; decided ones come last."""
    least = torch.finfo(torch.float32).min  # an undecided score of -inf or NaN still ranks before every decided one
    return (
        torch.where(score >= least, score, least)
        .masked_fill(~undecided, -_INF)
        .argsort(dim=1, descending=True, stable=True)
    )

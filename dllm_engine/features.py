"""What the per-position filter sees: numbers that the decode step has anyway, on one scale, for any block length."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Tokens are no feature: a filter must not depend on a vocabulary. Odds are log-odds clamped to ±12 and divided by 4; a
# decided position counts as certain, one right of the block or behind the end of the text as even (how far a call
# reaches beyond a sequence's end depends on the others in it, and must change nothing).
NAMES = (
    "odds", "margin", "entropy", "place", "odds 2 left", "odds 1 left", "odds 1 right", "odds 2 right",
    "decided 1 left", "decided 1 right", "least odds left", "undecided left", "greatest odds", "undecided", "stable",
)  # fmt: skip
COUNT = len(NAMES)
SURE = 3.0  # odds of a decided position


def position_features(
    log_odds: Tensor, margin: Tensor, entropy: Tensor, undecided: Tensor, active: Tensor, stable: Tensor
) -> Tensor:
    """Features of every position of a block, float32 [B, S, `COUNT`]; those of decided positions mean nothing.

    Args:
        log_odds, margin, entropy: float32 [B, S]: of the prediction, best minus second logit, nats.
        undecided: bool [B, S]. active: bool [B, S], False behind the end of the text, where nothing is undecided.
        stable: bool [B, S], whether the step before predicted the same token; False at a block's first.
    """
    width = log_odds.shape[1]
    odds = torch.where(undecided, log_odds.clamp(-12, 12) / 4, active.float() * SURE)
    open_, decided = undecided.float(), (active & ~undecided).float()

    def shifted(x: Tensor, by: int, left: float, right: float) -> Tensor:
        """The value ``by`` places to the right (negative: left)."""
        return F.pad(x, (-by, 0), value=left)[:, :width] if by < 0 else F.pad(x, (0, by), value=right)[:, by:]

    before = F.pad(odds, (1, 0), value=SURE)[:, :width].cummin(1).values
    undecided_before = open_.cumsum(1) - open_
    place = torch.arange(width, dtype=torch.float32, device=odds.device).expand_as(odds) / 32
    greatest = odds.masked_fill(~undecided, -SURE).amax(1, keepdim=True).expand_as(odds)
    columns = (
        odds,
        margin.clamp(0, 12) / 4,
        entropy.clamp(0, 6) / 2,
        place,
        *(shifted(odds, by, SURE, 0.0) for by in (-2, -1, 1, 2)),
        *(shifted(decided, by, 1.0, 0.0) for by in (-1, 1)),
        before,
        undecided_before / 32,
        greatest,
        (open_.sum(1, keepdim=True) / 32).expand_as(odds),
        stable.float(),
    )
    return torch.stack(columns, dim=-1).masked_fill(~undecided[..., None], 0.0)

"""The filter that looks at each position by itself: its features and its small net, for the decode step in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from dllm_engine import features

FEATURES = tl.constexpr(features.COUNT)
SURE = tl.constexpr(features.SURE)


@triton.jit
def _odds(log_odds, undecided, at, active):
    """Odds of the positions ``at``: undecided, decided or left of the block, right of it or behind the text's end."""
    open_ = (at >= 0) & (at < active)
    open_ = open_ & (tl.load(undecided + at, mask=open_, other=0) != 0)
    value = tl.minimum(tl.maximum(tl.load(log_odds + at, mask=open_, other=0.0), -12.0), 12.0) * 0.25
    return tl.where(open_, value, tl.where(at < active, SURE, 0.0))


@triton.jit
def position_filter(
    log_odds, logit, second_logit, entropy, undecided, stable, i, open_, active, weights,
    FILTER: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The filter's output at the undecided positions ``i`` of a block, ``active`` of which are in the text; float64.

    Features equal those of `features.position_features` in every bit, given the statistics: factors are powers of two.
    """
    odds = _odds(log_odds, undecided, i, active)
    left2, left1 = _odds(log_odds, undecided, i - 2, active), _odds(log_odds, undecided, i - 1, active)
    right1, right2 = _odds(log_odds, undecided, i + 1, active), _odds(log_odds, undecided, i + 2, active)
    margin = tl.load(logit + i, mask=open_, other=0.0) - tl.load(second_logit + i, mask=open_, other=0.0)
    margin = tl.minimum(tl.maximum(margin, 0.0), 12.0) * 0.25
    spread = tl.minimum(tl.maximum(tl.load(entropy + i, mask=open_, other=0.0), 0.0), 6.0) * 0.5
    decided_left = tl.load(undecided + i - 1, mask=(i > 0) & (i < active), other=0) == 0
    decided_right = tl.load(undecided + i + 1, mask=i + 1 < active, other=1) == 0

    least = tl.zeros([WIDTH], tl.float32) + SURE
    before = tl.zeros([WIDTH], tl.int32)
    for first in range(0, active, CHUNK):
        j = first + tl.arange(0, CHUNK)
        left = (tl.load(undecided + j, mask=j < active, other=0) != 0)[None, :] & (j[None, :] < i[:, None])
        least = tl.minimum(least, tl.min(tl.where(left, _odds(log_odds, undecided, j, active)[None, :], SURE), 1))
        before += tl.sum(left.to(tl.int32), 1)
    f = tl.arange(0, 16)[None, :]
    x = tl.where(f == 0, odds[:, None], 0.0)
    x = tl.where(f == 1, margin[:, None], x)
    x = tl.where(f == 2, spread[:, None], x)
    x = tl.where(f == 3, i.to(tl.float32)[:, None] * 0.03125, x)
    x = tl.where(f == 4, left2[:, None], x)
    x = tl.where(f == 5, left1[:, None], x)
    x = tl.where(f == 6, right1[:, None], x)
    x = tl.where(f == 7, right2[:, None], x)
    x = tl.where(f == 8, decided_left.to(tl.float32)[:, None], x)
    x = tl.where(f == 9, decided_right.to(tl.float32)[:, None], x)
    x = tl.where(f == 10, least[:, None], x)
    x = tl.where(f == 11, before.to(tl.float32)[:, None] * 0.03125, x)
    x = tl.where(f == 12, tl.max(tl.where(open_, odds, -SURE), 0), x)
    x = tl.where(f == 13, tl.sum(open_.to(tl.int32), 0).to(tl.float32) * 0.03125, x)
    x = tl.where(f == 14, stable.to(tl.float32)[:, None], x).to(tl.float64)

    second = weights + FILTER * (FEATURES + 1)
    out = tl.zeros([WIDTH], tl.float64) + tl.load(second + FILTER).to(tl.float64)
    for u in range(FILTER):  # several at a time would take too many registers
        w = tl.load(weights + u * FEATURES + f, mask=f < FEATURES, other=0.0).to(tl.float64)
        unit = tl.sum(x * w, 1) + tl.load(weights + FILTER * FEATURES + u).to(tl.float64)
        out += tl.maximum(unit, 0.0) * tl.load(second + u).to(tl.float64)
    return out

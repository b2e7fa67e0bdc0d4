"""End-of-Text Prediction: where an answer ends is often certain long before it is decoded (arXiv 2509.25188).

The paper's code cuts after the most confident end id among all masked positions, however unsure, and so can cut an
answer short. Here everything from the cut on must predict an end id, with confidence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dllm_engine import ops
from dllm_engine.state import DecodeState

CONFIDENCE = 0.9


def predict_end_(
    state: DecodeState,
    sequences: Tensor,
    first: Tensor,
    hidden: Tensor,
    lm_head: Tensor,
    end_ids: Tensor,
    scoring: dict[str, Any],
) -> None:
    """End the text at the first column from which on every undecided position predicts an end id; changes ``state``.

    With e that column, right of the block, ``active_end`` becomes e + 1 and e and all behind it hold the fill id.

    Args:
        sequences: int64 [B'] that are in the first call of a block; it has been committed.
        first: int64 [B'], the first columns right of the blocks.
        hidden: [B', R, D], rows ``first`` to ``first`` + R of the same call.
        end_ids: int64 [E]. scoring: further arguments of `ops.row_stats`.
    """
    batch, width, dim = hidden.shape
    columns = first[:, None] + torch.arange(width, device=first.device)
    rows = torch.arange(batch * width, device=first.device)
    stats = ops.row_stats(hidden.reshape(-1, dim), lm_head, rows, values_known=True, **scoring).reshape(batch, width)
    says_end = torch.isin(stats.token, end_ids) & (stats.confidence >= CONFIDENCE)
    end = state.active_end[sequences]
    open_ = state.undecided[sequences[:, None], columns.clamp_max(state.length - 1)] & (columns < end[:, None])
    last_word = torch.where(open_ & ~says_end, columns, -1).amax(1)
    cut = torch.maximum(last_word + 1, first)
    state.active_end[sequences] = torch.minimum(end, cut + 1)
    held = state.left[sequences] - state.undecided[sequences].sum(1)  # 1 where a rule stays in its decided block
    every = torch.arange(state.length, device=first.device)
    beyond = every >= torch.minimum(end, cut)[:, None]
    state.tokens[sequences] = torch.where(beyond, state.fill_id, state.tokens[sequences])
    state.undecided[sequences] &= ~beyond
    state.left[sequences] = state.undecided[sequences].sum(1) + held

"""Token editing (LLaDA2.1, arXiv 2602.08676): decided tokens of the block may be replaced while it is open."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_engine.policies.base import Policy, in_range, whole
from dllm_engine.rules import least_log_odds
from dllm_engine.state import BlockState, DecodeState
from dllm_engine.stats import RowStats


class TokenEditing(Policy):
    """Commit undecided positions with a confidence above ``threshold`` (M2T), and replace the token of decided ones of
    the same block whose prediction is another with a confidence above ``edit_threshold`` (T2T).

    A block ends when all of it is decided and a pass replaced nothing, or after ``post_steps`` passes without an
    undecided position. The token that was replaced last does not come back at its position: no pair takes turns for
    ever. An end of the text stays where it is, whatever replaces its token. The defaults are the published quality
    mode; speed mode is 0.5 and 0. Only models trained to edit gain by it: others mostly repeat what is decided.

    Args:
        threshold, edit_threshold: 0 to 1. post_steps: ≥ 1.
    """

    name = "editing"
    greedy = True

    def __init__(self, threshold: float = 0.7, edit_threshold: float = 0.5, post_steps: int = 16) -> None:
        self.threshold = in_range("threshold", threshold, 0, 1)
        self.edit_threshold = in_range("edit_threshold", edit_threshold, 0, 1)
        self.post_steps = whole("post_steps", post_steps, 1)
        self._commit = least_log_odds(threshold, above=True)
        self._edit = least_log_odds(edit_threshold, above=True)

    def begin(self, state: DecodeState) -> None:
        self._before = torch.full_like(state.tokens, -1)  # the token that was replaced
        self._posts = torch.zeros_like(state.step)  # passes of the block without an undecided position

    def select(self, stats: RowStats, state: BlockState) -> Tensor:
        return stats.log_odds >= self._commit

    def edit(self, stats: RowStats, state: BlockState) -> Tensor:
        where = state.sequences[:, None], state.columns
        new = state.step_in_block == 0
        before = self._before[where].masked_fill(new[:, None], -1)
        text = state.active & (state.positions >= 0)
        changed = ~state.undecided & text & (stats.token != state.tokens) & (stats.log_odds >= self._edit)
        changed &= (stats.token != before) & (stats.token >= 0)
        self._before[where] = torch.where(changed, state.tokens, before)
        post = ~state.undecided.any(1)
        posts = self._posts[state.sequences].masked_fill(new, 0) + post
        self._posts[state.sequences] = posts
        self._stays = ~post | (changed.any(1) & (posts < self.post_steps))
        return changed

    def stay(self, stats: RowStats, state: BlockState) -> Tensor:
        return self._stays

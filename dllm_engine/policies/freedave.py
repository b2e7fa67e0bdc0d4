"""FreeDave (arXiv 2510.00294): several steps of a rule in one model call, checked, with the rule's own tokens."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from dllm_engine.config import ModelFacts
from dllm_engine.policies.base import HOOKS, Policy, whole
from dllm_engine.policies.topk import TopK
from dllm_engine.rules import ranking
from dllm_engine.state import BlockState, DecodeState
from dllm_engine.stats import RowStats

_DRAFTS, _MOST_DRAFTS = 8, 64


class FreeDave(Policy):
    """Draft the next steps of a deterministic ``rule``, compute all drafts in one batch, and go as far as they hold.

    Inside a block, draft j is the canvas with the next j · quota positions filled in, in the order and with the tokens
    that the call before gave (draft 0 is the canvas itself). The rule makes its step from draft 0's statistics; if that
    gives another of the drafts, it makes the next step from that one's, and so on. Every step is made from a forward
    pass of exactly that canvas, so the tokens are those of the rule, in fewer calls; rounding differs between batch
    shapes, so ties closer than that can fall otherwise. A call costs as many rows as ``drafts`` calls; guidance is
    refused.

    Args:
        drafts: canvases a call, 2 to the block length, at most 64 (8 are taken for shorter blocks too).
        rule: any rule that decides by the statistics of one pass; one token a step by default.
    """

    name = "freedave"
    greedy = True

    def __init__(self, drafts: int = _DRAFTS, *, rule: Policy | None = None) -> None:
        self.rule_ = TopK() if rule is None else rule
        self.drafts = whole("drafts", drafts, 2)
        if not isinstance(self.rule_, Policy):
            raise TypeError(f"rule: {type(rule).__name__} given; a policies.Policy is needed")
        base = type(self.rule_)
        if self.rule_.drafts > 1 or any(getattr(base, hook) is not getattr(Policy, hook) for hook in ("begin", *HOOKS)):
            raise ValueError(f"rule: {self.rule_!r} given; one that decides by the statistics of one pass is needed")

    @property
    def reads_decided(self) -> bool:  # type: ignore[override]
        return self.rule_.reads_decided

    @property
    def ends_wait(self) -> bool:
        return self.rule_.ends_wait

    @ends_wait.setter
    def ends_wait(self, value: bool) -> None:
        self.rule_.ends_wait = value

    @property
    def of_one_batch(self) -> bool:  # type: ignore[override]
        return self.rule_.of_one_batch

    def default_steps(self, gen_length: int) -> int | None:
        return self.rule_.default_steps(gen_length)

    def check(self, model: ModelFacts, *, block_length: int, cache: str) -> FreeDave:
        # more than a block has positions gain nothing, and one request must not fill a server's memory
        most = min(max(block_length, _DRAFTS), _MOST_DRAFTS)
        if self.drafts > most:
            raise ValueError(f"drafts: {self.drafts} given; 2 to {most} allowed with block_length {block_length}")
        rule = self.rule_.check(model, block_length=block_length, cache=cache)
        if rule is None:
            return self
        made = copy.copy(self)
        made.rule_ = rule
        return made

    def begin(self, state: DecodeState) -> None:
        self._scores = torch.zeros(state.tokens.shape, dtype=torch.float32, device=state.tokens.device)

    def score(self, stats: RowStats, state: BlockState) -> Tensor:
        score = self.rule_.score(stats, state)
        self._scores[state.sequences[:, None], state.columns] = score
        return score

    def select(self, stats: RowStats, state: BlockState) -> Tensor:
        return self.rule_.select(stats, state)

    def tokens(self, stats: RowStats, state: BlockState) -> Tensor:
        return self.rule_.tokens(stats, state)

    def propose(self, state: BlockState) -> tuple[Tensor, Tensor]:
        """The drafts: tokens int64 and undecided bool, [B', drafts, S]."""
        scores = self._scores[state.sequences[:, None], state.columns]
        rank = ranking(scores, state.undecided).argsort(dim=1)[:, None]
        j = torch.arange(self.drafts, device=rank.device)[:, None]
        known = state.undecided & (state.predicted >= 0)  # nothing is, where a block begins
        filled = known[:, None] & (rank < j * state.quota[:, None, None])
        tokens = torch.where(filled, state.predicted[:, None], state.tokens[:, None])
        return tokens, state.undecided[:, None] & ~filled

"""CreditDecoding (arXiv 2510.06133): what was predicted at a position before counts for it now."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_engine.policies.base import Policy, in_range, whole
from dllm_engine.state import BlockState, DecodeState
from dllm_engine.stats import RowStats


class Credit(Policy):
    """Threshold on probabilities to which a position's history of predictions gives credit.

    At every step of a block an undecided position's credits become C ← decay · C, then C[v] += p(v)^exponent for its
    best id v; logits are raised by weight · log(1 + C), and the best raised id is committed where its probability
    reaches ``threshold``. Only ids that were a best one have credit, so with g = (1 + C)^weight

        p̃(k) = p(k) g(k) / (1 + Σ_j p(j) (g(j) − 1))

    is exact on the logits of the ``traced`` ids with most credit; more than that many ever best at one position, and
    the weakest is forgotten. Credit is given before it is used, so it lowers the threshold from the first step on:
    0.95 acts like 0.92 there. The defaults are the paper's.

    Args:
        threshold: 0 to 1. weight, decay, exponent: ≥ 0; decay at most 1. traced: 1 to 8 ids a position.
    """

    name = "credit"
    reads_decided = False
    greedy = True

    def __init__(
        self, threshold: float = 0.9, weight: float = 0.65, decay: float = 0.7, exponent: float = 0.2, traced: int = 4
    ) -> None:
        self.threshold = in_range("threshold", threshold, 0, 1)
        self.weight, self.decay = in_range("weight", weight, 0), in_range("decay", decay, 0, 1)
        self.exponent, self.traced = in_range("exponent", exponent, 0), whole("traced", traced, 1)
        if traced > 8:
            raise ValueError(f"traced: {traced} given; 1 to 8 allowed")

    def begin(self, state: DecodeState) -> None:
        shape = (*state.tokens.shape, self.traced)
        self._ids = torch.full(shape, -1, dtype=torch.int64, device=state.tokens.device)
        self._credits = torch.zeros(shape, dtype=torch.float32, device=state.tokens.device)

    def probes(self, state: BlockState) -> Tensor:
        new = (state.step_in_block == 0)[:, None, None]
        where = state.sequences[:, None], state.columns
        self._ids[where] = self._ids[where].masked_fill(new, -1)
        self._credits[where] = self._credits[where].masked_fill(new, 0.0)
        return self._ids[where].clamp_min(0)

    def score(self, stats: RowStats, state: BlockState) -> Tensor:
        """Log-odds of the best raised id; updates the credits, so it is called once a step, first."""
        where = state.sequences[:, None], state.columns
        ids, credits = self._ids[where], self._credits[where] * self.decay
        best, known = stats.token[..., None], (stats.logit - stats.logsumexp).exp()[..., None]
        held = ids == best
        weakest = torch.zeros_like(held).scatter_(-1, credits.argmin(-1, keepdim=True), True)
        place = torch.where(held.any(-1, keepdim=True), held, weakest)
        probability = (stats.probe_logits - stats.logsumexp[..., None]).exp()
        probability = torch.where(place, known, probability.masked_fill(ids < 0, 0.0))
        credits = torch.where(place, torch.where(held, credits, 0.0) + known**self.exponent, credits)
        ids = torch.where(place, best, ids)
        undecided = state.undecided[..., None]
        self._ids[where] = torch.where(undecided, ids, self._ids[where])
        self._credits[where] = torch.where(undecided, credits, self._credits[where])

        # of the mass beside the best id, which log-odds know where its probability has rounded to 1
        untraced = torch.sigmoid(-stats.log_odds) - probability.masked_fill(place, 0.0).sum(-1)
        raised = probability * (1 + credits) ** self.weight
        top, at = raised.max(-1)
        others = untraced.clamp_min(0) + raised.scatter(-1, at[..., None], 0.0).sum(-1)
        self._tokens = torch.where(stats.token < 0, -1, ids.gather(-1, at[..., None])[..., 0])
        self._odds = top / others  # infinite where nothing else is left
        return self._odds.log()

    def select(self, stats: RowStats, state: BlockState) -> Tensor:
        return self._odds.isposinf() | (self._odds >= self.threshold * (1 + self._odds))

    def tokens(self, stats: RowStats, state: BlockState) -> Tensor:
        return self._tokens

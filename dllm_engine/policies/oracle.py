"""The oracle that Learn2PD imitates (arXiv 2509.25188, "extremely greedy parallel decoding"): an upper bound."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_engine.policies.base import Policy
from dllm_engine.state import BlockState, DecodeState
from dllm_engine.stats import RowStats


class Oracle(Policy):
    """Commit exactly the predictions that equal a known answer, usually the model's own one-token-per-step decode.

    A step in which none does writes the answer's token where the model is most confident, so the result is always the
    answer and never stuck; no rule that commits only right tokens makes fewer passes of this kind.

    Args:
        answer: int64 [B, gen_length], the generated part of ``DecodeOutput.sequences``.
    """

    name = "oracle"
    reads_decided = False
    of_one_batch = True

    def __init__(self, answer: Tensor) -> None:
        if not isinstance(answer, Tensor) or answer.dtype != torch.int64:
            given = answer.dtype if isinstance(answer, Tensor) else type(answer).__name__
            raise TypeError(f"answer: {given} given; an int64 tensor [B, gen_length] is needed")
        self._answer = answer

    def begin(self, state: DecodeState) -> None:
        needed = [state.batch, state.gen_length]
        if list(self._answer.shape) != needed:
            raise ValueError(f"answer: shape {list(self._answer.shape)} given; this decode needs {needed}")
        self._answer = self._answer.to(state.tokens.device)

    def tokens(self, stats: RowStats, state: BlockState) -> Tensor:
        known = self._answer[state.sequences[:, None], state.positions.clamp(0, self._answer.shape[1] - 1)]
        return torch.where(state.positions < self._answer.shape[1], known, stats.token)

    def select(self, stats: RowStats, state: BlockState) -> Tensor:
        return stats.token == self.tokens(stats, state)

    def score(self, stats: RowStats, state: BlockState) -> Tensor:
        return torch.where(stats.token == self.tokens(stats, state), float("inf"), stats.log_odds)

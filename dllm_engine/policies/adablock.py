"""AdaBlock-dLLM (arXiv 2509.26432): blocks that end where a sentence does."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dllm_engine.config import ModelFacts
from dllm_engine.policies.base import Policy, in_range, whole
from dllm_engine.rules import least_log_odds
from dllm_engine.state import BlockState, DecodeState
from dllm_engine.stats import RowStats


class AdaBlock(Policy):
    """Threshold decoding in blocks that end at a delimiter.

    When a block begins, the most confident prediction of a delimiter is looked for in the next ``window`` · gen_length
    positions; if its confidence is at least ``delimiter_threshold``, the block ends there, else it has the block
    length of the decode. A delimiter that would make a block shorter than ``least`` is not looked at. Every call
    computes the window, which with ``"dual"`` is more than the block.

    Args:
        threshold, delimiter_threshold, window: 0 to 1.
        least: ≥ 1.
        delimiters: texts, of which the tokenizer must have at least one as a single token; or ids. Published: the
            newline, with the other two as options.
    """

    name = "adablock"
    reads_decided = False

    def __init__(
        self,
        threshold: float = 0.9,
        delimiter_threshold: float = 0.3,
        window: float = 0.25,
        least: int = 4,
        *,
        delimiters: Sequence[str | int] = ("\n", ".", ","),
    ) -> None:
        self.threshold = in_range("threshold", threshold, 0, 1)
        self.delimiter_threshold = in_range("delimiter_threshold", delimiter_threshold, 0, 1)
        self.window, self.least = in_range("window", window, 0, 1), whole("least", least, 1)
        several = isinstance(delimiters, list | tuple) and len(delimiters) > 0
        if not several or not all(isinstance(d, str | int) for d in delimiters):
            raise ValueError(f"delimiters: {delimiters!r} given; a list of texts or ids, at least one, is needed")
        self.delimiters = tuple(delimiters)
        self._ids: list[int] = []  # of the model that `check` is told
        self._bound, self._least_odds = least_log_odds(threshold), least_log_odds(delimiter_threshold)

    def check(self, model: ModelFacts, *, block_length: int, cache: str) -> AdaBlock:
        ids = [d for d in self.delimiters if isinstance(d, int)]
        for i in ids:
            if not 0 <= i < model.vocab_size:
                raise ValueError(f"delimiters: {i} given; ids 0 to {model.vocab_size - 1} allowed")
        texts = [d for d in self.delimiters if isinstance(d, str)]
        try:
            for text in texts:
                ids += _single_tokens(model.tokenizer, text)
        except FileNotFoundError as error:
            raise ValueError(f"delimiters: {self.delimiters} given; {error}") from None
        if not ids:
            raise ValueError(f"delimiters: {self.delimiters} given; the tokenizer has none of them as a single token")
        made = copy.copy(self)
        made._ids = ids
        return made

    def reach(self, block_length: int, gen_length: int) -> int:
        return max(block_length, int(self.window * gen_length))

    def begin(self, state: DecodeState) -> None:
        self._lengths = torch.full_like(state.step, state.block_length)
        self._delimiters = torch.tensor(self._ids, device=state.tokens.device)
        self._block_length = state.block_length
        self._window = int(self.window * state.gen_length)

    def block_lengths(self, stats: RowStats, state: BlockState) -> Tensor:
        offset = torch.arange(state.columns.shape[1], device=state.columns.device)
        ends = torch.isin(stats.token, self._delimiters) & state.undecided & (stats.log_odds >= self._least_odds)
        ends &= (offset >= self.least - 1) & (offset < self._window)
        odds = stats.log_odds.masked_fill(~ends, -torch.inf)
        best, at = odds.max(1)
        found = torch.where(best > -torch.inf, at + 1, self._block_length)
        found = torch.where(state.step_in_block == 0, found, self._lengths[state.sequences])
        self._lengths[state.sequences] = found
        return found

    def select(self, stats: RowStats, state: BlockState) -> Tensor:
        return stats.log_odds >= self._bound


def _single_tokens(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text that is one token: as it is encoded alone, and as it stands in the vocabulary (another, where
    the former begins a word).
    """
    coded = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = [*(coded if len(coded) == 1 else []), tokenizer.convert_tokens_to_ids(text)]
    return [int(i) for i in found if i is not None and i != tokenizer.unk_token_id]

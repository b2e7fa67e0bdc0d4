"""Telling a streamer what a decode commits: transformers' ``TextDiffusionStreamer`` protocol, or a plain callable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from dllm_engine.outputs import own
from dllm_engine.state import DecodeState


class Stream(Protocol):
    """What a decode tells: a ``step`` a call, then the ``end``."""

    def step(self, joined: list[int], where: list[list[int]]) -> None:
        """``joined`` took part in the call; ``where``: `DecodeState.progress` after it."""

    def end(self) -> None: ...


def stream_to(streamer: Any, state: DecodeState, names: list[int]) -> Stream | None:
    """The stream for a ``streamer`` argument; None for None. ``names``: what a callable knows the sequences by.

    Raises:
        TypeError: neither a callable nor an object with the three methods. ValueError: the latter with a batch.
    """
    if streamer is None:
        return None
    missing = [m for m in ("put", "put_draft", "end") if not callable(getattr(streamer, m, None))]
    if missing and callable(streamer):
        return BlockStream(streamer, state, names)
    if missing:
        raise TypeError(f"streamer: {type(streamer).__name__} has no {missing[0]}()")
    if state.batch > 1:
        raise ValueError(f"streamer: takes one sequence, the batch has {state.batch}; a callable takes any number")
    return SequenceStream(streamer, state)


def _settled(row: list[int], last: int) -> int:
    """The column up to which a sequence is final: its block's start, or the end of the text; at most ``last``."""
    start, end, *_, left = row
    return min(start if left else end, end, last)


class BlockStream:
    """Calls ``streamer(name, tokens)`` once a committed block; ``tokens`` is int64 [≤ block_length + 1] on the CPU (the
    token that ends the text may follow a block) and reaches no farther than the end of the text. Rules that decide
    blocks ahead or set their lengths have more in one call.
    """

    def __init__(self, streamer: Callable[[int, Tensor], Any], state: DecodeState, names: list[int]) -> None:
        self.streamer, self.state, self.names = streamer, state, names
        self.told = [span.first for span in state.spans]

    def restart(self, b: int) -> None:
        """A new prompt took the place of a sequence."""
        self.told[b] = self.state.spans[b].first

    def step(self, joined: list[int], where: list[list[int]]) -> None:
        for b in joined:
            told, settled = self.told[b], _settled(where[b], self.state.spans[b].last)
            if settled > told:
                self.streamer(self.names[b], own(self.state.tokens[b, told:settled], "cpu"))
                self.told[b] = settled

    def end(self) -> None:
        pass


class SequenceStream:
    """Calls ``put(prompt)``, then a ``put_draft`` a step and a ``put`` a finished block, then ``end``."""

    def __init__(self, streamer: Any, state: DecodeState) -> None:
        self.streamer, self.state, self.told = streamer, state, state.spans[0].first
        streamer.put(own(state.tokens[:, : self.told], "cpu"))

    def step(self, joined: list[int], where: list[list[int]]) -> None:
        last = self.state.spans[0].last
        settled, end = _settled(where[0], last), min(where[0][1], last)
        if settled > self.told:
            self.streamer.put(own(self.state.tokens[0, self.told : settled], "cpu"))
            self.told = settled
        if settled < end:
            self.streamer.put_draft(own(self.state.tokens[:, settled:end], "cpu"))

    def end(self) -> None:
        self.streamer.end()

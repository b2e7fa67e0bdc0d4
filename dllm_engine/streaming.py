"""Feeding a streamer (transformers' ``TextDiffusionStreamer`` protocol) from a decode of one sequence."""

from __future__ import annotations

from typing import Any

from dllm_engine.state import DecodeState


class SequenceStream:
    """Calls ``put(prompt)``, then a ``put_draft`` a step and a ``put`` a finished block, then ``end``; on None nothing.

    Raises:
        TypeError: the streamer lacks one of the three methods. ValueError: more than one sequence.
    """

    def __init__(self, streamer: Any, state: DecodeState) -> None:
        self.streamer, self.state, self.told = streamer, state, state.prompt_length
        if streamer is None:
            return
        for method in ("put", "put_draft", "end"):
            if not callable(getattr(streamer, method, None)):
                raise TypeError(f"streamer: {type(streamer).__name__} has no {method}()")
        if state.batch > 1:
            raise ValueError(f"streamer: takes one sequence, the batch has {state.batch}")
        streamer.put(state.tokens[:, : state.prompt_length].cpu())

    def step(self, where: list[int]) -> None:
        """After a step: ``where`` is the sequence's row of `DecodeState.progress`."""
        if self.streamer is None:
            return
        start, end = where[:2]
        done = min(start, end)
        if done > self.told:
            self.streamer.put(self.state.tokens[0, self.told : done].cpu())
            self.told = done
        if done < end:
            self.streamer.put_draft(self.state.tokens[:, self.told : end].cpu())

    def end(self) -> None:
        if self.streamer is not None:
            self.streamer.end()

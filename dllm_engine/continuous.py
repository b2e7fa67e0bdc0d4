"""Many prompts through few rows: a prompt is admitted whenever a row is free, and leaves when it is finished."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dllm_engine import inputs
from dllm_engine.buffers import Buffers
from dllm_engine.loop import Loop
from dllm_engine.model import LLaDA
from dllm_engine.options import Options
from dllm_engine.outputs import Generated, own
from dllm_engine.state import DecodeState
from dllm_engine.streaming import BlockStream


class Scheduler:
    """Rows that run together and begin and end each at its own time: `admit` fills one, `step` moves all on.

    Nothing here waits: whoever drives it decides between two steps what begins and what is given up.

    Attributes:
        free: rows without a sequence; the last is filled next. longest: tokens that a prompt may have.
        passes: model calls made.
    """

    def __init__(
        self,
        model: LLaDA,
        options: Options,
        buffers: Buffers,
        *,
        rows: int,
        longest: int,
        streamer: Callable[[int, Tensor], Any] | None = None,
        patience: float = math.inf,
    ) -> None:
        # Prompts end at one column and are padded on the left. Lengths of their own would free those columns, but then
        # the blocks of different prompts begin at different columns and every read and write is a gather. A call leaves
        # out the padding that all its sequences share, so a lone short prompt costs what it costs alone.
        self.model, self.options, self.longest = model, options, longest
        self.state = DecodeState(
            torch.full((rows, longest), model.fill_id, device=model.device),
            torch.zeros(rows, dtype=torch.int64, device=model.device),
            gen_length=options.gen_length,
            block_length=options.block_length,
            steps=options.steps,
            seeds=[0] * rows,
            mask_id=model.mask_id,
            fill_id=model.fill_id,
            end_ids=model.end_ids,
            buffers=buffers,
            alignment=options.alignment,
        )
        self.state.left.zero_()  # no row has work yet
        self.loop = Loop(model, self.state, options, buffers)
        self.loop.patience = patience
        self.free = list(range(rows))[::-1]
        self.names, self.seeds = [-1] * rows, [0] * rows
        self.stream = BlockStream(streamer, self.state, self.names) if streamer is not None else None
        self.joined: list[int] = []

    @property
    def passes(self) -> int:
        return self.loop.passes

    @property
    def running(self) -> int:
        """Rows that hold a sequence."""
        return self.state.batch - len(self.free)

    def admit(self, name: int, prompt: Sequence[int], seed: int, gen_length: int | None = None) -> int:
        """Begin a prompt in a free row, which is returned.

        Args:
            name: what results and blocks of it are known by.
            prompt: 1 to ``longest`` ids of the model.
            gen_length: its own; a multiple of the block length, at most the options', which it is by default. The
                tokens are those of a decode of that length, unless the rule has a `Policy.reach` of its own.
        """
        row, gen_length = self.free.pop(), gen_length or self.options.gen_length
        self.names[row], self.seeds[row] = name, seed
        self.loop.admit(row, prompt, seed, gen_length)
        if self.stream is not None:
            self.stream.restart(row)
        return row

    def step(self) -> list[Generated]:
        """One model call for the rows that need this kind of call; what it finished, whose rows are free again."""
        self.joined = self.loop.step()
        if self.stream is not None:
            self.stream.step(self.joined, self.loop.where)
        finished = [row for row in self.joined if self.loop.where[row][-1] == 0]
        self.free += finished
        return [self._generated(row) for row in finished]

    def check(self) -> None:
        """Raise RuntimeError if a row of the last step has no valid token, by the name of its prompt.

        Keys of that row are NaN, so the buffers must be zeroed before another prompt is admitted: leave the scheduler.
        """
        self.loop.check(self.joined, self._describe)

    def cancel(self, row: int) -> int:
        """Give up the sequence of a row, which is free then; the calls that it took part in."""
        self.loop.release(row)
        self.free.append(row)
        return self.loop.taken[row]

    def _describe(self, row: int, column: int) -> str:
        return f"prompt {self.names[row]} at position {column - self.state.spans[row].padding}"

    def _generated(self, row: int) -> Generated:
        padding, first, last, *_ = self.state.spans[row]
        sequence = own(self.state.tokens[row, padding:last], "cpu")  # host: it is finished
        ids = sequence[first - padding :].tolist()
        tokens = next((i for i, token in enumerate(ids) if token in self.model.end_ids), len(ids))
        return Generated(self.names[row], sequence, first - padding, self.loop.taken[row], tokens, self.seeds[row])


def generate(
    scheduler: Scheduler, prompts: Iterable[Sequence[int] | Tensor], seed_of: Callable[[int], int]
) -> Iterator[Generated]:
    """`Engine.generate_many` on checked arguments; ``seed_of``: a prompt's seed by its index, or ValueError."""
    source, failure, more = _checked(scheduler, prompts, seed_of), None, True
    while True:
        while more and scheduler.free:
            try:
                index, ids, seed = next(source)
            except StopIteration:
                more = False
            except Exception as error:  # the prompts before it are finished first
                more, failure = False, error
            else:
                scheduler.admit(index, ids, seed)
        if not scheduler.running:
            break
        yield from scheduler.step()
        scheduler.check()
    if failure is not None:
        raise failure


def _checked(
    scheduler: Scheduler, prompts: Iterable[Sequence[int] | Tensor], seed_of: Callable[[int], int]
) -> Iterator[tuple[int, list[int], int]]:
    for index, prompt in enumerate(prompts):
        yield index, inputs.check_one(scheduler.model, prompt, index, scheduler.longest), seed_of(index)

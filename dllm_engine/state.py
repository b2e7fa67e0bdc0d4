"""Where a decode stands. Explicit state: nothing is ever read off ``token == mask_id``, so a prompt may hold any id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from dllm_engine.buffers import Buffers

T = TypeVar("T", int, Tensor)


@dataclass(frozen=True)
class BlockState:
    """The sequences of one call and the rows of their blocks: what a policy sees. S is the widest block still
    active, or for rules that `reach` farther, as far as they do.

    Attributes:
        sequences: int64 [B'], batch indices. columns: int64 [B', S], canvas-absolute.
        undecided: bool [B', S], may be committed. active: bool [B', S], False from ``active_end`` on.
        positions: int64 [B', S], counted from the start of the generation; below 0 where a prompt's token stands, as
            some do in the first block of a block-causal model.
        predicted: int64 [B', S], what the last step that saw it predicted there; −1 before the first.
        quota: int64 [B'], at least this many best positions are committed (fewer if fewer are left).
        noise_keys: int64 [B', S, 3], see `noise`.
        tokens: int64 [B', S], what the canvas holds. step_in_block: int64 [B'], steps since the block began.
        left: int64 [B'], undecided columns of the whole sequence (1 where a decided block stays open).
        text_length: int64 [B'], columns of the generation before the end of the text, all until an end is known.
        end_ids: int64 [E], the model's end ids.
    """

    sequences: Tensor
    columns: Tensor
    undecided: Tensor
    active: Tensor
    positions: Tensor
    predicted: Tensor
    quota: Tensor
    noise_keys: Tensor
    tokens: Tensor
    step_in_block: Tensor
    left: Tensor
    text_length: Tensor
    end_ids: Tensor

    @property
    def progress(self) -> Tensor:
        """Share of the text that is decided, float32 [B'], 0 to 1: what is behind an end of the text does not count."""
        return (self.text_length - self.left).float() / self.text_length.float()


class Span(NamedTuple):
    """Where a sequence lies on the canvas, for the host.

    Attributes:
        padding: columns before its prompt. first, last: its generation is columns ``first`` to ``last``.
        end: of its last block; columns from ``last`` on are decoded and left out.
        whole: of the model's block that this is part of; columns from ``end`` on stay masked.
    """

    padding: int
    first: int
    last: int
    end: int
    whole: int


class DecodeState:
    """Device tensors of one decode: canvas [B, L] with L = P + gen_length, and a few values a sequence.

    Blocks begin at column P, where all prompts end. With an ``alignment`` above 1 (block-causal models), each sequence
    has blocks of so many columns from its first token on: P is a multiple of it, tokens of a prompt behind its last
    whole block are decided columns of what follows, and L has room for the rest of a block. The block length divides
    it.

    Attributes:
        spans: `Span` of every sequence.
        tokens: int64 [B, L], mask id where undecided. undecided: bool [B, L]. predicted: int64 [B, L], the
            last prediction of each column that was undecided in a call, −1 before.
        padding: int64 [B], left-padding columns. first: int64 [B], the first generated columns. ends: int64 [B],
            `Span.end`. seeds: int64 [B].
        end_ids: int64 [E].
        quota: int64 [block_length], per step of a block.
        progress: int64 [B, 6], what a step moves on and the host reads; its columns, also as attributes:
            block_start; active_end, first column after the end of the text; step_in_block, 0 exactly when a block
            begins; failed_at, first column without a valid token, L if none; step, steps made; left, undecided columns.
    """

    block_start = property(lambda self: self.progress[:, 0])
    active_end = property(lambda self: self.progress[:, 1])
    step_in_block = property(lambda self: self.progress[:, 2])
    failed_at = property(lambda self: self.progress[:, 3])
    step = property(lambda self: self.progress[:, 4])
    left = property(lambda self: self.progress[:, 5])

    padding: Tensor
    first: Tensor
    ends: Tensor
    with_idle: DecodeState  # the same rows and the idle one

    def __init__(
        self,
        prompt: Tensor,
        padding: Tensor,
        *,
        gen_length: int,
        block_length: int,
        steps: int | None,
        seeds: Sequence[int],
        mask_id: int,
        fill_id: int,
        end_ids: Sequence[int] = (),
        buffers: Buffers | None = None,
        alignment: int = 1,
    ) -> None:
        """``prompt`` int64 [B, width] and ``padding`` int64 [B]; ``buffers`` lend the canvas its memory."""
        batch, width = prompt.shape
        self.block_length, self.mask_id, self.fill_id = block_length, mask_id, fill_id
        self.alignment = alignment
        lengths = [width - pad for pad in padding.tolist()]  # host: once, before the first call
        self.prompt_length = width if alignment == 1 else max(n - n % alignment for n in lengths)
        self.batch, self.gen_length = batch, gen_length
        self.length = self.prompt_length + _up(gen_length + alignment - 1, alignment)
        self.spans = [self._span(length, gen_length) for length in lengths]
        device = prompt.device
        buffers = buffers or Buffers(device)
        rows = self.rows(buffers, batch, self.length)
        quota = buffers.take("quota", (block_length,), torch.int64)
        quota.copy_(_quota_table(gen_length, block_length, steps))
        self.with_idle = self.of(
            rows[0], rows[1], rows[2], rows[3], rows[4], quota, prompt_length=self.prompt_length, fill_id=fill_id
        )
        self.tokens, self.undecided, self.predicted, self.progress, self.seeds, self.padding = (t[:batch] for t in rows)
        self.quota, (self.first, self.ends) = quota, torch.empty(2, batch, dtype=torch.int64, device=device)
        self.end_ids = torch.tensor(end_ids, dtype=torch.int64, device=device)
        self.with_idle.padding, self.with_idle.end_ids = rows[5], self.end_ids
        self.seeds.copy_(torch.tensor(seeds, dtype=torch.int64, device="cpu"))
        self._begin(slice(None), prompt)
        self.with_idle.tokens[batch] = fill_id
        self.with_idle.undecided[batch] = False
        self.with_idle.progress[batch] = torch.tensor(self.idle, device=device)
        for row in rows[4:]:
            row[batch] = 0

    @staticmethod
    def rows(buffers: Buffers, batch: int, length: int) -> tuple[Tensor, ...]:
        """tokens, undecided, predicted, progress, seeds and padding from the engine's memory.

        There is a row more than ``batch``: the idle one, with which calls of a fixed size are filled up.
        """
        shape = batch + 1, length
        return (
            buffers.take("tokens", shape, torch.int64),
            buffers.take("undecided", shape, torch.bool),
            buffers.take("predicted", shape, torch.int64),
            buffers.take("progress", (batch + 1, 6), torch.int64),
            buffers.take("seeds", (batch + 1,), torch.int64),
            buffers.take("padding", (batch + 1,), torch.int64),
        )

    @property
    def idle(self) -> list[int]:
        """The idle row of ``progress``: a sequence that ends where it begins."""
        return [self.prompt_length, self.prompt_length, 0, self.length, 0, 0]

    def _span(self, prompt_length: int, gen_length: int) -> Span:
        first, start = self.prompt_length + prompt_length % self.alignment, self.prompt_length
        last = first + gen_length
        # without an alignment the first block, too, begins where the prompt ends
        end = start + _up(last - start, self.block_length) if self.alignment > 1 else last
        return Span(first - prompt_length, first, last, end, start + _up(last - start, self.alignment))

    def start(self, sequence: int) -> list[int]:
        """The row of ``progress`` of a sequence before its first call."""
        _, first, _, end, whole = self.spans[sequence]
        return [first - (first - self.prompt_length) % self.block_length, whole, 0, self.length, 0, end - first]

    def home(self, column: T) -> T:
        """Where the model's block that a column is in begins."""
        return column - (column - self.prompt_length) % self.alignment

    def admit(self, sequence: int, prompt: Sequence[int], seed: int, gen_length: int) -> None:
        """A new prompt takes a finished sequence's place; columns behind ``gen_length`` are not its own."""
        self.spans[sequence] = self._span(len(prompt), gen_length)
        self.seeds[sequence] = seed
        self._begin(slice(sequence, sequence + 1), torch.tensor([list(prompt)], device=self.tokens.device))

    def release(self, sequence: int) -> None:
        """The sequence takes part in no further call."""
        self.undecided[sequence] = False
        self.progress[sequence] = torch.tensor(self.idle, device=self.progress.device)

    def _begin(self, sequences: slice, prompt: Tensor) -> None:
        """Prompts, which end at the last of their columns, and the canvas behind them."""
        device, which = prompt.device, range(self.batch)[sequences]
        spans = torch.tensor([self.spans[b] for b in which], device=device)
        padding, first, _, end, whole = spans[..., None].unbind(1)
        columns = torch.arange(self.length, device=device)
        at = columns - first + prompt.shape[1]
        given = prompt.gather(1, at.clamp(0, prompt.shape[1] - 1)).where((at >= 0) & (columns < first), self.fill_id)
        open_ = (columns >= first) & (columns < end)
        self.tokens[sequences] = given.masked_fill((columns >= first) & (columns < whole), self.mask_id)
        self.undecided[sequences], self.predicted[sequences] = open_, -1
        self.padding[sequences], self.first[sequences], self.ends[sequences] = padding[:, 0], first[:, 0], end[:, 0]
        self.progress[sequences] = torch.tensor([self.start(b) for b in which], device=device)

    def sequences_of(self, prompt: Tensor) -> Tensor:
        """int64 [B, width + gen_length], the prompts as they were given and what stands behind them."""
        if self.alignment == 1:
            return self.tokens
        rows = [self.tokens[b, span.first : span.last] for b, span in enumerate(self.spans)]
        return torch.cat((prompt, torch.stack(rows)), dim=1)

    @classmethod
    def of(
        cls,
        tokens: Tensor,
        undecided: Tensor,
        predicted: Tensor,
        progress: Tensor,
        seeds: Tensor,
        quota: Tensor,
        *,
        prompt_length: int,
        fill_id: int,
    ) -> DecodeState:
        """The state that shares these tensors; it has no padding and no end ids."""
        state = cls.__new__(cls)
        state.tokens, state.undecided, state.predicted = tokens, undecided, predicted
        state.progress, state.seeds, state.quota = progress, seeds, quota
        (state.batch, state.length), state.block_length = tokens.shape, len(quota)
        state.prompt_length, state.fill_id = prompt_length, fill_id
        state.gen_length = state.length - prompt_length
        state.end_ids = tokens.new_empty(0)
        state.first, state.ends = (torch.full_like(tokens[:, 0], column) for column in (prompt_length, state.length))
        return state

    def block(self, sequences: Tensor, width: int) -> BlockState:
        """The view of a call: ``sequences`` [B'] and the first ``width`` rows of their blocks."""
        columns = self.block_start[sequences, None] + torch.arange(width, device=sequences.device)
        # Rows that reach over the canvas name the decided columns before the block, each its own: what is written back
        # there is what was there. (Clamped to the last column, they would write it at the same time as its own row.)
        rows, inside = sequences[:, None], columns < self.length
        columns = torch.where(inside, columns, columns - width)
        step_in_block = self.step_in_block[sequences]
        keys = (self.seeds[rows], columns - self.prompt_length, self.step[rows])
        return BlockState(
            sequences=sequences,
            columns=columns,
            undecided=self.undecided[rows, columns] & inside,
            active=(columns < self.active_end[rows]) & inside,
            positions=columns - self.first[rows],
            predicted=self.predicted[rows, columns],
            quota=self.quota[step_in_block.clamp_max(len(self.quota) - 1)],
            noise_keys=torch.stack(torch.broadcast_tensors(*keys), dim=-1),
            tokens=self.tokens[rows, columns],
            step_in_block=step_in_block,
            left=self.left[sequences],
            text_length=torch.minimum(self.active_end, self.ends)[sequences] - self.first[sequences],
            end_ids=self.end_ids,
        )


def _up(columns: int, size: int) -> int:
    """The next multiple of ``size``."""
    return -(-columns // size) * size


def _quota_table(gen_length: int, block_length: int, steps: int | None) -> Tensor:
    """Positions to commit at each step of a block: LLaDA's static schedule (base, remainder first), never under 1."""
    if steps is None:
        return torch.ones(block_length, dtype=torch.int64, device="cpu")
    per_block = min(steps, gen_length) * block_length // gen_length
    base, remainder = divmod(block_length, per_block)
    index = torch.arange(block_length, device="cpu")
    return base + (index < remainder).long()

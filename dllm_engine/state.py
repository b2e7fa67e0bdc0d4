"""Where a decode stands. Explicit state: nothing is ever read off ``token == mask_id``, so a prompt may hold any id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockState:
    """The sequences of one call and the rows of their blocks: what a policy sees. S is the widest block still active.

    Attributes:
        sequences: int64 [B'], batch indices. columns: int64 [B', S], canvas-absolute.
        undecided: bool [B', S], may be committed. active: bool [B', S], False from ``active_end`` on.
        quota: int64 [B'], at least this many best positions are committed (fewer if fewer are left).
        noise_keys: int64 [B', S, 3], see `noise`.
    """

    sequences: Tensor
    columns: Tensor
    undecided: Tensor
    active: Tensor
    quota: Tensor
    noise_keys: Tensor


class DecodeState:
    """Device tensors of one decode: canvas [B, L] with L = P + gen_length, and one value a sequence.

    Attributes:
        tokens: int64 [B, L], mask id where undecided. undecided: bool [B, L].
        padding: int64 [B], left-padding columns. active_end: int64 [B], first column after the end of the text.
        block_start: int64 [B]; step_in_block: int64 [B], 0 exactly when a block begins; step: int64 [B], calls made.
        failed_at: int64 [B], first column without a valid token, L if none.
    """

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
    ) -> None:
        batch, self.prompt_length = prompt.shape
        self.batch, self.length = batch, self.prompt_length + gen_length
        self.block_length, self.fill_id = block_length, fill_id
        device = prompt.device

        def per_sequence(value: int) -> Tensor:
            return torch.full((batch,), value, dtype=torch.int64, device=device)

        canvas = torch.full((batch, gen_length), mask_id, dtype=torch.int64, device=device)
        self.tokens = torch.cat((prompt, canvas), dim=1)
        self.undecided = (torch.arange(self.length, device=device) >= self.prompt_length).expand(batch, -1).clone()
        self.padding = padding
        self.active_end = per_sequence(self.length)
        self.block_start = per_sequence(self.prompt_length)
        self.step_in_block, self.step = per_sequence(0), per_sequence(0)
        self.failed_at = per_sequence(self.length)
        self.seeds = torch.tensor(seeds, dtype=torch.int64, device=device)
        self._quota = _quota_table(gen_length, block_length, steps).to(device)

    def block(self, sequences: Tensor, width: int) -> BlockState:
        """The view of a call: ``sequences`` [B'] and the first ``width`` rows of their blocks."""
        columns = self.block_start[sequences, None] + torch.arange(width, device=sequences.device)
        keys = (self.seeds[sequences, None], columns - self.prompt_length, self.step[sequences, None])
        return BlockState(
            sequences=sequences,
            columns=columns,
            undecided=self.undecided[sequences[:, None], columns],
            active=columns < self.active_end[sequences, None],
            quota=self._quota[self.step_in_block[sequences]],
            noise_keys=torch.stack(torch.broadcast_tensors(*keys), dim=-1),
        )

    def report(self) -> Tensor:
        """int64 [B, 4] for the host: block_start, active_end, step_in_block, failed_at."""
        return torch.stack((self.block_start, self.active_end, self.step_in_block, self.failed_at), dim=1)


def _quota_table(gen_length: int, block_length: int, steps: int | None) -> Tensor:
    """Positions to commit at each step of a block: LLaDA's static schedule (base, remainder first), never under 1."""
    if steps is None:
        return torch.ones(block_length, dtype=torch.int64)
    per_block = min(steps, gen_length) * block_length // gen_length
    base, remainder = divmod(block_length, per_block)
    index = torch.arange(block_length)
    return base + (index < remainder).long()

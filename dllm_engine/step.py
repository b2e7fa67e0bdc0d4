"""A decode step as a backend gets it, and how the compiled modules take tensors: pointers and sizes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in csrc/include/dllm/decode_step.h


class Step(NamedTuple):
    """A decode step as the registered op has it, checked; `ops.decode_step_` describes what it is made of."""

    hidden: Tensor
    lm_head: Tensor
    sequences: Tensor
    tokens: Tensor
    undecided: Tensor
    predicted: Tensor
    progress: Tensor
    seeds: Tensor
    quota: Tensor
    bounds: Tensor
    weights: Tensor
    stat_ids: Tensor
    stat_values: Tensor
    banned_ids: Tensor
    excluded_ids: Tensor
    end_ids: Tensor
    waiting_ids: Tensor
    prompt_length: int
    fill_id: int
    temperature: float
    filter_length: int
    cut: float
    decided_is_one: bool
    position: bool
    all_rows: bool

    def addresses(self) -> tuple[Any, ...]:
        """What both compiled modules take first, in the order of their bindings."""
        batch, width, dim = self.hidden.shape
        changed = (self.tokens, self.undecided, self.predicted, self.progress, self.seeds, self.quota)
        return (
            matrix(self.hidden),
            matrix(self.lm_head),
            dim,
            self.lm_head.shape[0],
            *(listed(ids) for ids in (self.banned_ids, self.excluded_ids, self.end_ids, self.waiting_ids)),
            self.temperature,
            batch,
            width,
            self.sequences.data_ptr(),
            tuple(t.data_ptr() for t in changed),
            (self.tokens.shape[1], self.prompt_length, len(self.quota), self.fill_id),
            (self.bounds.data_ptr(), self.weights.data_ptr(), self.filter_length, self.cut),
            (self.decided_is_one, self.position, self.all_rows),
            tuple(t.data_ptr() for t in (*self.stat_ids, *self.stat_values)),
        )


def matrix(x: Tensor) -> tuple[int, int, int]:
    """Address, type and elements from row to row."""
    return x.data_ptr(), FLOATS[x.dtype], x.stride(-2)


def listed(ids: Tensor) -> tuple[int, int]:
    """Address and number of ids."""
    return ids.data_ptr(), len(ids)

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

    def addresses(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """What both compiled modules take first: ``call`` and ``step`` of csrc/include/dllm/bindings.h."""
        batch, width, dim = self.hidden.shape
        (token, second_token), (logit, *others) = self.stat_ids, self.stat_values
        call = (
            # contiguous, which says nothing of the stride of a dimension of size 1
            (*matrix(self.hidden)[:2], dim), matrix(self.lm_head), dim, len(self.lm_head), (0, batch * width),
            listed(self.banned_ids), listed(self.excluded_ids), (0, 0), self.temperature, (0, 0),
            (*pointers(token, logit, second_token, *others), 0),
        )  # fmt: skip
        step = (
            width,
            listed(self.sequences),
            pointers(self.tokens, self.undecided, self.predicted, self.progress, self.seeds, self.quota),
            (self.tokens.shape[1], self.prompt_length, len(self.quota), self.fill_id),
            (*pointers(self.bounds, self.weights), self.filter_length, self.cut),
            (self.decided_is_one, self.position, self.all_rows),
            listed(self.end_ids),
            listed(self.waiting_ids),
        )
        return call, step


def row_call(
    hidden: Tensor, lm_head: Tensor, rows: Tensor, banned_ids: Tensor, excluded_ids: Tensor, probe_ids: Tensor,
    temperature: float, noise_keys: Tensor, fields: tuple[Tensor, ...],
) -> tuple[Any, ...]:  # fmt: skip
    """``call`` of csrc/include/dllm/bindings.h, for `row_stats` into ``fields``."""
    lists = map(listed, (rows, banned_ids, excluded_ids, probe_ids))
    matrices = matrix(hidden), matrix(lm_head), hidden.shape[-1], len(lm_head)
    return *matrices, *lists, temperature, listed(noise_keys), pointers(*fields)


def empty_fields(count: int, probe_ids: Tensor, device: torch.device) -> tuple[Tensor, ...]:
    """Fields of `RowStats` in order, to be filled in; a probed id that there is not keeps −inf."""
    types = (torch.int64, torch.float32) * 2 + (torch.float32,) * 3
    # the device is said each time: a caller may have changed torch's defaults
    probes = torch.full(probe_ids.shape, -torch.inf, dtype=torch.float32, device=device)
    return *(torch.empty(count, dtype=dtype, device=device) for dtype in types), probes


def matrix(x: Tensor) -> tuple[int, int, int]:
    """Address, type and elements from row to row."""
    return x.data_ptr(), FLOATS[x.dtype], x.stride(-2)


def listed(ids: Tensor) -> tuple[int, int]:
    """Address and number of ids (in a row, if there are several)."""
    return ids.data_ptr(), ids.shape[-1]


def pointers(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(t.data_ptr() for t in tensors)

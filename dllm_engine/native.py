"""The one place where pointers leave Python for `_cpu`. Arguments have been checked by `ops`."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_engine.step import Step, empty_fields, row_call

MISSING = ""  # why there is no `_cpu`
try:
    import dllm_engine._cpu as _cpu  # type: ignore[import-not-found]
except ImportError as error:  # a checkout without `pip install -e .`
    MISSING = (
        f"the compiled module _cpu is missing ({error}): no C++ compiler was found when dllm-engine was installed, or"
        " DLLM_CPU=0 was set; with one on the PATH, install again (`pip install -e .` in a checkout)"
    )

ISAS = {"auto": 0, "scalar": 1, "avx2": 2}


def row_stats(
    hidden: Tensor,
    lm_head: Tensor,
    rows: Tensor,
    banned_ids: Tensor,
    excluded_ids: Tensor,
    probe_ids: Tensor,
    temperature: float,
    noise_keys: Tensor,
    isa: str = "auto",
) -> tuple[Tensor, ...]:
    """Fields of `RowStats` in order, from C++ threads (``torch.get_num_threads()`` of them at most)."""
    fields = empty_fields(len(rows), probe_ids, rows.device)
    if len(rows):
        call = row_call(hidden, lm_head, rows, banned_ids, excluded_ids, probe_ids, temperature, noise_keys, fields)
        threads, scratch = _scratch(lm_head, len(rows))
        _cpu.row_stats(call, threads, ISAS[isa], scratch.data_ptr())
    return fields


def decode_step_(step: Step, isa: str = "auto") -> None:
    """Score, decide and commit."""
    threads, scratch = _scratch(step.lm_head, step.hidden.shape[:2].numel())
    _cpu.decode_step(*step.addresses(), threads, ISAS[isa], scratch.data_ptr())


def _scratch(lm_head: Tensor, count: int) -> tuple[int, Tensor]:
    """Threads of a call, and the memory that it needs with so many."""
    (vocab, dim), threads = lm_head.shape, torch.get_num_threads()
    size = _cpu.scratch_bytes(dim, vocab, count, threads)
    return threads, torch.empty(size, dtype=torch.uint8, device=lm_head.device)


def has_avx2() -> bool:
    """Whether this build and CPU run the AVX2 kernel."""
    return not MISSING and bool(_cpu.has_avx2())

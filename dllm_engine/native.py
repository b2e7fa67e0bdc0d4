"""The one place where pointers leave Python for `_cpu`. Arguments have been checked by `ops`."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_engine.step import Step, matrix

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
    count, device = rows.shape[0], rows.device  # said each time: a caller may have changed torch's defaults
    token, second_token = (torch.empty(count, dtype=torch.int64, device=device) for _ in range(2))
    logit, second_logit, logsumexp, log_odds, entropy = (
        torch.empty(count, dtype=torch.float32, device=device) for _ in range(5)
    )
    probes = torch.full(probe_ids.shape, -torch.inf, dtype=torch.float32, device=device)  # of ids that there are not
    if count:
        threads = torch.get_num_threads()
        size = _cpu.scratch_bytes(hidden.shape[1], lm_head.shape[0], count, threads)
        scratch = torch.empty(size + 63, dtype=torch.uint8, device=device)
        outputs = (token, second_token, logit, second_logit, logsumexp, log_odds, entropy, probes)
        _cpu.row_stats(
            matrix(hidden),
            matrix(lm_head),
            hidden.shape[1],
            lm_head.shape[0],
            rows.data_ptr(),
            count,
            banned_ids.data_ptr(),
            len(banned_ids),
            excluded_ids.data_ptr(),
            len(excluded_ids),
            probe_ids.data_ptr(),
            probe_ids.shape[1],
            temperature,
            noise_keys.data_ptr(),
            tuple(t.data_ptr() for t in outputs),
            threads,
            ISAS[isa],
            -(-scratch.data_ptr() // 64) * 64,
        )
    return token, logit, second_token, second_logit, logsumexp, log_odds, entropy, probes


def decode_step_(step: Step, isa: str = "auto") -> None:
    """Score, decide and commit."""
    batch, width, dim = step.hidden.shape
    threads = torch.get_num_threads()
    size = _cpu.scratch_bytes(dim, step.lm_head.shape[0], batch * width, threads)
    scratch = torch.empty(size + 63, dtype=torch.uint8, device=step.hidden.device)
    _cpu.decode_step(*step.addresses(), threads, ISAS[isa], -(-scratch.data_ptr() // 64) * 64)


def has_avx2() -> bool:
    """Whether this build and CPU run the AVX2 kernel."""
    return not MISSING and bool(_cpu.has_avx2())


def scratch_bytes(dim: int, vocab: int, count: int, threads: int) -> int:
    """Bytes of scratch that `row_stats` takes for these sizes."""
    return int(_cpu.scratch_bytes(dim, vocab, count, threads))

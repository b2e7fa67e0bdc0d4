"""Shapes, data and backends of the kernel tests and benchmarks, and the float64 truth that they are held against."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dllm_engine import backends, native
from dllm_engine.backends import BACKENDS, Backend
from dllm_engine.stats import RowStats

SHAPES = [(64, 127), (128, 4096), (512, 32003), (4096, 126464)]  # (D, V)
ROWS = [0, 1, 3, 32, 257]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
PTX = int(os.environ.get("DLLM_TEST_PTX", "0"))  # 80, 90: Triton's kernels compiled for sm_80, sm_90, see `ptx`
SLOWLY = INTERPRETED or PTX > 0  # Triton's kernels run on CPU tensors

# Instruction sets that `cpu` would not choose here are backends of their own to the tests.
ISAS = {
    f"cpu-{isa}": Backend(
        native.MISSING, ("cpu",), partial(native.row_stats, isa=isa), partial(native.decode_step_, isa=isa)
    )
    for isa in ("scalar", "avx2")
}


@contextmanager
def all_isas() -> Iterator[None]:
    BACKENDS.update(ISAS)
    try:
        yield
    finally:
        for name in ISAS:
            del BACKENDS[name]


def backend_params() -> list[Any]:
    """(backend, device) of every kernel that this process tests: where Triton's run on the CPU, these alone."""
    if SLOWLY:
        return [("triton", "cpu"), *([("cuda", "cpu")] if PTX == 80 else [])]
    gpu = [
        pytest.param((name, "cuda"), marks=[pytest.mark.gpu], id=f"{name}-cuda")
        for name in ("eager", "triton", "cuda")
        if name in BACKENDS
    ]
    avx2 = [("cpu-avx2", "cpu")] if native.has_avx2() else []
    return [("eager", "cpu"), ("cpu", "cpu"), ("cpu-scalar", "cpu"), *avx2, *gpu]


def skip_unsupported(backend: str, hidden: Tensor, head: Tensor) -> None:
    reason = backends.BACKENDS[backend].refuses(hidden, head)
    if reason:
        pytest.skip(reason)


def matrices(
    rows: int, dim: int, vocab: int, dtype: torch.dtype, peak: float = 1.0, seed: int = 0, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """hidden [rows, dim] and head [vocab, dim]: standard normal, logits with standard deviation ``peak``."""
    source = device if vocab * dim > 2**24 else "cpu"  # the same everywhere, but for what takes a CPU seconds
    generator = torch.Generator(source).manual_seed(seed)
    hidden = torch.randn(max(rows, 1), dim, generator=generator, device=source)
    head = torch.randn(vocab, dim, generator=generator, device=source) * (peak / dim**0.5)
    return hidden.to(device, dtype), head.to(device, dtype)


def truth(
    hidden: Tensor, head: Tensor, rows: Tensor, banned: tuple[int, ...] = (), excluded: tuple[int, ...] = ()
) -> dict[str, np.ndarray]:
    """Statistics in float64 numpy from the rounded inputs; shares no code with the package. Fields [R]."""
    if hidden.device.type == "cpu":
        x = hidden.double().numpy()[rows.numpy()] @ head.double().numpy().T
    else:  # a product of large shapes would take the CPU minutes
        some = hidden[rows.long()].double()
        x = torch.cat([some @ part.double().T for part in head.split(16384)], 1).cpu().numpy()
    allowed = x.copy()
    allowed[:, list(banned)] = -np.inf
    token = allowed.argmax(1)
    at = np.arange(len(x))
    logit = x[at, token]
    others = allowed.copy()
    others[at, token] = -np.inf
    second = others.argmax(1)
    normal = x.copy()
    normal[:, list(excluded)] = -np.inf
    top = normal.max(1)
    e = np.exp(normal - top[:, None])
    p = e / e.sum(1, keepdims=True)
    rest = normal.copy()
    rest[at, token] = -np.inf
    highest = rest.max(1)
    with np.errstate(divide="ignore"):
        log_rest = highest + np.log(np.exp(rest - highest[:, None]).sum(1))
        entropy = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(1)
    return {
        "logits": x, "token": token, "second_token": second, "logit": logit, "second_logit": others.max(1),
        "logsumexp": top + np.log(e.sum(1)), "entropy": entropy,
        "log_odds": np.where(normal[at, token] == -np.inf, -np.inf, logit - log_rest),
    }  # fmt: skip


FLOATS = ("logit", "second_logit", "logsumexp", "log_odds", "entropy")


def compare(stats: RowStats, expected: dict[str, np.ndarray]) -> dict[str, float]:
    """Assert that ``stats`` fit the truth within the bound of DESIGN 5; the largest error of each field.

    An id may differ only where the two best logits are closer than rounding; at most a hundredth of the rows may.
    """
    x = expected["logits"]
    bound = 1e-4 * (1 + np.abs(x).max(1, initial=0))
    got = {name: getattr(stats, name).double().cpu().numpy() for name in FLOATS}
    with np.errstate(invalid="ignore"):
        errors = {
            name: np.where(got[name] == expected[name], 0.0, np.abs(got[name] - expected[name])) for name in FLOATS
        }
    for name in FLOATS:
        assert (errors[name] <= bound).all(), f"{name}: error {errors[name].max()}, allowed {bound.min()}"
    excused = 0
    for name, logit in (("token", "logit"), ("second_token", "second_logit")):
        ids = getattr(stats, name).cpu().numpy()
        for r in np.flatnonzero(ids != expected[name]):
            gap = expected[logit][r] - x[r, ids[r]]
            assert abs(gap) <= 1e-5 * (1 + np.abs(x[r]).max()), (
                f"{name} of row {r}: {ids[r]}, {expected[name][r]} is best"
            )
            excused += 1
    assert excused <= len(x) // 100
    return {name: float(error.max(initial=0)) for name, error in errors.items()}


def run_tests(*arguments: str, **environment: str) -> None:
    """Other tests in a process of their own, where how Triton's kernels run is chosen before it is imported."""
    options = ["-x", "-o", "addopts=--import-mode=importlib", "-W", "ignore", "-m", "not slow and not gpu"]
    command = [sys.executable, "-m", "pytest", *options, *arguments]
    root = Path(__file__).parent.parent
    done = subprocess.run(
        command, cwd=root, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout

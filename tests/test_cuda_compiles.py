"""The CUDA kernel compiles for GPUs that are not here without spilling registers, and its module builds and imports."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(NVCC is None, reason="no nvcc on the PATH nor in /usr/local/cuda")]

KERNELS = 4  # bfloat16 and float16, tiles of 32 and of 64 rows
# registers of a thread that let two blocks share a processor (65,536): 128 threads with 32 rows, 256 with 64
MOST = {32: 160, 64: 128}


@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
def test_no_spills(target: str, tmp_path: Path) -> None:
    virtual = target.replace("sm_", "compute_")
    command = [str(NVCC), "-O3", "-std=c++17", "-gencode", f"arch={virtual},code={target}", "-Xptxas", "-v", "-cubin"]
    source = ROOT / "csrc/cuda/decode_step.cu"
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "kernel.cubin"), str(source)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    report = done.stdout + done.stderr
    assert "warning" not in report
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert spills == [("0", "0", "0")] * KERNELS, report
    rows = [int(n) for n in re.findall(r"Compiling entry function '\w*decode_step_kernel\w*?Li(\d+)E", report)]
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    assert sorted(rows) == [32, 32, 64, 64]
    for tile, used in zip(rows, registers, strict=True):
        assert 64 <= used <= MOST[tile], report


def test_module_builds_and_imports_without_a_gpu(tmp_path: Path) -> None:
    """With all default targets, PTX among them, in a copy of the sources."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("csrc", "dllm_engine"):
        ignored = shutil.ignore_patterns("*.so", "demo_model", "__pycache__")
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    (copy / "kernels").mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "DLLM_CUDA_ARCHS"} | {"DLLM_CUDA": "1"}
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(build, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (module,) = (copy / "dllm_engine").glob("_cuda.*")
    script = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("_cuda", {str(module)!r})
cuda = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cuda)
tickets, size = cuda.workspace(126464, 32)
assert tickets == 1 + 16 + 1, tickets  # 494 segments: 16 groups of 32, then one
assert 1e5 < size < 1e6, size
try:  # float32 is refused before anything is launched
    call = (16, 0, 8), (16, 0, 8), 8, 1, (0, 1), (0, 0), (0, 0), (0, 0), 0.0, (0, 0), (0,) * 8
    cuda.row_stats(call, 1, (0, 0, 0))
except RuntimeError as error:
    assert str(error).startswith("row_stats: "), error
else:
    raise AssertionError("no error")
"""
    subprocess.run([sys.executable, "-c", script], check=True)

"""Timing and provenance that the benchmarks share."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import dllm_engine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(os.environ.get("DLLM_RESULTS", ROOT / "benchmarks" / "results"))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()}, {torch.get_num_threads()} threads"
    return f"{platform.processor()}, {torch.get_num_threads()} threads"


def provenance(device: torch.device) -> dict[str, Any]:
    """What a figure needs to be believed: when, which code, where."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (FileNotFoundError, subprocess.CalledProcessError):  # a copy of the files alone
        commit = os.environ.get("DLLM_COMMIT", "unknown")
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit,
        "dllm_engine": dllm_engine.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device_name(device),
        "command": "python " + " ".join([f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }


def append(rows: Sequence[dict[str, Any]], device: torch.device) -> Path:
    """Add rows with their provenance to ``benchmarks/results/<device>.jsonl``."""
    name = device_name(device).split(",")[0].replace(" ", "_").replace("/", "_").replace("(R)", "")
    file = RESULTS / f"{name}.jsonl"
    RESULTS.mkdir(parents=True, exist_ok=True)
    about = provenance(device)
    with file.open("a", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(row | about) + "\n")
    return file


def once(run: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    began = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - began


def interleaved(
    contenders: dict[str, Callable[[], Any]], device: torch.device, seconds: float, least: int = 5
) -> dict[str, list[float]]:
    """Seconds of every call, the contenders taking turns, so that a busy machine slows all of them alike.

    On a GPU each turn repeats the call until it takes about 10 ms, and gives the mean.
    """
    loops = {}
    for name, run in contenders.items():
        for i in range(1 if device.type == "cpu" else 3):  # compiles, then captures, then replays
            if once(run, device) > 0.5 and i > 0:
                break
        loops[name] = max(1, round(10e-3 / max(once(run, device), 1e-6))) if device.type == "cuda" else 1
    times: dict[str, list[float]] = {name: [] for name in contenders}
    began = time.perf_counter()
    while len(next(iter(times.values()))) < least or time.perf_counter() - began < seconds:
        for name, run in contenders.items():
            count = loops[name]

            def repeated(run: Callable[[], Any] = run, count: int = count) -> None:
                for _ in range(count):
                    run()

            times[name].append(once(repeated, device) / count)
    return times


def side_by_side(function: Callable[..., Any], *arguments: Sequence[Any]) -> list[Any]:
    """What a function of a script gives for each of the arguments, in processes of their own: to compile kernels."""
    workers = min(12, max(1, (os.cpu_count() or 2) - 2))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(function, *arguments))


def failure(run: Callable[[], Any]) -> str:
    """What a call raises, or says itself to be wrong; "" if it goes through: the others are to be timed in any case."""
    try:
        found = run()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return found if isinstance(found, str) else ""


def graphed(run: Callable[[], Any]) -> Callable[[], None]:
    """The call as a CUDA graph, as an engine makes it: what the host takes to launch its kernels is not timed."""
    before, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles
            run()
    before.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        # a stream of its own: cuBLAS's workspace of a stream may go with the first of its graphs
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            run()
    except RuntimeError as error:
        torch.cuda.set_stream(before)  # a capture that cannot be ended leaves its own as the current one
        print(f"not captured, timed with its launches: {error}")
        return run
    return graph.replay


def ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Median of the paired ratios of two contenders' turns."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def peak_memory(run: Callable[[], Any], device: torch.device) -> float:
    """Bytes that a call holds at most beyond what was there before; NaN where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    status, refs = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        refs.write_text("5")  # resets the high-water mark of resident memory
    except OSError:
        return float("nan")

    def kib(key: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(key))

    before = kib("VmRSS")
    run()
    return (kib("VmHWM") - before) * 1024.0


def fma_rate(threads: int) -> float:
    """FLOP/s of a register loop on ``threads`` threads; NaN without a C++ compiler or AVX2."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None or platform.machine() != "x86_64":
        return float("nan")
    with tempfile.TemporaryDirectory() as directory:
        library = Path(directory) / "fma.so"
        flags = ["-O3", "-mavx2", "-mfma", "-shared", "-fPIC", "-pthread"]
        subprocess.run([compiler, *flags, str(ROOT / "benchmarks" / "fma.cpp"), "-o", str(library)], check=True)
        run = ctypes.CDLL(str(library)).run_fma
    run.restype, run.argtypes = ctypes.c_double, [ctypes.c_int, ctypes.c_long, ctypes.c_void_p]
    sink = (ctypes.c_float * threads)()
    run(threads, 1_000_000, sink)
    best = 0.0
    for _ in range(5):
        began = time.perf_counter()
        work = run(threads, 10_000_000, sink)
        best = max(best, work / (time.perf_counter() - began))
    return best


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second: a sum over 1 GiB on a CPU, a device-to-device copy (read and written bytes) on a GPU."""
    data = torch.rand(2**28, dtype=torch.float32, device=device)
    if device.type == "cuda":
        other = torch.empty_like(data)
        times = [once(lambda: [other.copy_(data) for _ in range(10)], device) / 10 for _ in range(5)]
        return 2 * data.nbytes / min(times)
    return data.nbytes / min(once(data.sum, device) for _ in range(5))


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product of 8192 (a GPU's roof)."""
    a = torch.randn(8192, 8192, dtype=dtype, device=device)
    out = torch.empty_like(a)
    times = [once(lambda: [torch.mm(a, a, out=out) for _ in range(5)], device) / 5 for _ in range(5)]
    return 2 * 8192**3 / min(times)

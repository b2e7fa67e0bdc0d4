"""Everything that needs a GPU, in one command: ``make gpu``, or ``python benchmarks/gpu.py``.

Lists what the machine lacks, installs the package with `_cuda` for the card found into ``build/gpu``, runs the tests
marked ``gpu``, compute-sanitizer on the smallest cases, the benchmarks, and ncu on the kernels. A call ends after
``--seconds``, whatever is left; ``--only`` picks steps, so that two calls do everything. ``--output`` keeps what is
printed, and the figures as they come. ``--dry-run`` goes to the first GPU call; what it built, for sm_80 and sm_90a,
``--built`` takes as it is, on any machine with the same Python. Without a repository the figures' commit is
``DLLM_COMMIT``.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "build" / "gpu"
NEEDED = (
    "torch",
    "triton",
    "numpy",
    "safetensors",
    "rich",
    "tqdm",
    "pytest",
    "hypothesis",
    "pybind11",
    "ninja",
    "setuptools",
)


class Step(NamedTuple):
    """``limit``: seconds after which it is stopped, so that one that hangs does not take the others' time."""

    name: str
    command: list[str]
    limit: float


BENCHMARKS = (  # in the order of what is lost if time runs out
    ("decode_step", ["decode_step.py", "--seconds", "2"], 150),
    ("block_step", ["block_step.py", "--seconds", "1", "--batches", "1", "2", "4", "16", "32"], 100),
    ("products", ["products.py", "--sweep", "--seconds", "1"], 100),
    ("tiles", ["tiles.py", "--milliseconds", "25", "--rows", "8", "32", "64", "1024"], 100),
    ("end_to_end", ["end_to_end.py", "--case", "8b", "--turns", "3"], 100),
    ("block_attention", ["block_attention.py", "--seconds", "1"], 60),
    ("scaling", ["scaling.py", "--seconds", "1", "--gen-lengths", "64", "128", "256"], 120),
)
KERNELS = "row_stats decode_step block_attention layer_kernels products fused_layer gpu"
TESTS = [f"test_{name}" for name in KERNELS.split()]
CHECKS = ("tests", "memcheck", "racecheck")  # nothing is timed in them: they run side by side
STEPS = (*CHECKS, *(name for name, _, _ in BENCHMARKS), "counters")
# what a kernel waits for, and how much of each unit's time it uses
SECTIONS = (
    "SpeedOfLight MemoryWorkloadAnalysis ComputeWorkloadAnalysis SchedulerStats WarpStateStats LaunchStats".split()
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="build and collect; stop before the first GPU call")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=STEPS, metavar="STEP", help=", ".join(STEPS))
    parser.add_argument("--seconds", type=float, default=540, metavar="S", help="in all (%(default)s)")
    parser.add_argument("--built", action="store_true", help="take what is in build/gpu")
    parser.add_argument("--output", type=Path, metavar="DIR", help="for gpu.log and the results (benchmarks/results)")
    args = parser.parse_args()
    log = None
    began = time.monotonic()
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    sanitizer, nvcc, ncu = map(program, ("compute-sanitizer", "nvcc", "ncu"))
    print(f"python {sys.version.split()[0]}; missing modules: {', '.join(missing) or 'none'}")
    print(f"nvcc: {nvcc or 'missing: the cuda backend is left out'}")
    print(f"compute-sanitizer: {sanitizer or 'missing: its checks are left out'}")
    print(f"ncu: {ncu or 'missing: its counters are left out'}")
    if missing:
        sys.exit(f"install first: {' '.join(missing)}")

    # PYTHONSAFEPATH: not the checkout's dllm_engine; then scripts do not see their own directory either
    path = os.pathsep.join(map(str, (SITE, ROOT / "tests", ROOT / "benchmarks")))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    for name in ("DLLM_BACKEND", "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"):  # images may set the last
        environment.pop(name, None)
    environment["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        log = args.output / "gpu.log"
        environment["DLLM_RESULTS"] = str(args.output.resolve())

    def run(title: str, command: list[str], limit: float = args.seconds, label: str = "", **extra: str) -> int:
        left = min(limit, args.seconds - (time.monotonic() - began))
        print(f"\n== {title} ({left:.0f} s left)", flush=True)
        if left <= 0:
            print("left out: no time")
            return 1
        return watched(command, left, environment | extra, log, label)

    heed_interrupts()
    python = sys.executable
    archs = "sm_80 sm_90a compute_90" if args.dry_run else card()
    install = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--upgrade"]
    install += ["--target", str(SITE), str(ROOT)]
    for cuda in ("1", "0") if nvcc else ("0",):  # without `_cuda` the rest can still be looked at
        if args.built or not run(f"build, DLLM_CUDA={cuda}", install, DLLM_CUDA=cuda, DLLM_CUDA_ARCHS=archs):
            break
    else:
        sys.exit("the build failed")
    pytest = [
        python,
        "-m",
        "pytest",
        "-o",
        "addopts=--import-mode=importlib --strict-markers",
        "-p",
        "no:cacheprovider",
        "--tb=short",
    ]
    chosen = ["-m", "gpu", *(f"tests/{name}.py" for name in TESTS)]
    if args.dry_run:
        failed = run("collect the gpu tests", [*pytest, "--collect-only", "-q", *chosen])
        for script in ("counters.py", *(script for _, (script, *_), _ in BENCHMARKS)):
            failed |= run(f"import {script}", [python, "-c", f"import {Path(script).stem}"])
        print("dry run: the next step would use the GPU")
        sys.exit(failed)

    wanted = [step for step in steps(python, pytest, chosen, sanitizer, ncu) if step.name in args.only]
    if not wanted:
        sys.exit("nothing to run")
    checks = [step for step in wanted if step.name in CHECKS]
    with ThreadPoolExecutor(len(CHECKS)) as pool:
        codes = list(pool.map(lambda s: run(s.name, s.command, s.limit, label=f"{s.name}: "), checks))
    failures = [step.name for step, code in zip(checks, codes, strict=True) if code]
    failures += [step.name for step in wanted if step not in checks and run(*step)]
    print(f"\n{'failed: ' + ', '.join(failures) if failures else 'all passed'}; {time.monotonic() - began:.0f} s")
    sys.exit(bool(failures))


def heed_interrupts() -> None:
    """What was begun in the background ignores them, and its children would inherit that."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def watched(
    command: list[str], seconds: float, environment: Mapping[str, str], log: Path | None, label: str = ""
) -> int:
    """Run a command, print what it prints, ``label`` before each line, and add it to the log; its exit status, 1 if it
    was stopped in time.
    """
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        start_new_session=True,
        text=True,
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    show = threading.Thread(target=tee, args=(child.stdout, log, label), daemon=True)
    show.start()
    try:
        code = child.wait(seconds)
    except subprocess.TimeoutExpired:
        print(f"{label}stopped: no time", flush=True)
        os.killpg(child.pid, signal.SIGINT)  # pytest then tells what it knows
        code = 1
        try:
            child.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
    show.join(5)
    return code


def tee(lines: Iterable[str], log: Path | None, label: str) -> None:
    """Print lines as they come, and add them to the log."""
    for line in lines:
        line = label + line
        print(line, end="", flush=True)
        if log is not None:
            with log.open("a", encoding="utf-8") as out:
                out.write(line)


def steps(python: str, pytest: list[str], chosen: list[str], sanitizer: str | None, ncu: str | None) -> list[Step]:
    # most of their time goes to compiling hundreds of kernels, each on one core
    workers = ["-n", str(min(16, os.cpu_count() or 1)), "--dist", "worksteal"]
    together = workers if importlib.util.find_spec("xdist") is not None else []
    threads = ["env", "OMP_NUM_THREADS=2"]  # not the machine's in each worker
    found = [Step("tests", [*threads, *pytest, *together, "-v", "-rfE", *chosen], 300)]  # named as they fail
    if sanitizer:
        cases = "cuda-cuda and (ties or strides or (committed and (threshold or position)))"
        smallest = ["-m", "gpu", "tests/test_row_stats.py", "tests/test_decode_step.py", "-k", cases]
        # Calls that torch's libraries make in vain are no faults of a kernel. Each tensor is an allocation of its own:
        # within a larger one nothing is out of bounds.
        memcheck = ["--tool", "memcheck", "--report-api-errors", "no"]
        for tool, before in ((memcheck, ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"]), (["--tool", "racecheck"], [])):
            chosen_kernels = ["--error-exitcode", "9", "--kernel-name", "kernel_substring=decode_step"]
            found.append(Step(tool[1], [*before, sanitizer, *tool, *chosen_kernels, *pytest, "-q", *smallest], 90))
    for name, (script, *arguments), limit in BENCHMARKS:
        found.append(Step(name, [python, f"benchmarks/{script}", *arguments], limit))
    if ncu:
        counts = ["--clock-control", "none", "--profile-from-start", "off"]
        counts += ["--kernel-name", "regex:_score_rows|decode_step_kernel|_attend|_multiply"]
        counts += [part for section in SECTIONS for part in ("--section", section)]
        found.append(Step("counters", [ncu, *counts, python, "benchmarks/counters.py"], 100))
    return found


def program(name: str) -> str | None:
    """Of the CUDA toolkit, also where its directory is in no PATH."""
    return shutil.which(name) or shutil.which(f"/usr/local/cuda/bin/{name}")


def card() -> str:
    """nvcc target of the card found."""
    import torch

    if not torch.cuda.is_available():
        sys.exit("no CUDA device: torch.cuda.is_available() is False")
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}{'a' if major == 9 else ''}"


if __name__ == "__main__":
    main()

"""Everything that needs a GPU, in one command: ``make gpu``, or ``python benchmarks/gpu.py``.

Lists what the machine lacks, installs the package with `_cuda` for the card found into ``build/gpu``, runs the tests
marked ``gpu``, compute-sanitizer on the smallest cases, then the benchmarks. A call ends after nine minutes, whatever
is left; ``--only`` picks steps, so that several calls do everything. ``--dry-run`` goes to the first GPU call.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
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
DEADLINE = 9 * 60  # seconds, all in all


class Step(NamedTuple):
    """``limit``: seconds after which it is stopped, so that one that hangs does not take the others' time."""

    name: str
    command: list[str]
    limit: float


BENCHMARKS = (  # in the order of what is lost if time runs out
    ("decode_step", ["decode_step.py", "--seconds", "2"], 120),
    ("block_step", ["block_step.py", "--seconds", "1"], 75),
    ("block_attention", ["block_attention.py", "--seconds", "1"], 60),
    ("end_to_end", ["end_to_end.py", "--case", "8b", "--turns", "3"], 75),
    ("scaling", ["scaling.py", "--seconds", "1"], 90),
)
STEPS = ("tests", "memcheck", "racecheck", *(name for name, _, _ in BENCHMARKS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="build and collect; stop before the first GPU call")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=STEPS, metavar="STEP", help=", ".join(STEPS))
    args = parser.parse_args()
    began = time.monotonic()
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    print(f"python {sys.version.split()[0]}; missing modules: {', '.join(missing) or 'none'}")
    print(f"nvcc: {nvcc or 'missing: the cuda backend is left out'}")
    print(f"compute-sanitizer: {sanitizer or 'missing: its checks are left out'}")
    if missing:
        sys.exit(f"install first: {' '.join(missing)}")

    # PYTHONSAFEPATH: not the checkout's dllm_engine; then scripts do not see their own directory either
    path = os.pathsep.join(map(str, (SITE, ROOT / "tests", ROOT / "benchmarks")))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    environment.pop("DLLM_BACKEND", None)

    def run(title: str, command: list[str], limit: float = DEADLINE, **extra: str) -> int:
        left = min(limit, DEADLINE - (time.monotonic() - began))
        print(f"\n== {title} ({left:.0f} s left)", flush=True)
        if left <= 0:
            print("left out: no time")
            return 1
        try:
            return subprocess.run(command, cwd=ROOT, env=environment | extra, timeout=left, check=False).returncode
        except subprocess.TimeoutExpired:
            print("stopped: no time")
            return 1

    python = sys.executable
    cuda = "1" if nvcc else "0"
    archs = "sm_80 sm_90a compute_90" if args.dry_run else card()
    install = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--upgrade"]
    if run("build", [*install, "--target", str(SITE), str(ROOT)], DLLM_CUDA=cuda, DLLM_CUDA_ARCHS=archs):
        sys.exit("the build failed")
    pytest = [
        python,
        "-m",
        "pytest",
        "-o",
        "addopts=--import-mode=importlib --strict-markers",
        "-p",
        "no:cacheprovider",
    ]
    chosen = ["-m", "gpu", "tests/test_decode_step.py", "tests/test_block_attention.py", "tests/test_gpu.py"]
    if args.dry_run:
        failed = run("collect the gpu tests", [*pytest, "--collect-only", "-q", *chosen])
        for _, (script, *_), _ in BENCHMARKS:
            failed |= run(f"import {script}", [python, "-c", f"import {Path(script).stem}"])
        print("dry run: the next step would use the GPU")
        sys.exit(failed)

    wanted = [step for step in steps(python, pytest, chosen, sanitizer) if step.name in args.only]
    if not wanted:
        sys.exit("nothing to run")
    failures = [step.name for step in wanted if run(*step)]
    print(f"\n{'failed: ' + ', '.join(failures) if failures else 'all passed'}; {time.monotonic() - began:.0f} s")
    sys.exit(bool(failures))


def steps(python: str, pytest: list[str], chosen: list[str], sanitizer: str | None) -> list[Step]:
    found = [Step("tests", [*pytest, "-q", *chosen], 150)]
    if sanitizer:
        smallest = ["-m", "gpu", "tests/test_decode_step.py", "-k", "cuda-cuda and (ties or committed or strides)"]
        for tool in ("memcheck", "racecheck"):
            command = [
                sanitizer,
                "--tool",
                tool,
                "--error-exitcode",
                "9",
                "--kernel-name",
                "kernel_substring=decode_step",
            ]
            found.append(Step(tool, [*command, *pytest, "-q", *smallest], 75))
    for name, (script, *arguments), limit in BENCHMARKS:
        found.append(Step(name, [python, f"benchmarks/{script}", *arguments], limit))
    return found


def card() -> str:
    """nvcc target of the card found."""
    import torch

    if not torch.cuda.is_available():
        sys.exit("no CUDA device: torch.cuda.is_available() is False")
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}{'a' if major == 9 else ''}"


if __name__ == "__main__":
    main()

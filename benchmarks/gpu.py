"""Everything that needs a GPU, in one command: ``make gpu``, or ``python benchmarks/gpu.py``.

Lists what the machine lacks, installs the package with `_cuda` for the card found into ``build/gpu``, runs the tests
marked ``gpu``, compute-sanitizer on the smallest cases, then the benchmarks. ``--dry-run`` goes to the first GPU call.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="build and collect; stop before the first GPU call")
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

    environment = os.environ | {"PYTHONPATH": f"{SITE}{os.pathsep}{ROOT / 'tests'}", "PYTHONSAFEPATH": "1"}
    environment.pop("DLLM_BACKEND", None)

    def run(title: str, command: list[str], **extra: str) -> int:
        left = DEADLINE - (time.monotonic() - began)
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
        print("dry run: the next step would use the GPU")
        sys.exit(failed)

    failures = [name for name, command in steps(python, pytest, chosen, sanitizer) if run(name, command)]
    print(f"\n{'failed: ' + ', '.join(failures) if failures else 'all passed'}; {time.monotonic() - began:.0f} s")
    sys.exit(bool(failures))


def steps(python: str, pytest: list[str], chosen: list[str], sanitizer: str | None) -> list[tuple[str, list[str]]]:
    found = [("tests", [*pytest, "-q", *chosen])]
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
            found.append((tool, [*command, *pytest, "-q", *smallest]))
    found.append(("benchmarks", [python, "benchmarks/decode_step.py", "--seconds", "2"]))
    found.append(("attention", [python, "benchmarks/block_attention.py", "--seconds", "1"]))
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

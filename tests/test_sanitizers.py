"""The CPU core under the address and undefined-behaviour sanitizers, and its threads under the thread sanitizer."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLAGS = {"avx2": ["-mavx2", "-mfma", "-mf16c"], "avx512bf16": ["-mavx512f", "-mavx512bw", "-mavx512bf16"]}
COMPILER = shutil.which("g++") or shutil.which("clang++")


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None or platform.machine() != "x86_64", reason="needs a C++ compiler on x86-64")
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_sanitizers(tmp_path: Path, sanitizers: str) -> None:
    flags = [
        "-std=c++17",
        "-O1",
        "-g",
        "-pthread",
        "-DDLLM_AVX2",
        f"-fsanitize={sanitizers}",
        "-fno-sanitize-recover=all",
    ]
    objects = []
    for source in (
        "csrc/cpu/decode_step.cpp",
        "csrc/cpu/scalar.cpp",
        "csrc/cpu/avx2.cpp",
        "csrc/cpu/avx512bf16.cpp",
        "tests/sanitize.cpp",
    ):
        extra = FLAGS.get(Path(source).stem, [])
        objects.append(str(tmp_path / (Path(source).stem + ".o")))
        subprocess.run([str(COMPILER), *flags, *extra, "-c", str(ROOT / source), "-o", objects[-1]], check=True)
    program = tmp_path / "sanitize"
    subprocess.run([str(COMPILER), *flags, *objects, "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "500 calls\n"


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_the_sanitizer_would_see_a_read_beside_a_block(tmp_path: Path) -> None:
    """The check above can fail: the same compiler and flags stop a program that reads one element too far."""
    source = tmp_path / "beside.cpp"
    source.write_text("#include <cstdlib>\nint main(int n, char**) { int* p = (int*)malloc(4); return p[n] & 0; }\n")
    program = tmp_path / "beside"
    subprocess.run([str(COMPILER), "-fsanitize=address,undefined", str(source), "-o", str(program)], check=True)
    assert subprocess.run([str(program)], capture_output=True).returncode != 0

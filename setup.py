"""Builds dllm_engine._cpu, and dllm_engine._cuda where there is nvcc, with ninja: objects in parallel, and an editable
install recompiles only what changed.

The native code includes no torch header, so one binary serves every torch, and nothing is compiled for the building
machine's CPU, so it serves every x86-64. CXX and CXXFLAGS are respected.
DLLM_CPU=1 demands `_cpu`, 0 leaves it out; by default it is built where there is a C++ compiler. Without it the package
is pure Python and decodes with the backend `eager`; `dllm-engine info` says so.
DLLM_CUDA=1 demands `_cuda`, 0 leaves it out; by default it is built where both nvcc and a GPU driver are found.
DLLM_CUDA_ARCHS names its targets: sm_* for machine code, compute_* for PTX that newer cards compile at start.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

X86 = platform.machine().lower() in ("x86_64", "amd64")
SOURCES = ["csrc/cpu/bindings.cpp", "csrc/cpu/decode_step.cpp", "csrc/cpu/scalar.cpp"]
if X86:
    SOURCES += ["csrc/cpu/avx2.cpp", "csrc/cpu/avx512bf16.cpp"]  # chosen at run time: a wheel runs on older CPUs too
FLAGS = {"avx2": "-mavx2 -mfma -mf16c", "avx512bf16": "-mavx512f -mavx512bw -mavx512bf16"}
CXX = os.environ.get("CXX") or "c++"
CUDA_SOURCES = ["csrc/cuda/bindings.cpp", "csrc/cuda/decode_step.cu"]
CUDA_ARCHS = "sm_80 sm_90a compute_90"


def asked(variable: str) -> str:
    """0, 1 or auto."""
    value = os.environ.get(variable, "auto")
    if value not in ("0", "1", "auto"):
        raise SystemExit(f"{variable}: {value!r} given; 0, 1 or auto allowed")
    return value


def wants_cpu() -> bool:
    """Whether `_cpu` is to be built. A compiler that is there and fails is an error: a slow install would hide it."""
    wanted, compiler = asked("DLLM_CPU"), CXX.split()[0]
    if wanted == "1" and shutil.which(compiler) is None:
        raise SystemExit(f"DLLM_CPU=1: no {compiler} on the PATH")
    return wanted != "0" and shutil.which(compiler) is not None


def find_nvcc() -> str | None:
    """nvcc, if `_cuda` is to be built."""
    wanted = asked("DLLM_CUDA")
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=str(home / "bin"))
    if wanted == "1" and nvcc is None:
        raise SystemExit("DLLM_CUDA=1: no nvcc on the PATH nor in CUDA_HOME/bin")
    # many machines have nvcc and no card
    driver = any(Path(p).exists() for p in ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/dxg"))
    return nvcc if wanted == "1" or (wanted == "auto" and driver) else None


def code_flags(archs: str) -> str:
    """nvcc's flags for targets such as "sm_80 compute_90"."""
    pairs = ((name.replace("sm_", "compute_"), name) for name in archs.split())
    return " ".join(f"-gencode arch={virtual},code={real}" for virtual, real in pairs)


def ninja_path(path: Path) -> str:
    """A path where ninja reads one."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def ninja_text(text: str) -> str:
    """A variable's value."""
    return text.replace("$", "$$")


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import ninja
        import pybind11

        root, work = Path(__file__).resolve().parent, Path(self.build_temp).resolve() / ext.name.rpartition(".")[2]
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        flags = "-O3 -g0 -std=c++17 -fPIC -fvisibility=hidden -pthread -Wall -Wextra"
        for include in (pybind11.get_include(), sysconfig.get_paths()["include"]):
            flags += f" -isystem {shlex.quote(include)}"
        flags += " -DDLLM_AVX2" if X86 else ""
        flags += " " + os.environ.get("CXXFLAGS", "")
        shared = "-bundle -undefined dynamic_lookup" if platform.system() == "Darwin" else "-shared"
        cuda = any(source.endswith(".cu") for source in ext.sources)
        lines = [
            f"cxx = {ninja_text(CXX)}",
            f"flags = {ninja_text(flags)}",
            f"nvcc = {ninja_text(shlex.quote(NVCC or 'nvcc'))}",
            f"nvcc_flags = -O3 -std=c++17 -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra {code_flags(ARCHS)}",
            "rule object",
            "  command = $cxx $flags $extra -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule cuda_object",
            "  command = $nvcc $nvcc_flags -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            # nvcc knows where its static runtime lies: the module imports on machines without CUDA
            "  command = "
            + ("$nvcc -shared -cudart static $in -o $out" if cuda else f"$cxx {shared} -pthread $in -o $out"),
        ]
        objects = []
        for source in ext.sources:
            objects.append(work / (Path(source).name + ".o"))
            rule = "cuda_object" if source.endswith(".cu") else "object"
            lines.append(f"build {ninja_path(objects[-1])}: {rule} {ninja_path(root / source)}")
            if (name := Path(source).stem) in FLAGS:
                lines.append(f"  extra = {FLAGS[name]}")
        lines.append(f"build {ninja_path(target)}: link {' '.join(map(ninja_path, objects))}")
        (work / "build.ninja").write_text("\n".join(lines) + "\n", encoding="utf-8")
        subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", work, "--quiet"], check=True)


NVCC, ARCHS = find_nvcc(), os.environ.get("DLLM_CUDA_ARCHS", CUDA_ARCHS)
extensions = [Extension("dllm_engine._cpu", SOURCES)] if wants_cpu() else []
if NVCC is not None:
    extensions.append(Extension("dllm_engine._cuda", CUDA_SOURCES))
setup(ext_modules=extensions, cmdclass={"build_ext": NinjaBuild})

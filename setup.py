"""Builds dllm_engine._cpu with ninja: objects in parallel, and an editable install recompiles only what changed.

The native code includes no torch header, so one binary serves every torch. CXX and CXXFLAGS are respected.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

X86 = platform.machine().lower() in ("x86_64", "amd64")
SOURCES = ["csrc/cpu/bindings.cpp", "csrc/cpu/decode_step.cpp", "csrc/cpu/scalar.cpp"]
if X86:
    SOURCES.append("csrc/cpu/avx2.cpp")  # chosen at run time, so a wheel runs on older CPUs too


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import ninja
        import pybind11

        root, work = Path(__file__).resolve().parent, Path(self.build_temp).resolve()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        flags = "-O3 -g0 -std=c++17 -fPIC -fvisibility=hidden -pthread -Wall -Wextra"
        flags += f" -isystem {pybind11.get_include()} -isystem {sysconfig.get_paths()['include']}"
        flags += " -DDLLM_AVX2" if X86 else ""
        flags += " " + os.environ.get("CXXFLAGS", "")
        shared = "-bundle -undefined dynamic_lookup" if platform.system() == "Darwin" else "-shared"
        lines = [
            f"cxx = {os.environ.get('CXX', 'c++')}",
            f"flags = {flags}",
            "rule object",
            "  command = $cxx $flags $extra -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = $cxx {shared} -pthread $in -o $out",
        ]
        objects = []
        for source in ext.sources:
            objects.append(work / (Path(source).stem + ".o"))
            lines.append(f"build {objects[-1]}: object {root / source}")
            if source.endswith("avx2.cpp"):
                lines.append("  extra = -mavx2 -mfma -mf16c")
        lines.append(f"build {target}: link {' '.join(map(str, objects))}")
        (work / "build.ninja").write_text("\n".join(lines) + "\n", encoding="utf-8")
        subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", work, "--quiet"], check=True)


setup(ext_modules=[Extension("dllm_engine._cpu", SOURCES)], cmdclass={"build_ext": NinjaBuild})

"""What an install holds and what an import costs."""

from __future__ import annotations

import ast
import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_import_needs_torch_numpy_and_safetensors_only() -> None:
    script = (
        "import sys, dllm_engine\n"
        "heavy = ('transformers', 'tokenizers', 'huggingface_hub', 'rich', 'tqdm', 'matplotlib', 'triton', 'ray')\n"
        "print(*[name for name in heavy if name in sys.modules])"
    )
    without = subprocess.run(
        [sys.executable, "-c", "import sys, torch; print(*[n for n in ('tqdm', 'triton') if n in sys.modules])"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= set(without)


def test_imports_point_one_way() -> None:
    """No module takes anything, late or for an annotation, from one that needs it."""
    files = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
        for file in (ROOT / "dllm_engine").rglob("*.py")
    }
    needs: dict[str, set[str]] = {name: set() for name in files}
    for name, file in files.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module in files:
                whole = {f"{node.module}.{alias.name}" for alias in node.names}
                if not whole & {"dllm_engine._cpu", "dllm_engine._cuda"}:
                    needs[name] |= whole & files.keys() or {node.module}
    assert needs["dllm_engine.engine"] >= {"dllm_engine.loop", "dllm_engine.model"}
    TopologicalSorter(needs).prepare()  # CycleError names a circle


def test_ninja_reads_any_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ninja
    import setuptools

    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    setup = runpy.run_path(str(ROOT / "setup.py"))
    odd = tmp_path / "a b:$c"
    odd.mkdir()
    (odd / "in put").write_text("text")
    lines = [
        f"flags = {setup['ninja_text'](shlex.quote(str(odd)))}",
        "rule copy",
        "  command = test -d $flags && cp $in $out",
        f"build {setup['ninja_path'](odd / 'out put')}: copy {setup['ninja_path'](odd / 'in put')}",
    ]
    (odd / "build.ninja").write_text("\n".join(lines) + "\n")
    subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", odd, "--quiet"], check=True)
    assert (odd / "out put").read_text() == "text"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist of this checkout, unpacked: builds below see nothing else."""
    directory = tmp_path_factory.mktemp("sdist")
    script = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"
    clean = directory / "checkout"  # setuptools leaves an egg-info behind
    built = (".*", "build", "dist", "runs", "*.egg-info", "__pycache__", "*.so")
    shutil.copytree(ROOT, clean, ignore=shutil.ignore_patterns(*built))
    subprocess.run([sys.executable, "-c", script, str(directory)], cwd=clean, stdout=subprocess.DEVNULL, check=True)
    shutil.rmtree(clean)
    (archive,) = directory.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(directory, filter="data")
    (unpacked,) = directory.glob("dllm_engine-*/")
    return unpacked


def build_wheel(source: Path, output: Path, **environment: str) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(output)]
    subprocess.run([*command, str(source)], env=os.environ | {"DLLM_CUDA": "0"} | environment, check=True)
    (wheel,) = output.glob("*.whl")
    return wheel


def fresh_environment(directory: Path, wheel: Path) -> dict[str, str]:
    """A virtual environment with the wheel and this one's libraries, without this one's dllm_engine: .pth files in a
    directory that a .pth file names are not read, and an editable install is one. The result: variables to run in it.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(directory)], check=True)
    python = directory / "bin" / "python"
    install = ["-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, *install], check=True)
    (site,) = directory.glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    return {"PATH": str(directory / "bin"), "HOME": str(directory)}


def answer_and_info(environment: dict[str, str], elsewhere: Path) -> dict[str, Any]:
    """Decodes by command and by import; what ``dllm-engine info`` says."""
    elsewhere.mkdir()

    def run(*command: str) -> str:
        done = subprocess.run(
            [str(Path(environment["PATH"]) / command[0]), *command[1:]],
            cwd=elsewhere, env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout

    assert shutil.which("c++", path=environment["PATH"]) is None
    assert shutil.which("nvcc", path=environment["PATH"]) is None
    question, right = "Copy: 0 Alan Wells, 1 Amy Fox, 2 Carol King", "Alan Wells, Amy Fox, Carol King"
    assert run("dllm-engine", "generate", "--prompt", question, "--gen-length", "32").strip() == right
    script = f"""
import dllm_engine, dllm_engine.kernels
from dllm_engine.built_in import DEMO_MODEL
from dllm_engine.tokenizer import answer_text, encode_prompt
model = dllm_engine.LLaDA.from_pretrained(DEMO_MODEL, device="cpu")
prompt = encode_prompt(model.tokenizer, {question!r}, chat=True)
print(dllm_engine.__file__)
print(answer_text(model, dllm_engine.decode(model, [prompt], gen_length=32).sequences[0, len(prompt):].tolist()))
"""
    where, answer = run("python", "-c", script).splitlines()
    assert Path(where).is_relative_to(environment["HOME"])
    assert answer == right
    facts: dict[str, Any] = json.loads(run("dllm-engine", "info", "--json"))
    return facts


@pytest.mark.slow
def test_a_wheel_from_the_sdist_runs_without_compiler_or_cuda(source: Path, tmp_path: Path) -> None:
    for name in ("csrc/include/dllm/row_stats.h", "csrc/cuda/decode_step.cu", "kernels/decode_step.py",
                 "tests/golden/cases.json", "Makefile", "constraints.txt"):  # fmt: skip
        assert (source / name).exists(), name
    wheel = build_wheel(source, tmp_path)
    assert re.fullmatch(r"dllm_engine-[^-]+-cp\d+-cp\d+-\w+\.whl", wheel.name)  # native code: of a Python and platform
    assert wheel.stat().st_size < 10e6
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"dllm_engine"}
    for name in (
        "py.typed",
        "demo_model/model.safetensors",
        "demo_model/tokenizer.json",
        "policies/base.py",
        "kernels/decode_step.py",
        "integrations/ray.py",
        "integrations/lm_eval_tasks/demo_copy.yaml",
    ):
        assert f"dllm_engine/{name}" in names
    assert any(re.match(r"dllm_engine/_cpu\..*so$", name) for name in names)

    (rules,) = source.glob("build/temp.*/_cpu/build.ninja")
    flags: dict[str, str] = {}
    for line in rules.read_text(encoding="utf-8").splitlines():
        if line.startswith("build "):
            stem = Path(line.split()[-1]).stem
        elif line.startswith("  extra = "):
            flags[stem] = line
        else:
            assert " -m" not in line.replace("-MD -MF", ""), line  # what every CPU must run is for every CPU
    assert set(flags) == ({"avx2", "avx512bf16"} if platform.machine() == "x86_64" else set())

    facts = answer_and_info(fresh_environment(tmp_path / "fresh", wheel), tmp_path / "elsewhere")
    assert (facts["auto backend"], facts["backends"]["cpu"]) == ("cpu", "ready")


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{"PATH": ""}, {"DLLM_CPU": "0"}], ids=["no compiler", "DLLM_CPU=0"])
def test_without_a_compiler_the_package_is_pure_and_says_so(
    source: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    shutil.copytree(source, tmp_path / "source", ignore=shutil.ignore_patterns("build"))
    wheel = build_wheel(tmp_path / "source", tmp_path, **environment)
    assert wheel.name.endswith("-py3-none-any.whl")
    facts = answer_and_info(fresh_environment(tmp_path / "fresh", wheel), tmp_path / "elsewhere")
    assert facts["auto backend"] == "eager"
    assert "no C++ compiler was found when dllm-engine was installed" in facts["backends"]["cpu"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"DLLM_CPU": "1", "PATH": ""}, "DLLM_CPU=1: no c++ on the PATH"),
        ({"DLLM_CPU": "yes"}, "DLLM_CPU: 'yes' given; 0, 1 or auto allowed"),
    ],
)
def test_a_build_that_cannot_be_as_asked_fails(source: Path, environment: dict[str, str], message: str) -> None:
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--dry-run"]
    done = subprocess.run(
        command, cwd=source, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert message in done.stderr

"""What an install holds and what an import costs."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_import_needs_torch_numpy_and_safetensors_only() -> None:
    script = (
        "import sys, dllm_engine\n"
        "heavy = ('transformers', 'tokenizers', 'huggingface_hub', 'rich', 'tqdm', 'matplotlib', 'triton')\n"
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


@pytest.mark.slow
def test_wheel_installs_and_runs_elsewhere(tmp_path: Path) -> None:
    """Built from the checkout, unpacked in an empty directory, run from there."""
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path)]
    subprocess.run([*command, str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 10e6
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"dllm_engine"}
    for name in (
        "py.typed",
        "demo_model/model.safetensors",
        "demo_model/tokenizer.json",
        "policies/base.py",
        "integrations/lm_eval_tasks/demo_copy.yaml",
    ):
        assert f"dllm_engine/{name}" in names
    script = (
        "import dllm_engine; from dllm_engine.cli import main; assert 'site' in dllm_engine.__file__;"
        "main(['generate', '--prompt', 'Copy: 0 Alan Wells, 1 Amy Fox, 2 Carol King', '--gen-length', '32'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path / "site",
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "Alan Wells, Amy Fox, Carol King"

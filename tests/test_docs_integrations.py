"""docs/lm-eval.md and docs/transformers.md: what they tell a reader to run is run, on the built-in model."""

from __future__ import annotations

import functools
import json
import re
import shlex
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from test_generate import LikeTransformers

from dllm_engine import LLaDA, cli
from dllm_engine.built_in import DEMO_MODEL

ROOT = Path(__file__).resolve().parent.parent
# What needs a download or a GPU is put in small; everything else is run as it stands.
SMALL = {
    "pretrained=GSAI-ML/LLaDA-8B-Instruct,dtype=bfloat16,gen_length=256": "pretrained=demo,gen_length=64",
    "--tasks gsm8k ": "--tasks gsm8k_here.yaml ",
    "--batch_size 16 --limit 20": "--batch_size 16 --limit 1",
    "--limit 10": "--limit 1",
    "$tasks ": "demo_copy,demo_reverse,demo_sort,demo_sums ",
}
GSM8K_HERE = """task: gsm8k_here
dataset_path: json
dataset_kwargs: {data_files: {test: gsm8k_here.jsonl}}
test_split: test
fewshot_split: test
output_type: generate_until
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["Question:"], do_sample: false, temperature: 0.0}
metric_list: [{metric: exact_match}]
"""


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    assert found
    return found


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty directory without a network, with what the pages take for granted."""

    def refuse(*args: Any) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "filter").mkdir()
    shutil.copy(DEMO_MODEL / "filter.safetensors", "filter")
    return tmp_path


def test_lm_eval_page(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    datasets = pytest.importorskip("datasets")
    from lm_eval import tasks

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", here / "cache")
    monkeypatch.setattr(tasks, "TaskManager", functools.partial(tasks.TaskManager, include_defaults=False))
    rows = [{"question": f"Ann has {i} books. how many?", "answer": f"#### {i}"} for i in range(8)]
    Path("gsm8k_here.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    Path("gsm8k_here.yaml").write_text(GSM8K_HERE, encoding="utf-8")

    commands, used = 0, set()
    for block in blocks("lm-eval.md", "sh"):
        text = block.replace("\\\n", " ")
        for large, small in SMALL.items():
            used |= {large} if large in text else set()
            text = text.replace(large, small)
        for command in re.split(r"^(?=dllm-engine|pip|echo|tasks=)", text, flags=re.MULTILINE):
            if command.startswith("pip"):
                assert 'lm-eval = ["lm-eval>=0.4.13"]' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
            elif command.startswith("dllm-engine"):
                arguments = shlex.split(command)[1:]
                arguments = arguments if "--limit" in arguments else [*arguments, "--limit", "2"]
                assert cli.main(arguments) == 0, capsys.readouterr().err
                assert "|acc" in (printed := capsys.readouterr().out) or "|exact_match" in printed
                commands += 1
            elif command.strip():
                subprocess.run(["bash", "-ec", command], check=True)
    assert used == SMALL.keys()
    assert commands == 7
    assert json.loads(next(Path("results").glob("demo/samples_mine_*.jsonl")).read_text())["exact_match"] == 1
    for folder in ("topk", "threshold", "auto"):
        (file,) = Path("results", folder).glob("demo/results_*.json")
        config = json.loads(file.read_text(encoding="utf-8"))["config"]
        names = {name for row in ("generation", "likelihood") for name in _names_of(row)}
        assert names == (config["generation"].keys() | config["likelihood"].keys()) - {"tasks"} | {"tasks"}

    (script,) = blocks("lm-eval.md", "python")
    exec(compile(script, "docs/lm-eval.md", "exec"), {})
    assert float(capsys.readouterr().out.splitlines()[-1]) > 1


def _names_of(row: str) -> list[str]:
    """The figures that the page's table says are there."""
    text = (ROOT / "docs" / "lm-eval.md").read_text(encoding="utf-8")
    (cell,) = re.findall(rf"^\| `{row}` \| (.*) \|$", text, flags=re.MULTILINE)
    return re.findall(r"`(\w+)`", cell)


def test_transformers_page(
    here: Path, demo_model: LLaDA, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "TextDiffusionStreamer"):
        pytest.skip("this transformers has no TextDiffusionStreamer")
    raw = json.loads((DEMO_MODEL / "config.json").read_text(encoding="utf-8"))
    module, tokenizer = LikeTransformers(demo_model, raw), demo_model.tokenizer
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", lambda name, **options: module)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name, **options: tokenizer)
    shutil.copytree(DEMO_MODEL, "checkpoint")
    (written,) = blocks("transformers.md", "json")
    Path("checkpoint", "generation_config.json").write_text(written, encoding="utf-8")

    names: dict[str, Any] = {}
    for i, script in enumerate(blocks("transformers.md", "python")):
        exec(compile(script, f"docs/transformers.md, block {i}", "exec"), names)
        printed = capsys.readouterr().out
        if i in (0, 3, 4):
            assert "Amy Ford, Grace Wright, Alan Wells" in printed
        if i == 1:
            batch = names["out"].sequences
            assert demo_model.tokenizer.decode(batch[1, -64:], skip_special_tokens=True) == (
                "Amy Ford, Grace Wright, Alan Wells"
            )
        if i == 2:
            theirs = transformers.utils.ModelOutput(**names["out"])
            assert list(theirs) == list(names["out"])
    assert "'gen_length': 256" in printed.splitlines()[0]
    assert names["model"].generation_defaults == {
        "gen_length": 256, "block_length": 32, "policy": "threshold=0.9", "temperature": 0.0,
    }  # fmt: skip

"""``dllm-engine demo`` and the model that it asks."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from test_cli import run

from dllm_engine import LLaDA, tasks
from dllm_engine.built_in import DEMO_MODEL
from dllm_engine.evaluate import Setting, run_all


def test_demo(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "demo")
    assert status == 0
    assert out.count("one token per step") == 12
    assert "all ten as one batch" in out
    rows = json.loads(run(capsys, "demo", "--json")[1])
    assert [(r["prompts"]) for r in rows] == [10] * 8
    slow, _, _, fast = rows[:4]
    assert (slow["policy"], fast["policy"]) == ("topk", "auto")
    assert fast["forward_passes"] < slow["forward_passes"]
    assert fast["accuracy"] >= 0.7


def published(task: str, count: int) -> str:
    rng = random.Random(6)
    rows = []
    for _ in range(count):
        sample = tasks.generate(task, rng)
        if task == "sudoku":
            puzzle = "\n".join(r.replace(" ", "") for r in sample.prompt.removeprefix("Sudoku: ").split(", "))
            rows.append({"input": {"sudoku": puzzle}, "answer": sample.about["solution"]})
        else:
            given = {"context": json.dumps(sample.about["items"]), **sample.about}
            fixed = not task.endswith("random") and task != "shuffle"
            answer: object = json.dumps(sample.answer.split(", ")) if fixed else {}
            rows.append({"input": given, "answer": answer})
    return "\n".join(map(json.dumps, rows))


def test_demo_on_published_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    files = []
    for task in ("copy", "shuffle", "sudoku"):
        files.append(tmp_path / f"{task}.jsonl")
        files[-1].write_text(published(task, 4), encoding="utf-8")
    status, out, _ = run(capsys, "demo", "--data", *map(str, files), "--limit", "3")
    assert status == 0
    assert "shuffle.jsonl" in out
    all_of_them = ("--limit", "9" * 30, "--json", "--batch-size", "2")
    rows = json.loads(run(capsys, "demo", "--data", *map(str, files), *all_of_them)[1])
    assert [(Path(r["file"]).name, r["prompts"]) for r in rows[::4]] == [(f.name, 4) for f in files]
    assert rows[1]["accuracy"] >= 0.5
    assert rows[1]["accuracy_low"] <= rows[1]["accuracy"] <= rows[1]["accuracy_high"]
    files[0].write_text('{"input": {}}', encoding="utf-8")
    status, _, err = run(capsys, "demo", "--data", str(files[0]))
    assert status == 2
    assert "copy.jsonl, line 1: not a published row of task 'copy'" in err
    files[0].write_text("", encoding="utf-8")
    assert "no row in it" in run(capsys, "demo", "--data", str(files[0]))[2]


def test_the_demo_model_is_small_and_as_good_as_it_says(demo_model: LLaDA) -> None:
    assert sum(file.stat().st_size for file in DEMO_MODEL.iterdir()) < 8e6
    about = json.loads((DEMO_MODEL / "accuracy.json").read_text(encoding="utf-8"))
    assert min(about["accuracy"]["copy"], about["accuracy"]["reverse"]) >= 0.9
    rng = random.Random(2024)
    samples = [tasks.generate(task, rng) for task in ("copy", "reverse") for _ in range(25)]
    rows = run_all(demo_model, samples, [Setting("topk", "none", gen_length=32)])[0]
    assert sum(row.right for row in rows) >= 41  # 41 of 50 or fewer happens with a chance of 0.5 % where 90 % is true

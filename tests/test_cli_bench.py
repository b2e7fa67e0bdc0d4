"""The command that times a model: what it decodes and counts, not how fast."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dllm_engine import LLaDA, cli_bench, decode, evaluate
from dllm_engine.cli import main
from dllm_engine.tokenizer import encode_prompt

QUICK = ["--gen-length", "32", "--turns", "1"]
PROMPTS = ["Reverse: 0 Alan Wells, 1 Grace Wright, 2 Amy Ford", "Copy: 0 Laura Bell, 1 Ann Carr"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in [*PROMPTS, "Copy: 0 Amy Ford"]))
    return path


def bench(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert main(["bench", *QUICK, "--json", *arguments]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def test_figures_are_those_of_the_decodes(capsys: pytest.CaptureFixture[str], file: Path, demo_model: LLaDA) -> None:
    found = bench(capsys, "--prompts", str(file), "--count", "2", "--batch-size", "1", "2", "9", "--policy", "topk=2")
    assert [(r["name"], r["batch_size"]) for r in found] == [
        (name, size) for size in (1, 2) for name in ("one token per step", "threshold 0.9 + dual cache", "topk=2")
    ]
    prompts = [encode_prompt(demo_model.tokenizer, prompt, chat=True) for prompt in PROMPTS]
    baseline: list[list[int]] = []
    for r in found:
        assert (r["prompts"], r["turns"], r["backend"]) == (2, 1, "cpu")
        how = {name: r[name] for name in ("policy", "cache", "end_of_text")}
        out = decode(demo_model, prompts, gen_length=32, seed=0, **how)
        tokens, passes = int(out.generated_tokens.sum()), int(out.sequence_passes.sum())
        assert r["forward_passes"] == passes / 2
        assert r["tokens_per_forward"] == tokens / passes
        rows = zip(out.sequences[:, -32:].tolist(), out.generated_tokens.tolist(), strict=True)
        texts = [row[:count] for row, count in rows]
        baseline = baseline or texts
        assert r["same_texts_as_first"] == sum(a == b for a, b in zip(texts, baseline, strict=True))
        assert r["tokens_per_second"] > 0
        assert r["seconds_per_batch"] > 0
    assert found[0]["forward_passes"] == 32
    assert found[0]["end_of_text"] == "off"
    assert found[2]["forward_passes"] < 20
    assert found[0]["times_first"] == found[3]["times_first"] == 1


def test_speed_is_of_tokens_and_turns_are_timed_apart(
    capsys: pytest.CaptureFixture[str], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock on which each decode takes as long as it makes forward passes."""
    clock, calls = [0.0], []

    def counted(model: LLaDA, prompts: Any, **options: Any) -> Any:
        out = decode(model, prompts, **options)
        clock[0] += out.forward_passes
        calls.append((options["cache"], len(prompts)))
        return out

    monkeypatch.setattr(evaluate, "decode", counted)
    monkeypatch.setattr(cli_bench.time, "perf_counter", lambda: clock[0])
    options = ["--prompts", str(file), "--batch-size", "2", "--turns", "2", "--policy", "topk", "--baselines", "topk"]
    first, second = bench(capsys, *options)
    turn = [("none", 2), ("none", 1), ("dual", 2), ("dual", 1)]
    assert calls == [("none", 2), ("dual", 2), *turn, *turn]  # the first batch of each is no turn
    assert first["seconds_per_batch"] == 32
    tokens = first["tokens_per_second"] * 64
    assert tokens == pytest.approx(first["tokens_per_forward"] * first["forward_passes"] * 3)
    assert second["times_first"] == pytest.approx(second["tokens_per_second"] / first["tokens_per_second"])
    assert second["times_first"] > 1.5


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *QUICK, "--count", "1", "--gen-length", "64", "--baselines", "threshold"]) == 0
    text = capsys.readouterr().out
    assert "1 prompts to demo_model, cpu" in text
    assert "threshold 0.9 + dual cache" in text
    assert "auto" in text
    assert "one token per step" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--turns", "0"], "--turns: 0 given; at least 1"),
        (["--batch-size", "4", "-1"], "--batch-size: -1 given; at least 1"),
        (["--policy", "fastest"], "policy: 'fastest' given; known"),
        (["--policy", "learn2pd=/nowhere"], "/nowhere does not exist"),
        (["--cache", "double"], "cache: 'double' given"),
        (["--end-of-text", "soon"], "end_of_text: 'soon' given"),
        (["--gen-length", "100"], "block_length: 32 given; it must divide gen_length 100"),
        (["--backend", "gpu"], "backend: 'gpu' given"),
        (["--policy", "topk=3"], "policy: topk=3 given; tokens a step must divide gen_length 128"),
        (["--prompts", "/nowhere.jsonl"], "/nowhere.jsonl"),
    ],
)
def test_bad_arguments(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_files_that_do_not_do(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for content, message in (
        ("\n", "rows.jsonl: no row in it"),
        (json.dumps({"prompt": "Copy " * 1000}), "prompt 0: 10"),
    ):
        (tmp_path / "rows.jsonl").write_text(content)
        assert main(["bench", "--prompts", str(tmp_path / "rows.jsonl")]) == 2
        assert message in capsys.readouterr().err

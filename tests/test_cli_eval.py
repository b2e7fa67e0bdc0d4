"""`dllm-engine eval`: what it prints, keeps and refuses."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_evaluate import Calls, fresh

from dllm_engine import LearnedFilter, LLaDA, backends, cli, cli_eval, cli_options, evaluate, samples, tasks
from dllm_engine.built_in import DEMO_MODEL, trained_tasks
from dllm_engine.cli_eval_rows import KeptRows
from dllm_engine.evaluate import Row, Setting

FILTER = DEMO_MODEL / "filter.safetensors"
KEYS = (
    "policy cache end_of_text block_length gen_length accuracy accuracy_low accuracy_high forward_passes"
    " tokens_per_forward tokens_per_second prompts seconds device threads backend loss loss_upper passes_ratio"
).split()
SMALL = ("--tasks", "copy", "reverse", "--prompts", "3", "--batch-size", "4", "--json")

Command = Callable[..., tuple[int, Any, str]]


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], demo_model: LLaDA, tmp_path: Path
) -> Command:
    """Runs ``dllm-engine eval`` in an empty directory: status, stdout (read as JSON where it is), stderr."""
    monkeypatch.setattr(cli_options, "load", lambda args: demo_model)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, Any, str]:
        try:
            status = cli.main(("eval", *arguments))
        except SystemExit as stop:  # argparse
            status = int(stop.code or 0)
        out, err = capsys.readouterr()
        return status, json.loads(out) if out.startswith("[") else out, err

    return run


def test_json(command: Command) -> None:
    status, records, err = command(*SMALL, "--policy", "topk", "threshold=0.8", "--cache", "none", "dual")
    assert status == 0
    assert [(r["policy"], r["cache"]) for r in records] == [
        ("topk", "none"), ("threshold=0.8", "none"), ("topk", "dual"), ("threshold=0.8", "dual"),
    ]  # fmt: skip
    assert all(key in record for record in records for key in KEYS)
    assert {r["prompts"] for r in records} == {6}
    assert {r["gen_length"] for r in records} == {32}
    assert "gen_length 32: fits the longest answer" in err
    first, fast = records[:2]
    assert (first["loss"], first["loss_upper"], first["passes_ratio"]) == (None, None, None)
    assert fast["loss"] == pytest.approx(first["accuracy"] - fast["accuracy"])
    assert fast["passes_ratio"] == pytest.approx(first["forward_passes"] / fast["forward_passes"])
    assert fast["passes_ratio"] > 1
    assert set(fast["tasks"]) == {"copy", "reverse"}


def test_the_table_and_what_runs_by_default(command: Command) -> None:
    status, out, _ = command("--prompts", "1", "--end-of-text", "off", "committed")
    assert status == 0
    for text in ("topk", "auto", "committed", "forward", "Loss: accuracy"):
        assert text in out


def test_seeds_and_lengths_of_fresh_questions(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[tasks.Sample]] = []

    def keep(model: LLaDA, questions: list[tasks.Sample], settings: list[Setting], **options: Any) -> list[list[Row]]:
        asked.append(questions)
        return [[Row(i, "copy", True, 1, 1, "", 1.0) for i in range(len(questions))] for _ in settings]

    monkeypatch.setattr(evaluate, "run_all", keep)
    command("--tasks", "copy", "--prompts", "3", "--names", "7", "7")
    command("--tasks", "reverse", "copy", "--prompts", "3", "--names", "7", "7")
    command("--tasks", "copy", "--prompts", "3", "--names", "7", "7", "--seed", "2")
    first, both, other = asked
    assert {len(sample.about["items"]) for sample in first} == {7}
    assert both[3:] == first
    assert other != first


def test_rows_are_kept_by_all_that_decides_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(DEMO_MODEL, tmp_path / "model")
    model, setting = LLaDA.from_pretrained(tmp_path / "model", device="cpu"), Setting("topk")

    def file(chat: bool | None) -> Path:
        kept = KeptRows(tmp_path / "rows", model, fresh(1), {setting: "topk"}, batch_size=1, chat=chat)
        return kept._files[setting]

    before = file(None)
    assert file(True) == before
    assert file(False) != before
    with monkeypatch.context() as patch:
        patch.setitem(backends.BACKENDS, "another", backends.BACKENDS["eager"])
        patch.setenv("DLLM_BACKEND", "another")
        assert file(None) != before
    (tmp_path / "model" / "chat_template.jinja").write_text("another", encoding="utf-8")
    assert file(None) != before


def test_resuming_decodes_only_what_is_missing(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (
        "--tasks",
        "copy",
        "sort",
        "--prompts",
        "3",
        "--batch-size",
        "2",
        "--policy",
        "topk",
        "threshold=0.7",
        "--json",
    )

    def rows(directory: str) -> dict[str, list[Any]]:
        files = sorted(Path(directory).iterdir())
        return {
            f.name: [json.loads(line) | {"seconds": 0} for line in f.read_text("utf-8").splitlines()] for f in files
        }

    calls = Calls(monkeypatch)
    status, whole, _ = command(*arguments, "--output", "whole")
    assert (status, len(calls.made)) == (0, 8)  # three batches and a warm-up, twice
    calls = Calls(monkeypatch, stop=5)  # two warm-ups, both first batches, topk's second
    assert command(*arguments, "--output", "parts")[0] == 130
    kept = rows("parts")
    assert sorted(map(len, kept.values())) == [2, 4]
    for name, own in kept.items():
        with Path("parts", name).open("ab") as file:
            if len(own) == 4:
                torn = '{"index": 5, "task": "é'.encode()[:-1]  # killed while writing, within a character
                file.write(b"\n".join([json.dumps(own[3] | {"index": 4}).encode(), torn, torn]))
            else:  # rows again, as two runs at once would leave
                file.writelines(json.dumps(row).encode() + b"\n" for row in own)
    calls = Calls(monkeypatch)
    status, resumed, err = command(*arguments, "--output", "parts")
    assert "resuming: 3 of 6 batches are in parts" in err
    assert sorted(calls.made) == [("threshold", 2)] * 3 + [("topk", 2)] * 2  # a warm-up each
    assert rows("parts") == rows("whole")
    timings = dict.fromkeys(("seconds", "tokens_per_second"))
    assert [r | timings for r in resumed] == [r | timings for r in whole]
    calls.made.clear()
    assert command(*arguments, "--output", "parts")[1] == resumed
    assert calls.made == []
    command(*arguments, "--output", "parts", "--seed", "5")  # other questions: other files
    assert len(calls.made) == 8
    assert len(rows("parts")) == 4


def test_data_files(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = [sample for sample in fresh(9) if sample.task == "copy"]
    published = [
        {"input": {"context": json.dumps(s.about["items"])}, "answer": json.dumps(s.about["items"])} for s in questions
    ]
    Path("copy.jsonl").write_text("\n".join(map(json.dumps, published)), encoding="utf-8")
    plain: list[Any] = [{"prompt": questions[0].prompt, "answer": f" {questions[0].answer}\n"}]
    plain.append({"messages": [{"role": "user", "content": questions[1].prompt}], "answer": "something else"})
    Path("own.jsonl").write_text("\n".join(map(json.dumps, plain)), encoding="utf-8")
    _, (record,), _ = command("--data", "copy.jsonl", "own.jsonl", "--limit", "2", "--policy", "topk", "--json")
    assert record["prompts"] == 4
    assert set(record["tasks"]) == {"copy", samples.EXACT}
    read = samples.read_samples(Path("copy.jsonl"), 2) + samples.read_samples(Path("own.jsonl"), 2)
    assert [(s.task, s.prompt) for s in read[:2]] == [(s.task, s.prompt) for s in questions[:2]]
    assert samples.is_right(read[2], questions[0].answer)
    assert not samples.is_right(read[2], questions[0].answer + "x")
    Path("own.jsonl").write_text('\n{"prompt": "x", "answer": "y"}\n{"prompt": "x"}', encoding="utf-8")
    status, _, err = command("--data", "own.jsonl")
    assert status == 2
    assert 'own.jsonl, line 3: no "answer"' in err


def test_sweep(command: Command) -> None:
    pytest.importorskip("matplotlib")
    LearnedFilter(32).save_pretrained("net.safetensors")
    status, records, err = command(
        "--tasks", "copy", "--prompts", "2", "--sweep", "--filter", "ours=net.safetensors", "--cache", "dual", "none",
        "--plot", "plot", "--json",
    )  # fmt: skip
    assert status == 0
    assert "plot/frontier.png and frontier.json written" in err
    assert Path("plot/frontier.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(Path("plot/frontier.json").read_text("utf-8")) == records
    values: dict[str, list[Any]] = {}
    for record in records[: len(records) // 2]:
        values.setdefault(record["rule"], []).append(record["value"])
    assert values == {
        "topk": [1, 2, 4, 8],
        "threshold": [0.5, 0.7, 0.8, 0.9, 0.95, 0.99],
        "factor": [0.5, 0.7, 1.0, 1.3, 1.6],
        "ours": [0.5, 0.7, 0.8, 0.9, 0.95, 0.99],
        "oracle": [None],
    }
    assert [r["cache"] for r in records] == ["dual"] * 22 + ["none"] * 22


@pytest.mark.parametrize("ships", [True, False])
def test_a_sweep_has_the_models_own_filter(ships: bool, tmp_path: Path) -> None:
    if ships:
        LearnedFilter(32).save_pretrained(tmp_path)

    class Model:
        path = tmp_path

    texts = cli_eval._sweep(argparse.Namespace(block_length=12), Model(), {})  # type: ignore[arg-type]
    assert [text for text in texts if text.startswith("topk")] == ["topk=1", "topk=2", "topk=4"]  # 8 does not divide 12
    assert sum(text.startswith("learn2pd@") for text in texts) == (6 if ships else 0)
    assert texts[-1] == "oracle"


def test_a_missing_matplotlib_is_told_before_decoding(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    calls = Calls(monkeypatch)
    status, _, err = command(*SMALL, "--plot", "plot")
    assert status == 2
    assert "matplotlib is not installed; pip install 'dllm-engine[plots]'" in err
    assert calls.made == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--cache", "dual", "foo"), "cache: 'foo' given"),
        (("--end-of-text", "foo"), "end_of_text: 'foo' given"),
        (("--plot", "file"), "file: File exists"),
    ],
    ids=str,
)
def test_what_needs_no_model_is_checked_before_it_is_loaded(
    command: Command, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    if arguments[0] == "--plot":
        pytest.importorskip("matplotlib")
    Path("file").write_text("")
    monkeypatch.setattr(cli_options, "load", None)
    status, _, err = command(*arguments)
    assert status == 2
    assert message in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--tasks poem", "--tasks: 'poem' given; known: learned, copy"),
        ("--prompts 0", "--prompts: 0 given; at least 1"),
        ("--batch-size 0", "--batch-size: 0 given; at least 1"),
        ("--gen-length -3", "--gen-length: -3 given; at least 1"),
        ("--limit 3", "--limit: needs --data"),
        ("--data /no/copy.jsonl", "No such file"),
        ("--data copy.jsonl --prompts 5", "--prompts: of fresh questions, not of --data"),
        ("--data copy.jsonl --seed 1", "--seed: of fresh questions, not of --data"),
        ("--data copy.jsonl --names 3 6", "--names: of fresh questions, not of --data"),
        ("--data copy.jsonl --sum-steps 2", "--sum-steps: of fresh questions, not of --data"),
        ("--data copy.jsonl --largest 9", "--largest: of fresh questions, not of --data"),
        ("--data x --tasks copy", "not allowed with argument"),
        ("--tasks copy --names 5 3", "--names: shortest, longest: 5, 3 given"),
        ("--tasks worded_sums --largest 200", "--sum-steps, --largest: steps, largest: 3, 200 given"),
        ("--policy best", "policy: 'best' given; known: auto, topk"),
        ("--policy oracle=3", "policy: 'oracle=3' given; oracle takes no value"),
        ("--policy random=0", "'0' given for random; a whole number of tokens a step"),
        ("--policy entropy=-1", "threshold: -1.0 given; a finite number ≥ 0"),
        ("--policy localleap=0.9/0.95", "relaxed: 0.95 given; 0 to 0.9 allowed"),
        ("--policy wedlm=0.4/0.02/3", "policy: 3 values given for wedlm; it has threshold, penalty"),
        ("--policy cad=0.9/x", "'x' given for cad; a number is needed"),
        ("--policy threshold@3", "policy: 'threshold@3' given; known"),
        ("--policy factor=a", "'a' given for factor; a number is needed"),
        ("--policy learn2pd@a", "'a' given for learn2pd; a number is needed"),
        ("--policy learn2pd@2", "threshold: 2.0 given; 0 to 1 allowed"),
        ("--policy threshold=2", "threshold: 2.0 given; 0 to 1 allowed"),
        ("--policy learn2pd=/no/filter@0.5", "filter: /no/filter does not exist"),
        ("--policy topk=0.5", "'0.5' given for topk; a whole number of tokens a step"),
        ("--tasks copy --policy topk=5", "policy: topk=5 given; tokens a step must divide gen_length 32"),
        ("--policy topk=2 --steps 8", "steps: 8 given; topk=2 sets its own"),
        ("--cache triple", "cache: 'triple' given; known: none, prefix, dual"),
        ("--end-of-text never", "end_of_text: 'never' given"),
        ("--tasks copy --names 12 12 --gen-length 32", "--gen-length: 32 given; the longest answer has"),
        ("--tasks copy --block-length 24 --gen-length 32", "block_length: 24 given; it must divide gen_length 32"),
        ("--tasks copy --block-length 4096", "exceeds the model's max_sequence_length"),
        (
            "--tasks copy --policy topk=64 --gen-length 64",
            "policy: topk=64 given; tokens a step must divide block_length",
        ),
        ("--sweep --policy topk", "--sweep: sets policies and steps itself"),
        ("--filter a=b", "--filter: needs --sweep"),
        ("--sweep --filter net", "--filter: 'net' given; NAME=FILE is needed"),
        ("--sweep --filter topk=net", "--filter: 'topk=net' given; NAME=FILE is needed, the name used by nothing else"),
        ("--sweep --filter ours=/no/net", "filter: /no/net does not exist"),
        (f"--sweep --filter a={FILTER} --filter b={FILTER}", "a is this file already"),
        (f"--sweep --filter a={FILTER}@0.9", "the sweep sets the thresholds, a file alone is needed"),
    ],
)
def test_errors_come_before_the_first_pass(
    command: Command, monkeypatch: pytest.MonkeyPatch, arguments: str, message: str
) -> None:
    calls = Calls(monkeypatch)
    status, out, err = command(*arguments.split())
    assert (status, out, calls.made) == (2, "", [])
    assert message in err
    assert "Traceback" not in err


def test_a_model_that_does_not_say_what_it_learned(
    command: Command, monkeypatch: pytest.MonkeyPatch, golden_model: LLaDA
) -> None:
    monkeypatch.setattr(cli_options, "load", lambda args: golden_model)
    status, _, err = command()
    assert status == 2
    assert "has no accuracy.json that tells which of our tasks it learned" in err
    assert "--data FILE.jsonl" in err


def test_a_broken_accuracy_file_is_named(tmp_path: Path) -> None:
    class Model:
        path = tmp_path

    for text, message in (("{}", 'no "accuracy"'), ("", "is not valid JSON")):
        (tmp_path / "accuracy.json").write_text(text)
        with pytest.raises(ValueError, match=f"accuracy.json:? {message}"):
            trained_tasks(Model())  # type: ignore[arg-type]

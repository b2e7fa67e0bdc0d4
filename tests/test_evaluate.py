"""Evaluation: figures against those counted by hand, turns, the oracle, resuming, the sweep and the error messages."""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dllm_engine import LearnedFilter, LLaDA, cli, cli_eval, evaluate, samples, tasks
from dllm_engine.decode import decode
from dllm_engine.demo import trained_tasks
from dllm_engine.evaluate import Row, Setting
from dllm_engine.policy_text import PolicyText
from dllm_engine.tokenizer import answer_text, encode_prompt

TOPK = Setting("topk", gen_length=32)
FAST = Setting("threshold=0.7", cache="none", gen_length=32)
ORACLE = replace(TOPK, policy_text="oracle")
KEYS = (
    "policy cache end_of_text block_length gen_length accuracy accuracy_low accuracy_high forward_passes"
    " tokens_per_forward tokens_per_second prompts seconds device threads loss loss_upper passes_ratio"
).split()
SMALL = ("--tasks", "copy", "reverse", "--prompts", "3", "--batch-size", "4", "--json")


def fresh(count: int) -> list[tasks.Sample]:
    rng = random.Random(4)
    return [tasks.generate(("copy", "reverse", "sort")[i % 3], rng) for i in range(count)]


def timeless(rows: list[Row]) -> list[Row]:
    return [replace(row, seconds=0.0) for row in rows]


class Calls:
    """Stands in for decode and remembers its calls; ``stop`` is the number of calls after which it is interrupted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop: float = math.inf) -> None:
        self.made: list[tuple[str, int]] = []
        self.caches: set[str] = set()
        self.stop = stop
        monkeypatch.setattr(evaluate, "decode", self)

    def __call__(self, model: LLaDA, prompts: Any, **options: Any) -> Any:
        if len(self.made) >= self.stop:
            raise KeyboardInterrupt
        self.caches.add(options["cache"])
        self.made.append((getattr(options["policy"], "name", options["policy"]), len(prompts)))
        return decode(model, prompts, **options)


Command = Callable[..., tuple[int, Any, str]]


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], demo_model: LLaDA, tmp_path: Path
) -> Command:
    """Runs ``dllm-engine eval`` in an empty directory: status, stdout (read as JSON where it is), stderr."""
    monkeypatch.setattr(cli, "_model", lambda args: demo_model)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, Any, str]:
        try:
            status = cli.main(("eval", *arguments))
        except SystemExit as stop:  # argparse
            status = int(stop.code or 0)
        out, err = capsys.readouterr()
        return status, json.loads(out) if out.startswith("[") else out, err

    return run


# -- figures ----------------------------------------------------------------------------------------------------------


def test_rows_are_what_decode_gives_each_prompt_alone(demo_model: LLaDA) -> None:
    questions = fresh(5)
    rows = evaluate.run(demo_model, questions, FAST, batch_size=2)
    for i, (row, sample) in enumerate(zip(rows, questions, strict=True)):
        prompt = encode_prompt(demo_model.tokenizer, sample.prompt, chat=True)
        out = decode(
            demo_model, [prompt], gen_length=32, policy=PolicyText.parse("threshold=0.7").make(demo_model), cache="none"
        )
        text = answer_text(demo_model, out.sequences[0, -32:].tolist())
        passes, tokens = int(out.sequence_passes[0]), int(out.generated_tokens[0])
        assert replace(row, seconds=0.0) == Row(i, sample.task, tasks.score(sample, text), passes, tokens, text, 0.0)
        assert row.seconds > 0


def test_seeds_count_samples_not_batches(demo_model: LLaDA) -> None:
    setting = Setting("random", gen_length=32)
    two, five = (timeless(evaluate.run(demo_model, fresh(5), setting, batch_size=n)) for n in (2, 5))
    assert two == five
    assert timeless(evaluate.run(demo_model, fresh(5), setting, seed=1)) != five


def test_summary() -> None:
    rows = [
        Row(0, "copy", True, 4, 10, "", 0.5),
        Row(1, "copy", False, 2, 6, "", 0.5),
        Row(2, "sort", True, 6, 8, "", 1),
    ]
    figures = evaluate.summary(rows)
    assert figures["accuracy"] == pytest.approx(2 / 3)
    assert (figures["accuracy_low"], figures["accuracy_high"]) == evaluate.wilson(2, 3)
    assert figures["forward_passes"] == 4
    assert figures["tokens_per_forward"] == 2
    assert figures["tokens_per_second"] == 12
    assert figures["tasks"] == {"copy": 0.5, "sort": 1.0}
    assert (figures["prompts"], figures["seconds"]) == (3, 2)


def test_wilson() -> None:
    """Against the closed-form roots of (p̂ − p)² = z² p (1 − p) / n."""
    for right, total in ((0, 10), (10, 10), (3, 10), (186, 200)):
        low, high = evaluate.wilson(right, total)
        for p in (low, high):
            assert (right / total - p) ** 2 == pytest.approx(1.96**2 * p * (1 - p) / total, abs=1e-9)
        assert low <= right / total <= high


def test_paired_loss() -> None:
    # 100 prompts, 20 lost and 10 won: mean 0.1, variance (30 − 100 · 0.01) / 99, standard error sqrt(0.29293 / 100)
    before, after = [True] * 50 + [False] * 10 + [True] * 40, [False] * 20 + [True] * 80
    loss, upper = evaluate.paired_loss(before, after)
    assert loss == pytest.approx(0.1)
    lost, won = 20, 10
    assert sum(a and not b for a, b in zip(before, after, strict=True)) == lost
    assert sum(b and not a for a, b in zip(before, after, strict=True)) == won
    assert upper == pytest.approx(0.1 + 1.645 * 0.054123, abs=1e-5)
    swapped, _ = evaluate.paired_loss(after, before)
    assert swapped == pytest.approx(-0.1)


def test_paired_loss_with_few_discordant_pairs_is_exact() -> None:
    same = [True] * 100
    assert evaluate.paired_loss(same, same) == (0.0, pytest.approx(1 - 0.05**0.01))  # about 3 / 100
    assert evaluate.paired_loss([False] * 4, [False] * 4)[1] == pytest.approx(1 - 0.05**0.25)
    loss, upper = evaluate.paired_loss(same, [False, *same[1:]])
    assert loss == pytest.approx(0.01)
    assert upper == pytest.approx(0.04656, abs=1e-5)  # Clopper and Pearson, one of 100, one-sided 95 %
    won = evaluate.paired_loss([False, *same[1:]], same)
    assert won == (pytest.approx(-0.01), pytest.approx(1 - 0.05**0.01))  # one prompt won promises no gain
    assert evaluate.paired_loss([True] * 3, [False] * 3) == (1.0, 1.0)
    assert evaluate.paired_loss([True] * 30, [False] * 30) == (1.0, 1.0)
    # ten pairs are enough for the normal approximation: mean 0.1, variance (10 − 100 · 0.01) / 99
    _, upper = evaluate.paired_loss(same, [False] * 10 + same[10:])
    assert upper == pytest.approx(0.1 + 1.645 * math.sqrt(9 / 99 / 100), abs=1e-9)
    with pytest.raises(ValueError, match="right: 0 outcomes given"):
        evaluate.paired_loss([], [])
    with pytest.raises(ValueError, match=r"as many as baseline_right \(2\)"):
        evaluate.paired_loss([True, True], [True])


# -- turns and the oracle ---------------------------------------------------------------------------------------------


def test_settings_take_turns(demo_model: LLaDA, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    seen: list[Setting] = []
    rows = evaluate.run_all(demo_model, fresh(5), [TOPK, FAST], batch_size=3, on_turn=seen.append)
    slow, fast = ("topk", 3), ("threshold", 3)
    assert calls.made == [slow, slow, fast, fast, ("topk", 2), ("threshold", 2)]  # the first of each is the warm-up
    assert seen == [TOPK, FAST, TOPK, FAST]
    for wrong in (replace(FAST, cache="dul"), replace(FAST, end_of_text="no"), replace(FAST, gen_length=33)):
        with pytest.raises(ValueError, match="given"):
            evaluate.run_all(demo_model, fresh(2), [TOPK, wrong], on_turn=seen.append)
    assert len(seen) == 4, "a bad setting was found after the first turn"
    assert timeless(rows[1]) == timeless(evaluate.run(demo_model, fresh(5), FAST))


def test_a_row_has_its_share_of_the_seconds_of_its_batch(demo_model: LLaDA, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(evaluate.time, "perf_counter", lambda: next(clock))
    rows = evaluate.run(demo_model, fresh(5), FAST, batch_size=4)
    assert [row.seconds for row in rows] == [0.25] * 4 + [1.0]


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_the_oracle_gives_the_answers_of_one_token_per_step_in_no_more_passes(
    demo_model: LLaDA, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    questions, setting = fresh(6), replace(TOPK, cache=cache)
    topk, oracle = evaluate.run_all(
        demo_model, questions, [setting, replace(setting, policy_text="oracle")], batch_size=4
    )
    assert [row.text for row in oracle] == [row.text for row in topk]
    assert all(a.passes <= b.passes for a, b in zip(oracle, topk, strict=True))
    assert sum(row.passes for row in oracle) < sum(row.passes for row in topk)
    calls = Calls(monkeypatch)
    alone = evaluate.run(demo_model, questions, replace(setting, policy_text="oracle"), batch_size=4)
    assert timeless(alone) == timeless(oracle)
    assert calls.caches == {cache}


def test_the_oracle_reuses_answers_of_its_batch_only(demo_model: LLaDA, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    together = evaluate.run_all(demo_model, fresh(4), [TOPK, ORACLE], batch_size=2)[1]
    assert [name for name, _ in calls.made].count("topk") == 3
    calls.made.clear()
    others = [replace(TOPK, steps=8), replace(TOPK, cache="none"), replace(TOPK, policy_text="topk=2")]
    *_, alone = evaluate.run_all(demo_model, fresh(4), [*others, ORACLE], batch_size=2)
    assert [name for name, _ in calls.made].count("topk") == 3 * 3 + 2
    assert timeless(alone) == timeless(together)


def test_tokens_a_step(demo_model: LLaDA) -> None:
    setting = replace(TOPK, policy_text="topk=4", end_of_text="off")
    assert {row.passes for row in evaluate.run(demo_model, fresh(2), setting)} == {8}


# -- policies as text -------------------------------------------------------------------------------------------------


def test_policy_texts(demo_model: LLaDA, tmp_path: Path) -> None:
    LearnedFilter(32, threshold=0.6).save_pretrained(tmp_path / "f@1.safetensors")
    file = str(tmp_path / "f@1.safetensors")
    assert PolicyText.parse("topk") == PolicyText("topk")
    assert PolicyText.parse("topk=4") == PolicyText("topk", 4)
    assert PolicyText.parse("learn2pd@0.8") == PolicyText("learn2pd", 0.8)
    assert PolicyText.parse(f"learn2pd={file}") == PolicyText("learn2pd", None, file)
    assert PolicyText.parse(f"learn2pd={file}@0.8") == PolicyText("learn2pd", 0.8, file)
    made: Any = PolicyText.parse(f"learn2pd={file}@0.8").make(demo_model)
    assert made.threshold == 0.8
    made = PolicyText.parse(f"learn2pd={file}").make(demo_model)
    assert made.threshold == 0.6
    made = PolicyText.parse("factor=1.5").make(demo_model)
    assert made.factor == 1.5
    made = PolicyText.parse("localleap=0.8/0.5/3").make(demo_model)
    assert repr(made) == "LocalLeap(anchor=0.8, relaxed=0.5, window=3)"
    assert PolicyText.parse("wedlm").make(demo_model) == "wedlm"
    assert PolicyText.parse("margin=4").make(demo_model) == "margin"
    assert PolicyText.parse("margin=4").steps(32) == 8
    assert PolicyText.parse("topk=4").make(demo_model) == "topk"
    assert PolicyText.parse("topk=4").steps(32) == 8
    assert PolicyText.parse("threshold=0.9").steps(32) is None
    assert PolicyText.parse("topk").steps(32, 16) == 16


def test_the_models_own_filter_at_a_threshold(tmp_path: Path) -> None:
    LearnedFilter(32, threshold=0.6).save_pretrained(tmp_path)

    class Shipping:
        path = tmp_path

    made: Any = PolicyText.parse("learn2pd@0.25").make(Shipping())  # type: ignore[arg-type]
    assert made.threshold == 0.25


# -- the command ------------------------------------------------------------------------------------------------------


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
        with Path("parts", name).open("a", encoding="utf-8") as file:
            if len(own) == 4:
                file.write(json.dumps(own[3] | {"index": 4}) + '\n{"index": 5, "task"')  # killed while writing
            else:
                file.writelines(json.dumps(row) + "\n" for row in own)  # rows again, as two runs at once would leave
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
    monkeypatch.setattr(cli, "_model", None)
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
        ("--sweep --policy topk", "--sweep: sets policies and steps itself"),
        ("--filter a=b", "--filter: needs --sweep"),
        ("--sweep --filter net", "--filter: 'net' given; NAME=FILE is needed"),
        ("--sweep --filter topk=net", "--filter: 'topk=net' given; NAME=FILE is needed, the name used by nothing else"),
        ("--sweep --filter ours=/no/net", "filter: /no/net does not exist"),
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
    monkeypatch.setattr(cli, "_model", lambda args: golden_model)
    status, _, err = command()
    assert status == 2
    assert "has no accuracy.json that tells what the model learned; --data FILE.jsonl or some of copy" in err


def test_a_broken_accuracy_file_is_named(tmp_path: Path) -> None:
    class Model:
        path = tmp_path

    for text, message in (("{}", 'no "accuracy"'), ("", "is not valid JSON")):
        (tmp_path / "accuracy.json").write_text(text)
        with pytest.raises(ValueError, match=f"accuracy.json:? {message}"):
            trained_tasks(Model())  # type: ignore[arg-type]

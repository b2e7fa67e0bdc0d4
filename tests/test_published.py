"""Published benchmarks: prompts and scorers on rows made up here in the published format, and the command with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from dllm_engine import LLaDA, cli, cli_options, evaluate, published, tokenizer
from dllm_engine.decode import decode
from dllm_engine.published import final_number, parse_list
from dllm_engine.samples import is_right
from dllm_engine.tasks import Sample
from dllm_engine.tokenizer import encode_prompt

THREE = ["Ann Lee", "Joe Hall", "Amy Ford"]
EXAMPLE = ["Roy Bell", "Jean Fox"]
LIST = '["Ann Lee", "Joe Hall", "Amy Ford"]'
METRICS = {
    "copy": "list_match_score",
    "insert_random": "list_random_insert_score",
    "remove_random": "list_random_remove_score",
    "replace_random": "list_random_replace_score",
    "shuffle": "list_shuffle_score",
}
SUDOKU = "1342\n2431\n4123\n3214"
CONFIG = """
puzzle/sudoku_tiny:
  metric: sudoku_score
  prompt: 'Fill the grid.\\n\\nInput:\\n{sudoku}\\nOutput:\\n'
puzzle/latin_tiny:
  metric: latin_square_score
  prompt: A square of size {size} with the symbols {symbols}.
puzzle/gone:
  metric: sudoku_score
  prompt: not there
text/rhyme:
  metric: rhyme_score
  prompt: Rhyme!
"""


def quoted(items: list[str]) -> str:
    return json.dumps(items)


def list_row(task: str, items: list[str]) -> dict[str, Any]:
    """A row of ``task`` with one worked example."""

    def one(own: list[str]) -> dict[str, Any]:
        word = {"word": "Eve Gray"} if task in ("insert_random", "replace_random") else {}
        answer: Any = {"input": own, **word, "example": quoted(own[::-1])} if task != "copy" else quoted(own)
        return {"input": {"context": quoted(own), **word}, "answer": answer}

    row = one(items)
    row["input"]["icl_examples"] = [one(EXAMPLE)]
    return row


def write(file: Path, *rows: dict[str, Any]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Files as ParallelBench publishes them: two rows of each list task, a sudoku, a Latin square."""
    root = tmp_path / "data"
    lines, puzzles = root / "waiting_line", root / "puzzle"
    for directory in (lines, puzzles):
        directory.mkdir(parents=True)
    config = [
        f"waiting_line/{task}:\n  metric: {metric}\n  prompt: 'Do {task}:\n\n    {{context}}\n\n    '"
        for task, metric in METRICS.items()
    ]
    (lines / "task_config.yaml").write_text("\n".join(config), encoding="utf-8")
    for task in METRICS:
        write(lines / f"{task}.jsonl", list_row(task, THREE), list_row(task, THREE[:2]))
    (puzzles / "task_config.yaml").write_text(CONFIG, encoding="utf-8")
    write(puzzles / "sudoku_tiny.jsonl", {"input": {"sudoku": SUDOKU.replace("1", "0")}, "answer": SUDOKU})
    symbols = ["A", "7", "C", "D"]
    write(puzzles / "latin_tiny.jsonl", {"input": {"size": 4, "symbols": symbols}, "answer": {"symbols": symbols}})
    return root


# -- prompts ----------------------------------------------------------------------------------------------------------


def test_prompts_are_the_published_chats(data: Path) -> None:
    samples, left_out = published.read("parallelbench", [data])
    assert [s.task for s in samples] == [
        "puzzle/sudoku_tiny", "puzzle/latin_tiny", *(f"waiting_line/{t}" for t in METRICS for _ in range(2)),
    ]  # fmt: skip
    assert any(line.startswith("puzzle/gone: gone.jsonl is not there") for line in left_out)
    assert any(line.startswith("text/rhyme: its scorer 'rhyme_score' is not here") for line in left_out)
    sudoku, latin, copy, *_, shuffled = samples
    assert sudoku.prompt == f"Fill the grid.\n\nInput:\n{SUDOKU.replace('1', '0')}\nOutput:\n"
    assert latin.about["messages"] == [{"role": "user", "content": latin.prompt}]
    assert copy.about["messages"] == [
        {"role": "user", "content": f"Do copy:\n{quoted(EXAMPLE)}\n"},
        {"role": "assistant", "content": quoted(EXAMPLE)},
        {"role": "user", "content": f"Do copy:\n{LIST}\n"},
    ]
    assert shuffled.about["messages"][1]["content"] == quoted(EXAMPLE[::-1])  # the example among several right answers
    assert all(
        is_right(sample, sample.answer) for sample in samples if "shuffle" in sample.task or sample.task == "copy"
    )


def test_a_file_alone_a_limit_and_files_without_a_prompt(data: Path) -> None:
    lines = data / "waiting_line"
    samples, left_out = published.read("parallelbench", [lines / "copy.jsonl"], 1)
    assert ([s.task for s in samples], left_out) == (["waiting_line/copy"], [])
    assert len(published.read("parallelbench", [data], 1)[0]) == 7
    shutil.copy(lines / "copy.jsonl", lines / "other.jsonl")
    assert any("other.jsonl" in line and "no prompt" in line for line in published.read("parallelbench", [data])[1])


# -- scorers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "items"),
    [
        (LIST, THREE),
        (f"Sure! Here is the list:\n\n```json\n{LIST}\n```\nAnything else?", THREE),
        (f"**{LIST}**", THREE),
        (f"From [1, 2]: {LIST}", THREE),
        ('["Ann Lee"]', ["Ann Lee"]),
        ("['Ann Lee', 'Joe Hall']", None),
        ("[Ann Lee, Joe Hall]", None),
        ('["Ann Lee","Joe Hall"]', None),
        ('["Ann Lee", "Joe Hall"', None),
        ('"Ann Lee", "Joe Hall"]', None),
        ('["Ann "Lee"", "Joe Hall"]', None),
        ("[]", None),
        ("", None),
    ],
)
def test_parse_list(text: str, items: list[str] | None) -> None:
    assert parse_list(text) == items


@pytest.mark.parametrize(
    ("task", "right", "wrong"),
    [
        ("copy", [THREE], [THREE[::-1], [*THREE, THREE[0]], THREE[:2], ["ann Lee", *THREE[1:]]]),
        ("shuffle", [THREE[::-1]], [THREE, [*THREE[::-1], THREE[0]], [THREE[0]] * 3, THREE[:2]]),
        (
            "insert_random",
            [["Eve Gray", *THREE], [*THREE, "Eve Gray"], [THREE[0], "Eve Gray", *THREE[1:]]],
            [THREE, ["Eve Gray", *THREE[::-1]], ["Eve Gray", *THREE, "Eve Gray"], ["Eve Hall", *THREE]],
        ),
        (
            "remove_random",
            [THREE[1:], THREE[::2]],
            [THREE, THREE[:1], THREE[1::-1], ["Eve Gray", THREE[0]], [THREE[0]] * 2],
        ),
        (
            "replace_random",
            [["Eve Gray", *THREE[1:]], [*THREE[:2], "Eve Gray"]],
            [THREE, ["Eve Gray", "Eve Gray", THREE[2]], ["Eve Gray", *THREE], ["Eve Gray", *THREE[:0:-1]]],
        ),
    ],
)
def test_lists(data: Path, task: str, right: list[list[str]], wrong: list[list[str]]) -> None:
    sample = published.read("parallelbench", [data / "waiting_line" / f"{task}.jsonl"])[0][0]
    for items in right:
        assert is_right(sample, f"Here it is:\n{quoted(items)}")
        assert not is_right(sample, ", ".join(items))
    for items in wrong:
        assert not is_right(sample, quoted(items))


def test_puzzles(data: Path) -> None:
    sudoku, latin = published.read("parallelbench", [data / "puzzle"])[0]
    assert is_right(sudoku, f"\n{SUDOKU}\n\n")
    for text in (SUDOKU[::-1], "1342\n2431\n4123", f"Here:\n{SUDOKU}", SUDOKU.replace("\n", " "), "1 3 4 2\n" * 4, ""):
        assert not is_right(sudoku, text)
    square = "A,7,C,D\n7,A,D,C\nC,D,A,7\nD,C,7,A"
    assert is_right(latin, square)
    assert is_right(latin, "Here:\n```\n" + square.replace(",", ", ") + "\n```")
    rows = square.split("\n")
    for lines in (rows[:3], [*rows[:3], rows[0]], ["A,7,C,D,A", *rows[1:]], ["A,A,C,D", *rows[1:]]):
        assert not is_right(latin, "\n".join(lines))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 + 4 = 7 apples. The answer is 7.", "7"),
        ("The answer is 1,234,000 dollars, that is 12 a day", "1234000"),
        ("the answer is: **$18.50**", "18.50"),
        ("The answer is 5? No: the answer is 6", "6"),
        ("The answer is 10 - 3 = 7", "7"),
        ("The answer is 10 - 3 = 7 apples, 2 a day. Check: 7 + 4 = 11", "7"),
        ("The answer is:\n\n**5**\n3 + 4 = 7", "5"),
        ("The answer is 12 / 3 = 4 apples", "4"),
        ("The answer is 36 (= 12 * 3).", "36"),
        ("The answer is 18 = 9 * 2.", "18"),
        ("The answer is 18 = 9 \\times 2 = 2 x (4 + 5)", "18"),
        ("The answer is 5 = 2 + 3 apples", "5"),
        ("The answer is 5 dollars = 2 dollars + $3", "5"),
        ("The answer is 10 - 3 = 7 = 5 + 2", "7"),
        ("The answer is 2 * 6 = 3 * 4", "3"),
        ("The answer is $18{,}000$.", "18000"),
        ("The answer is \\$1\\,018\\,000.", "1018000"),
        ("It is 18{,}00", "00"),
        ("the answer is .5", ".5"),
        ("The answer is $.75.", ".75"),
        ("so \\boxed{42}", "42"),
        ("first 5, then -3", "-3"),
        ("it leaves 5-3", "3"),
        ("- 18", "18"),
        ("3 of 4 say it. The answer is unclear", "4"),
        ("work 1\n#### -10", "-10"),
        ("12 apples, 007 pears", "7"),
        ("none", None),
        ("", None),
    ],
)
def test_final_number(text: str, number: str | None) -> None:
    assert final_number(text) == (None if number is None else Decimal(number))


def test_gsm8k(tmp_path: Path) -> None:
    file = tmp_path / "some.jsonl"
    write(file, {"question": "How many?", "answer": "2 and 3 are <<2+3=5>>5\n#### 1,005"})
    ((sample,), left_out) = published.read("gsm8k", [file])
    assert (sample.task, sample.answer, left_out) == ("gsm8k", "1005", [])
    assert sample.prompt.startswith("How many?\n")
    for text in ("1005", "The answer is 1,005.", "#### 1005", "The answer is $1005.00"):
        assert is_right(sample, text)
    for text in ("5", "1005 or 5", "The answer is 1", "", "one thousand and five"):
        assert not is_right(sample, text)


# -- the command ------------------------------------------------------------------------------------------------------

Command = Callable[..., tuple[int, Any, str, int]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], demo_model: LLaDA) -> Command:
    """Runs ``dllm-engine eval``: status, stdout (read as JSON where it is), stderr, number of decodes."""
    calls = []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        return decode(*arguments, **options)

    monkeypatch.setattr(cli_options, "load", lambda args: demo_model)
    monkeypatch.setattr(evaluate, "decode", counted)

    def run(*arguments: str) -> tuple[int, Any, str, int]:
        try:
            status = cli.main(("eval", *arguments))
        except SystemExit as stop:  # argparse
            status = int(stop.code or 0)
        out, err = capsys.readouterr()
        return status, json.loads(out) if out.startswith("[") else out, err, len(calls)

    return run


def test_parallelbench(command: Command, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def encode(tokenizer: Any, prompt: Any, *, chat: bool | None) -> list[int]:
        asked.append((prompt, chat))
        return encode_prompt(tokenizer, prompt, chat=chat)

    monkeypatch.setattr(tokenizer, "encode_prompt", encode)
    monkeypatch.setattr(evaluate, "answer_text", lambda model, ids: LIST)  # right for one copy in two
    arguments = ("--benchmark", "parallelbench", "--data", str(data), "--policy", "topk=8", "threshold")
    status, records, err, _ = command(*arguments, "--json")
    assert status == 0
    assert "left out: text/rhyme" in err
    assert "the built-in model was not trained on these prompts" in err
    assert all(chat for _, chat in asked)
    assert [len(prompt) for prompt, _ in asked] == [1, 1, *[3] * 10]
    assert [(r["policy"], r["prompts"]) for r in records] == [("topk=8", 12), ("threshold", 12)]
    for record in records:
        assert record["per_task"]["waiting_line/copy"]["accuracy"] == 0.5
        assert record["tasks"]["waiting_line/copy"] == 0.5
        assert record["task_mean"]["accuracy"] == pytest.approx(0.5 / 7)  # of seven tasks, whatever their sizes
        assert record["accuracy"] == pytest.approx(1 / 12)
    assert records[0]["per_task"]["waiting_line/copy"]["loss"] is None
    assert records[1]["per_task"]["waiting_line/copy"]["loss"] == 0.0
    status, out, _, _ = command(*arguments, "--limit", "1")
    assert status == 0
    for text in ("Task by task", "waiting_line/insert_random", "puzzle/latin_tiny", "mean of the tasks"):
        assert text in out


def test_gsm8k_leaves_room_for_the_working(command: Command, tmp_path: Path) -> None:
    write(tmp_path / "g.jsonl", {"question": "How many apples has Ann?", "answer": "#### 3"})
    arguments = ("--benchmark", "gsm8k", "--data", str(tmp_path / "g.jsonl"), "--policy", "threshold", "--json")
    _, (record,), err, _ = command(*arguments)
    assert record["gen_length"] == 256
    assert set(record["per_task"]) == {"gsm8k"}
    assert "gen_length 256: room for the model's own working" in err
    assert command(*arguments, "--gen-length", "32")[1][0]["gen_length"] == 32


GOOD = {"question": "?", "answer": "#### 1"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--benchmark mmlu --data data", "--benchmark: 'mmlu' given; known: parallelbench, gsm8k"),
        ("--benchmark parallelbench", "--benchmark: needs --data"),
        ("--benchmark parallelbench --data nowhere", "nowhere: no such file or directory"),
        ("--benchmark gsm8k --data nowhere.jsonl", "nowhere.jsonl: no such file or directory"),
        ("--benchmark gsm8k --data data", "data: a directory given; a file of JSON lines"),
        ("--benchmark parallelbench --data empty", "empty: no task_config.yaml there"),
        ("--benchmark parallelbench --data text", "text: no task that can be scored here: rhyme: its scorer"),
        ("--benchmark parallelbench --data odd", 'task_config.yaml: tasks with a "prompt" and a "metric" are needed'),
        ("--benchmark parallelbench --data yaml", "task_config.yaml: not YAML"),
        ("--benchmark parallelbench --data bytes", "task_config.yaml: not YAML"),
        ("--benchmark parallelbench --data data --no-chat", "--no-chat: the questions of a benchmark"),
        ("--benchmark gsm8k --tasks copy --data g.jsonl", "not allowed with argument"),
        ("--benchmark gsm8k --data g.jsonl", 'g.jsonl, line 2: {"question": str, "answer": "… #### NUMBER"} is needed'),
        ("--benchmark gsm8k --data none.jsonl", "none.jsonl: no row in it"),
    ],
)
def test_errors_come_before_the_first_pass(
    command: Command, data: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, message: str
) -> None:
    monkeypatch.chdir(data.parent)
    for name, config in (("empty", None), ("text", "rhyme: {prompt: a, metric: b}"), ("odd", "- a"), ("yaml", "a: [")):
        Path(name).mkdir()
        if config is not None:
            Path(name, "task_config.yaml").write_text(config, encoding="utf-8")
    Path("bytes").mkdir()
    Path("bytes", "task_config.yaml").write_bytes(b"a: \xe9")
    write(Path("g.jsonl"), GOOD, GOOD | {"answer": "1"})
    write(Path("none.jsonl"))
    status, out, err, decodes = command(*arguments.split())
    assert (status, out, decodes) == (2, "", 0)
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("file", "row"),
    [
        ("waiting_line/copy.jsonl", {"input": {}, "answer": LIST}),
        ("waiting_line/copy.jsonl", {"input": {"context": LIST}}),
        ("waiting_line/copy.jsonl", {"input": {"context": LIST}, "answer": "Ann Lee"}),
        ("waiting_line/copy.jsonl", {"input": {"context": LIST}, "answer": [3]}),
        ("waiting_line/shuffle.jsonl", {"input": {"context": LIST}, "answer": {"input": LIST, "example": LIST}}),
        ("waiting_line/insert_random.jsonl", {"input": {"context": LIST}, "answer": {"input": THREE, "example": LIST}}),
        ("waiting_line/shuffle.jsonl", {"input": {"context": LIST, "icl_examples": [{}]}, "answer": {"input": THREE}}),
        ("waiting_line/shuffle.jsonl", {"input": {"context": LIST}, "answer": {"input": THREE, "n_words": 2}}),
        ("puzzle/sudoku_tiny.jsonl", {"input": {"sudoku": SUDOKU}, "answer": "1234"}),
        ("puzzle/sudoku_tiny.jsonl", {"input": {"sudoku": SUDOKU}, "answer": None}),
        ("puzzle/sudoku_tiny.jsonl", {"input": {"sudoku": SUDOKU}, "answer": SUDOKU.replace("4", "0")}),
        ("puzzle/latin_tiny.jsonl", {"input": {"size": 4, "symbols": "AB"}, "answer": {"symbols": []}}),
        ("puzzle/latin_tiny.jsonl", {"input": {"size": 4, "symbols": "AB"}, "answer": "AB"}),
    ],
)
def test_malformed_rows(command: Command, data: Path, file: str, row: dict[str, Any]) -> None:
    first = (data / file).read_text(encoding="utf-8").split("\n")[0]
    write(data / file, json.loads(first), row)
    status, _, err, decodes = command("--benchmark", "parallelbench", "--data", str(data))
    assert (status, decodes) == (2, 0)
    assert f"{Path(file).name}, line 2: not a published row of {file.removesuffix('.jsonl')}" in err


def test_samples_of_other_sources_keep_their_scorers() -> None:
    assert is_right(Sample("exact match", "?", "a"), " a ")

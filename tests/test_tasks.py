"""Tasks, scorers and the demo model's tokenizer."""

from __future__ import annotations

import importlib.util
import json
import random
import re
from pathlib import Path
from types import ModuleType

import pytest

from dllm_engine import samples, tasks
from dllm_engine.tasks import grids

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def demo_tokenizer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_tokenizer", ROOT / "benchmarks" / "demo_tokenizer.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("task", tasks.names())
def test_own_answer_is_right_and_broken_ones_are_wrong(task: str) -> None:
    rng = random.Random(1)
    for _ in range(50):
        sample = tasks.generate(task, rng)
        assert tasks.score(sample, sample.answer)
        assert not tasks.score(sample, "")
        if task.endswith("_sums"):
            continue
        assert not tasks.score(sample, sample.answer + ", Alan Wells")
        first, rest = sample.answer.split(", ", 1)
        assert not tasks.score(sample, rest + ", " + rest)
        assert not tasks.score(sample, first)
        assert not tasks.score(sample, sample.answer.replace(", ", " ", 1))


def test_worded_sums_are_worked_out_in_numbers_that_are_right() -> None:
    rng = random.Random(2)
    signs = {"+": "+", "-": "-", "*": "*", "plus": "+", "minus": "-", "times": "*"}
    seen = set()
    for _ in range(300):
        sample = tasks.generate("worded_sums", rng, steps=5, largest=99, multiply=True)
        story = [int(n) for n in re.findall(r"\d+", sample.prompt)]
        value, used = story[0], 1
        for a, word, k, b in re.findall(r"(\d+) ([-+*]|plus|minus|times) (\d+)\D+(\d+)", sample.answer):
            sign = signs[word]
            assert int(a) == value
            assert int(k) == story[used]
            value = {"+": value + int(k), "-": value - int(k), "*": value * int(k)}[sign]
            assert int(b) == value
            assert 0 <= value <= 99
            used += 1
            seen.add(word)
        assert used == len(story)
        assert sample.about["result"] == value
        assert tasks.score(sample, f"so the answer is {value}")
        assert not tasks.score(sample, f"the answer is 1{value}")
        assert not tasks.score(sample, f"the answer is {value} no the answer is {value + 1}")
        assert not tasks.score(sample, str(value))
        worked = tasks.Sample("worked_sums", sample.prompt, sample.answer, sample.about)
        assert tasks.score(worked, sample.answer)
        wrong = re.sub(r"(\d+)\. (the answer)", lambda m: f"{int(m[1]) + 1}. {m[2]}", sample.answer)
        assert tasks.score(sample, wrong)  # only the last number counts there
        assert not tasks.score(worked, wrong)
        assert not tasks.score(worked, sample.answer + " now")
        mixed = sample.answer.replace(" + ", " minus ").replace(" - ", " plus ").replace(" * ", " plus ")
        assert mixed == sample.answer or not tasks.score(worked, mixed)
    assert seen == set(signs)
    small = [tasks.generate("worded_sums", rng, steps=1, largest=5) for _ in range(100)]
    assert max(int(n) for s in small for n in re.findall(r"\d+", s.prompt + s.answer)) == 5
    assert not any("times" in s.prompt for s in small)


def test_bounds_are_reached() -> None:
    rng = random.Random(5)
    lists = [tasks.generate("insert_index", rng, longest=3).about for _ in range(30)]
    assert {about["index"] for about in lists} == {0, 1, 2, 3}, "a place before each of three people and behind them"
    sums = [tasks.generate("worded_sums", rng, steps=4, largest=2, multiply=True) for _ in range(50)]
    assert ("*", 1, 2, 2) in [step for sample in sums for step in sample.about["steps"]]
    assert not any(sign == "*" and k < 2 for sample in sums for sign, _, k, _ in sample.about["steps"])


@pytest.mark.parametrize("task", tasks.names())
def test_a_seed_repeats(task: str) -> None:
    first, second = (tasks.generate(task, random.Random(7)) for _ in range(2))
    assert first == second
    assert tasks.generate(task, random.Random(8)) != first


def test_list_rules_on_one_line() -> None:
    line = ["Eva Cole", "Ada Young", "Bob Adams"]

    def row(answer: object, **given: object) -> dict[str, object]:
        return {"input": {"context": json.dumps(line), **given}, "answer": answer}

    def answer(task: str, *people: str, **given: object) -> None:
        sample = tasks.from_parallelbench(row(json.dumps(people), **given), task)
        assert sample.answer == ", ".join(people)
        assert tasks.score(sample, ", ".join(people))

    answer("copy", *line)
    answer("reverse", "Bob Adams", "Ada Young", "Eva Cole")
    answer("sort", "Ada Young", "Bob Adams", "Eva Cole")  # by the whole name, as the published answers are
    answer("insert_index", "Eva Cole", "Kim Ray", "Ada Young", "Bob Adams", word="Kim Ray", index=1)
    answer("remove_index", "Eva Cole", "Bob Adams", index=1)
    answer("replace_index", "Kim Ray", "Ada Young", "Bob Adams", word="Kim Ray", index=0)


def test_random_tasks_accept_every_right_answer_and_no_other() -> None:
    about = {"context": '["Eva Cole", "Ada Young"]', "word": "Kim Ray"}

    def right(task: str, text: str) -> bool:
        return tasks.score(tasks.from_parallelbench({"input": about, "answer": {}}, task), text)

    for text in ("Kim Ray, Eva Cole, Ada Young", "Eva Cole, Kim Ray, Ada Young", "Eva Cole, Ada Young, Kim Ray"):
        assert right("insert_random", text)
    assert not right("insert_random", "Kim Ray, Ada Young, Eva Cole")
    assert right("remove_random", "Eva Cole")
    assert not right("remove_random", "Kim Ray")
    assert right("replace_random", "Kim Ray, Ada Young")
    assert not right("replace_random", "Kim Ray, Kim Ray")
    assert right("shuffle", "Ada Young, Eva Cole")
    assert not right("shuffle", "Eva Cole, Ada Young")
    assert not right("shuffle", "Eva Cole, Eva Cole")
    assert not right("shuffle", "Ada Young, Eva Cole, Ada Young")


def test_sudoku_row_and_grid_counts() -> None:
    sample = tasks.from_parallelbench(
        {"input": {"sudoku": "0342\n2431\n4123\n3214"}, "answer": "1342\n2431\n4123\n3214"}, "sudoku"
    )
    assert sample.prompt == "Sudoku: 0 3 4 2, 2 4 3 1, 4 1 2 3, 3 2 1 4"
    assert tasks.score(sample, "1 3 4 2, 2 4 3 1, 4 1 2 3, 3 2 1 4")
    assert (len(grids._latin_squares()), len(grids._sudokus())) == (576, 288)


def solutions(cells: str) -> int:
    """Of a sudoku, 16 digits row by row: the first empty cell with each digit that its row, column and box allow."""
    if "0" not in cells:
        return 1
    at, found = cells.index("0"), 0
    for digit in "1234":
        near = (
            c
            for i, c in enumerate(cells)
            if i // 4 == at // 4 or i % 4 == at % 4 or (i // 8, i % 4 // 2) == (at // 8, at % 4 // 2)
        )
        if digit not in near:
            found += solutions(cells[:at] + digit + cells[at + 1 :])
    return found


@pytest.mark.parametrize("given", [5, 8, 12])
def test_a_sudoku_has_one_solution(given: int) -> None:
    rng = random.Random(given)
    for _ in range(5):
        puzzle, solution = (grid.replace("\n", "") for grid in grids.make_sudoku(rng, given))
        assert 16 - puzzle.count("0") == given
        assert solutions(puzzle) == solutions(solution) == 1
        assert all(p in ("0", d) for p, d in zip(puzzle, solution, strict=True))


def test_latin_square_accepts_any_square_on_its_symbols() -> None:
    sample = tasks.Sample("latin_square", "", "", {"symbols": list("ABCD")})
    assert tasks.score(sample, "A B C D, B A D C, C D A B, D C B A")
    assert not tasks.score(sample, "A B C D, A B C D, C D A B, D C B A")
    assert not tasks.score(sample, "A B C D, B A D C, C D A B, D C B E")
    assert not tasks.score(sample, "A B C D, B A D, C D A B, D C B A")


def test_errors_name_what_was_given() -> None:
    with pytest.raises(ValueError, match="'fly' given; known: copy"):
        tasks.generate("fly", random.Random(0))
    with pytest.raises(ValueError, match="shortest, longest: 5, 4"):
        tasks.generate("copy", random.Random(0), shortest=5, longest=4)
    with pytest.raises(ValueError, match="steps, largest: 0, 20 given"):
        tasks.generate("worded_sums", random.Random(0), steps=0)
    with pytest.raises(ValueError, match="'worded_sums' is not one of ParallelBench"):
        tasks.from_parallelbench({}, "worded_sums")
    with pytest.raises(ValueError, match="not a published row of task 'insert_index'"):
        tasks.from_parallelbench({"input": {"context": "[]"}, "answer": "[]"}, "insert_index")
    with pytest.raises(ValueError, match="differs from the rule"):
        tasks.from_parallelbench({"input": {"context": '["A B"]'}, "answer": '["C D"]'}, "copy")
    with pytest.raises(ValueError, match="shortest, longest: 80, 92 given; 2 ≤ shortest ≤ longest ≤ 91 allowed"):
        tasks.generate("copy", random.Random(0), shortest=80, longest=92)
    tasks.generate("insert_random", random.Random(0), shortest=91, longest=91)
    for name in ("poem", "sort_of"):
        with pytest.raises(ValueError, match=f"no task is called '{name}'"):
            tasks.task_of_file(f"data/{name}.jsonl")
    assert tasks.task_of_file("data/sudoku_n4_12.jsonl") == "sudoku"


@pytest.mark.parametrize(
    ("task", "row"),
    [
        ("shuffle", {"input": {"context": '["A B"]'}, "answer": {}}),
        ("shuffle", {"input": {"context": '["A B", "A B"]'}, "answer": {}}),
        ("copy", {"input": {"context": '["A B"]'}}),
        ("copy", {"input": {"context": '["A B"]'}, "answer": "A B"}),
        ("copy", {"input": {"context": '["A B", 5]'}, "answer": "[]"}),
        ("copy", {"input": "A B", "answer": "[]"}),
        ("remove_random", {"input": {"context": "[]"}, "answer": {}}),
        ("copy", {"input": {"context": '"A B"'}, "answer": {}}),
        ("copy", {"input": {"context": '["A B", 5]'}, "answer": {}}),
        ("remove_index", {"input": {"context": '["A B", "C D"]', "index": -1}, "answer": {}}),
        ("remove_index", {"input": {"context": '["A B", "C D"]', "index": 2}, "answer": {}}),
        ("remove_index", {"input": {"context": '["A B", "C D"]', "index": True}, "answer": {}}),
        ("insert_index", {"input": {"context": '["A B", "C D"]', "index": 3, "word": "E F"}, "answer": {}}),
        ("insert_index", {"input": {"context": '["A B", "C D"]', "index": 2, "word": 5}, "answer": {}}),
        ("sudoku", {"input": {"sudoku": "0342"}, "answer": 5}),
        ("sudoku", {"input": {"sudoku": "12"}, "answer": "zz"}),
        ("sudoku", {"input": {"sudoku": "0342\n2431\n4123\n3214"}, "answer": "0342\n2431\n4123\n3214"}),
        ("sudoku", {"input": {"sudoku": "0342\n2431\n4123\n3215"}, "answer": "1342\n2431\n4123\n3215"}),
        ("sudoku", {"input": {"sudoku": "0342\n2431\n4123\n3214"}, "answer": "1342\n2431\n4123\n3241"}),
        ("latin_square", {"input": {"symbols": ["A", "B"]}, "answer": {}}),
        ("latin_square", {"input": {"symbols": "AAAA"}, "answer": {}}),
        ("latin_square", {"input": {"symbols": ["A", "B", "C", "DE"]}, "answer": {}}),
        ("latin_square", {"input": {"symbols": ["A", "B", "C", ","]}, "answer": {}}),
    ],
    ids=str,
)
def test_a_published_row_that_cannot_be_asked_is_named(task: str, row: dict[str, object], tmp_path: Path) -> None:
    file = tmp_path / f"{task}.jsonl"
    file.write_text("\n" + json.dumps(row), encoding="utf-8")
    for read in (samples.read_samples, samples.read_parallelbench):
        with pytest.raises(ValueError, match=f"{task}.jsonl, line 2: not a published row of task '{task}'"):
            read(file)


def test_plain_rows_may_have_an_input_and_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('\ufeff{"prompt": "Copy", "input": "", "answer": "x"}\n', encoding="utf-8")
    assert [(sample.task, sample.prompt) for sample in samples.read_samples(file)] == [(samples.EXACT, "Copy")]
    file.write_text('{"prompt": "Copy", "answer": 42}', encoding="utf-8")
    with pytest.raises(ValueError, match='rows.jsonl, line 1: "answer" is 42: a text'):
        samples.read_samples(file)
    file.write_bytes(b'{"prompt": "caf\xe9"}')
    with pytest.raises(ValueError, match="rows.jsonl: not UTF-8"):
        samples.read_samples(file)


def test_tokenizer_gives_every_text_back(demo_tokenizer: ModuleType, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    size = demo_tokenizer.save_tokenizer(tmp_path, 1024)
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    assert len(tokenizer) == size == len(set(demo_tokenizer.vocabulary()))
    rng = random.Random(3)
    for task in tasks.names():
        for _ in range(20):
            sample = tasks.generate(task, rng)
            for text in (sample.prompt, sample.answer):
                ids = tokenizer(text)["input_ids"]
                assert tokenizer.unk_token_id not in ids
                assert tokenizer.decode(ids) == text
    assert len(tokenizer("Alan Wells, Grace Wright")["input_ids"]) == 5
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": " Copy: Alan Wells "}], tokenize=False, add_generation_prompt=True
    )
    assert chat == (
        "<|startoftext|><|start_header_id|>user<|end_header_id|>Copy: Alan Wells<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>"
    )
    ids = tokenizer(chat, add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids).replace(" ", "") == chat.replace(" ", "")

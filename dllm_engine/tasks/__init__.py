"""The demo model's tasks: generators, prompt template and 0/1 scorers, also for ParallelBench's published items.

The tasks are those of ParallelBench (list operations on a waiting line, Latin square, sudoku 4x4), in a short template
of our own, and worded sums. Nothing here needs torch.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dllm_engine.tasks import grids, lists, sums
from dllm_engine.tasks.names import FIRST, LAST

__all__ = ["Sample", "from_parallelbench", "generate", "names", "score", "task_of_file"]

_LISTS = lists.TASKS
# The same questions, scored by the final number (as published scorers of such tasks do) or by the whole working: a
# decoding rule can garble it while the number stays right.
_SUMS: dict[str, Callable[[str, dict[str, Any]], bool]] = {
    "worded_sums": sums.score,
    "worked_sums": sums.score_working,
}
_GRIDS: dict[str, Callable[[str, dict[str, Any]], bool]] = {
    "sudoku": grids.score_sudoku,
    "latin_square": grids.score_latin,
}


@dataclass(frozen=True)
class Sample:
    """One question.

    Attributes:
        task: a name of `names`. prompt: the user's message. answer: a right answer (of possibly several).
        about: what the scorer needs: ``items``, ``word``, ``index`` of lists, ``symbols``, ``solution``, ``result`` and
            the other facts of a sum.
    """

    task: str
    prompt: str
    answer: str
    about: dict[str, Any] = field(default_factory=dict)


def names() -> list[str]:
    """Every task."""
    return [*_LISTS, *_GRIDS, *_SUMS]


def generate(
    task: str,
    rng: random.Random,
    *,
    shortest: int = 3,
    longest: int = 6,
    steps: int = 3,
    largest: int = 20,
    multiply: bool = False,
) -> Sample:
    """A fresh sample.

    Args:
        task: a name of `names`.
        rng: the only source of chance.
        shortest, longest: people in the list of a list task.
        steps: worded sums have one to ``steps`` operations, on numbers in 0 to ``largest``.
        multiply: whether worded sums may multiply.

    Raises:
        ValueError: unknown task, a range that is empty or longer than 91 people, no step, or numbers beyond 0 to 99.
    """
    _known(task)
    if task in _SUMS:
        if steps < 1 or not 1 <= largest <= 99:
            raise ValueError(f"steps, largest: {steps}, {largest} given; steps ≥ 1 and 1 ≤ largest ≤ 99 allowed")
        return Sample(task, *sums.make(rng, rng.randint(1, steps), largest, multiply))
    if task == "sudoku":
        puzzle, solution = grids.make_sudoku(rng)
        return _sudoku(puzzle, solution)
    if task == "latin_square":
        return _latin(rng.sample("ABCDEFGHIJKLMNOPQRSTUVWXYZ", 4), rng)
    most = len(FIRST) - 1  # one more is drawn, to insert or replace with
    if not 2 <= shortest <= longest <= most:
        raise ValueError(f"shortest, longest: {shortest}, {longest} given; 2 ≤ shortest ≤ longest ≤ {most} allowed")
    count = rng.randint(shortest, longest)
    people = [f"{a} {b}" for a, b in zip(rng.sample(FIRST, count + 1), rng.sample(LAST, count + 1), strict=True)]
    items, word = people[:-1], people[-1]
    index = rng.randrange(count + 1 if task == "insert_index" else count)
    return _list_sample(task, items, word, index, rng)


def score(sample: Sample, text: str) -> bool:
    """Whether ``text`` answers the sample, by ParallelBench's strict rules (tasks with several answers accept each)."""
    if sample.task in _GRIDS:
        return _GRIDS[sample.task](text, sample.about)
    if sample.task in _SUMS:
        return _SUMS[sample.task](text, sample.about)
    return lists.score(sample.task, text, sample.about)


def from_parallelbench(row: dict[str, Any], task: str) -> Sample:
    """A published row (``{"input": {...}, "answer": ...}``) in our template.

    Raises:
        ValueError: unknown task, or a row that is not of its task.
    """
    _known(task)
    if task in _SUMS:
        raise ValueError(f"task: {task!r} is not one of ParallelBench")
    try:
        given = row["input"]
        if task == "sudoku":
            return _sudoku(given["sudoku"], row["answer"])
        if task == "latin_square":
            return _latin(list(given["symbols"]), random.Random(0))
        items = json.loads(given["context"])
        if not lists.are_names(items):
            raise ValueError(f"context: {given['context']!r} given; a list of texts is needed")
        sample = _list_sample(task, items, given.get("word"), given.get("index"), random.Random(0))
        answer = json.loads(row["answer"]) if isinstance(row["answer"], str) else None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"not a published row of task {task!r}: {type(error).__name__}: {error}") from None
    if answer is not None and answer != lists.parse(sample.answer):
        raise ValueError(f"published answer {row['answer']} differs from the rule of task {task!r}: {sample.answer}")
    return sample


def task_of_file(path: str | Path) -> str:
    """Task of a published file, from its name: ``copy.jsonl``, ``sudoku_n4_12.jsonl``.

    Raises:
        ValueError: no task has that name.
    """
    stem = Path(path).stem
    for task in names():
        if stem == task or (task in _GRIDS and stem.startswith(task)):
            return task
    raise ValueError(f"{path}: no task is called {stem!r}; known: {', '.join(names())}")


def _known(task: str) -> None:
    if task not in names():
        raise ValueError(f"task: {task!r} given; known: {', '.join(names())}")


def _list_sample(task: str, items: list[str], word: str | None, index: int | None, rng: random.Random) -> Sample:
    rule, last = _LISTS[task], len(items) - (task != "insert_index")
    if rule.word and not isinstance(word, str):
        raise ValueError(f"word: {word!r} given; a text is needed")
    if rule.index and (type(index) is not int or not 0 <= index <= last):
        raise ValueError(f"index: {index!r} given; 0 to {last} allowed")
    prompt = lists.question(task, items, word, index)
    about = {"items": items, "word": word, "index": index}
    return Sample(task, prompt, lists.render(rule.answer(items, word, index, rng)), about)


def _sudoku(puzzle: str, solution: str) -> Sample:
    given, solved = grids.rows(puzzle, "0-4"), grids.rows(solution)
    if not given or not solved or any(p not in ("0", d) for p, d in zip("".join(given), "".join(solved), strict=True)):
        raise ValueError(
            f"sudoku, answer: {puzzle!r}, {solution!r} given; a 4x4 grid of 0 to 4 is needed, and one of 1 to 4 that"
            " agrees with it"
        )
    puzzle, solution = "\n".join(given), "\n".join(solved)
    return Sample("sudoku", f"Sudoku: {grids.render(puzzle)}", grids.render(solution), {"solution": solution})


def _latin(symbols: list[str], rng: random.Random) -> Sample:
    if not len(symbols) == len({*symbols}) == 4 or not all(re.fullmatch(r"[^\s,]", symbol) for symbol in symbols):
        raise ValueError(f"symbols: {symbols} given; four different characters are needed, no space or comma")
    answer = grids.render(grids.make_latin(symbols, rng))
    return Sample("latin_square", "Latin square: " + " ".join(symbols), answer, {"symbols": symbols})

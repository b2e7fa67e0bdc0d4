"""List operations on a waiting line: rule, template and scorer of each (as in ParallelBench)."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Answer = Callable[[list[str], Any, Any, random.Random], list[str]]


@dataclass(frozen=True)
class Rule:
    """prompt: template before the list. answer: (items, word, index, rng) -> a right list."""

    prompt: str
    answer: Answer
    word: bool = False
    index: bool = False


def _insert(items: list[str], word: str, index: int) -> list[str]:
    return [*items[:index], word, *items[index:]]


def _remove(items: list[str], index: int) -> list[str]:
    return items[:index] + items[index + 1 :]


def _replace(items: list[str], word: str, index: int) -> list[str]:
    return [*items[:index], word, *items[index + 1 :]]


def _shuffled(items: list[str], rng: random.Random) -> list[str]:
    if len(set(items)) < 2:
        raise ValueError(f"items: {items} given; at least two different names are needed to shuffle")
    while (mixed := rng.sample(items, len(items))) == items:
        pass
    return mixed


# ParallelBench's story asks for the order of last names, its published answers are in the order of the whole names
TASKS: dict[str, Rule] = {
    "copy": Rule("Copy", lambda items, word, index, rng: list(items)),
    "reverse": Rule("Reverse", lambda items, word, index, rng: items[::-1]),
    "sort": Rule("Sort", lambda items, word, index, rng: sorted(items)),
    "insert_index": Rule(
        "Insert {word} at {index}", lambda items, word, index, rng: _insert(items, word, index), True, True
    ),
    "remove_index": Rule("Remove {index}", lambda items, word, index, rng: _remove(items, index), index=True),
    "replace_index": Rule(
        "Replace {index} with {word}", lambda items, word, index, rng: _replace(items, word, index), True, True
    ),
    "insert_random": Rule(
        "Insert {word} anywhere",
        lambda items, word, index, rng: _insert(items, word, rng.randrange(len(items) + 1)),
        word=True,
    ),
    "remove_random": Rule("Remove anyone", lambda items, word, index, rng: _remove(items, rng.randrange(len(items)))),
    "replace_random": Rule(
        "Replace anyone with {word}",
        lambda items, word, index, rng: _replace(items, word, rng.randrange(len(items))),
        word=True,
    ),
    "shuffle": Rule("Shuffle", lambda items, word, index, rng: _shuffled(items, rng)),
}


def are_names(items: Any) -> bool:
    """Whether it is a list of texts, at least one."""
    return isinstance(items, list) and bool(items) and all(isinstance(item, str) for item in items)


def render(items: list[str]) -> str:
    return ", ".join(items)


def question(task: str, items: list[str], word: str | None, index: int | None) -> str:
    """The prompt; people are numbered from 0, so that a small model can find the one at an index."""
    line = ", ".join(f"{i} {item}" for i, item in enumerate(items))
    return TASKS[task].prompt.format(word=word, index=index) + ": " + line


def parse(text: str) -> list[str]:
    return text.strip().split(", ")


def score(task: str, text: str, about: dict[str, Any]) -> bool:
    """Strict: the whole text must be the list, no fixed punctuation may be missing."""
    return is_answer(task, parse(text), about)


def is_answer(task: str, given: list[str], about: dict[str, Any]) -> bool:
    """Whether a parsed list is a right one (tasks with several answers accept each)."""
    items, word = about["items"], about["word"]
    if task == "shuffle":
        return Counter(given) == Counter(items) and given != items
    if task == "insert_random":
        return any(given == _insert(items, word, i) for i in range(len(items) + 1))
    if task == "remove_random":
        return any(given == _remove(items, i) for i in range(len(items)))
    if task == "replace_random":
        return any(given == _replace(items, word, i) for i in range(len(items)))
    return given == TASKS[task].answer(items, word, about["index"], random.Random(0))

"""Worded sums: additions, subtractions and (at larger sizes) multiplications told as a story, answered step by step.

The working mixes what real text mixes: copied words, interchangeable phrasings whose words belong together, and carried
results that only the step before gives. Phrasings of a sentence have the same number of tokens, and so have the
sentences that tell of a step and work it out: the small demo model finds the number by its distance.
"""

from __future__ import annotations

import random
import re
from typing import Any

from dllm_engine.tasks.names import FIRST

_THINGS = "apples marbles coins pencils stickers books boxes".split()
_OPENING = ("{who} has {n} {things} now.", "{who} starts with {n} {things}.")
_TOLD = {
    "+": (
        "then {who} buys {k} more {things}.",
        "then {who} finds {k} more {things}.",
        "then {who} gets {k} more {things}.",
    ),
    "-": (
        "then {who} gives {k} {things} away.",
        "then {who} takes {k} {things} away.",
        "then {who} gives {k} {things} back.",
    ),
    "*": ("then {who} has {k} times this.",),
}
_QUESTION = ("how many {things} are left?", "how many {things} has {who}?")
_FIRST_SENTENCE = ("{who} starts with {n} {things}.", "first {who} has {n} {things}.", "now {who} has {n} {things}.")
_WORKED = {
    "+": ("then {a} + {k} = {b}.", "next {a} + {k} = {b}.", "so {a} plus {k} is {b}.", "{a} plus {k} more makes {b}."),
    "-": (
        "then {a} - {k} = {b}.",
        "next {a} - {k} = {b}.",
        "so {a} minus {k} is {b}.",
        "{a} minus {k} now leaves {b}.",
    ),
    "*": ("then {a} * {k} = {b}.", "next {a} * {k} = {b}.", "so {a} times {k} is {b}.", "{a} times {k} now makes {b}."),
}


def make(rng: random.Random, steps: int, largest: int, multiply: bool) -> tuple[str, str, dict[str, Any]]:
    """Story, worked answer and facts of a sum of ``steps`` operations whose numbers all lie in 0 to ``largest``."""
    who, things = rng.choice(FIRST), rng.choice(_THINGS)
    value = rng.randint(0, largest)
    told = [rng.choice(_OPENING).format(who=who, n=value, things=things)]
    worked = [rng.choice(_FIRST_SENTENCE).format(who=who, n=value, things=things)]
    facts: dict[str, Any] = {"who": who, "things": things, "start": value, "steps": []}
    for _ in range(steps):
        possible = [("+", value < largest), ("-", value > 0), ("*", multiply and 0 < 2 * value <= largest)]
        sign = rng.choice([sign for sign, fits in possible if fits])
        if sign == "*":
            k = rng.randint(2, min(9, largest // value))
            result = value * k
        elif sign == "+":
            k = rng.randint(1, largest - value)
            result = value + k
        else:
            k = rng.randint(1, value)
            result = value - k
        told.append(rng.choice(_TOLD[sign]).format(who=who, k=k, things=things))
        worked.append(rng.choice(_WORKED[sign]).format(a=value, k=k, b=result))
        facts["steps"].append((sign, value, k, result))
        value = result
    told.append(rng.choice(_QUESTION).format(who=who, things=things))
    return " ".join(told), " ".join([*worked, f"the answer is {value}"]), facts | {"result": value}


def answer(text: str) -> int | None:
    """The number after the last "the answer is"."""
    found = re.findall(r"the answer is (\d+)", text)
    return int(found[-1]) if found else None


def score(text: str, about: dict[str, Any]) -> bool:
    """Whether the `answer` is right."""
    return answer(text) == about["result"]


def score_working(text: str, about: dict[str, Any]) -> bool:
    """Stricter than `score`: the whole answer must be a right working, each sentence in any one of its phrasings."""
    sentences = [[t.format(who=about["who"], n=about["start"], things=about["things"]) for t in _FIRST_SENTENCE]]
    sentences += [[t.format(a=a, k=k, b=b) for t in _WORKED[sign]] for sign, a, k, b in about["steps"]]
    working = " ".join("(?:" + "|".join(map(re.escape, phrasings)) + ")" for phrasings in sentences)
    return re.fullmatch(rf"{working} the answer is {about['result']}", text) is not None

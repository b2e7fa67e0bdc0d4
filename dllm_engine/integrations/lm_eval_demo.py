"""Fresh questions of the kinds that the built-in model learned: the tasks in lm_eval_tasks/ for lm-evaluation-harness.

``--metadata questions=500 question_seed=3`` asks others. They need ``--apply_chat_template``.
"""

from __future__ import annotations

import json
import random
from typing import Any

from dllm_engine import tasks

_ORDERS = ("copy", "reverse", "sort")


def questions(task: str, questions: int = 200, question_seed: int = 0, **other: Any) -> dict[str, Any]:
    """The split ``test``. ``other``: what lm-eval hands to every task, model arguments among it."""
    from datasets import Dataset

    rng = random.Random(f"{task} {question_seed}")
    make = _choice if task == "choice" else _question
    return {"test": Dataset.from_list([make(task, rng) for _ in range(questions)])}


def _question(task: str, rng: random.Random) -> dict[str, Any]:
    sample = tasks.generate(task, rng)
    return {"task": task, "question": sample.prompt, "answer": sample.answer, "about": json.dumps(sample.about)}


def _choice(task: str, rng: random.Random) -> dict[str, Any]:
    """A question about the order of a list; the answers of the other orders, and a slip, are the wrong choices."""
    order = rng.choice(_ORDERS)
    sample = tasks.generate(order, rng)
    items = sample.about["items"]
    slip = sample.answer.split(", ")
    slip[-2:] = slip[:-3:-1]
    answers = {sample.answer, *map(", ".join, (items, items[::-1], sorted(items), slip))}
    choices = rng.sample(sorted(answers), len(answers))
    return {"task": order, "question": sample.prompt, "choices": choices, "gold": choices.index(sample.answer)}


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """By the task's own strict scorer."""
    sample = tasks.Sample(doc["task"], doc["question"], doc["answer"], json.loads(doc["about"]))
    return {"acc": float(tasks.score(sample, results[0]))}

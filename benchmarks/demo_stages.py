"""What each stage of the demo model's training asks, and when it is passed."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from dllm_engine import tasks


@dataclass(frozen=True)
class Stage:
    """What a stage trains on and must reach.

    Attributes:
        tasks: weights of the mixture; those with a gate are scaled by how much is still wrong (see `Batches.focus`).
        names: names in a list, at most: at the start and at the end. A task's lists grow by one when 60 % of them are
            right.
        canvases: answer lengths and their weights.
        gates: share of right answers that each task must reach.
        steps: length of the training.
        rate: share of the full learning rates (0.02 and 3e-3), held for the share ``hold`` of the steps, then decayed
            linearly to 0.
        watch: steps between two looks at the accuracy, which lengthen the lists. starts: names in a task's first lists,
            where not ``names[0]``.
        sums: size of the worded sums (steps, largest number, whether they multiply).
    """

    tasks: dict[str, float]
    names: tuple[int, int]
    canvases: dict[int, float]
    gates: dict[str, float]
    steps: int
    rate: float = 0.5
    hold: float = 0.0
    watch: int = 100
    starts: dict[str, int] = field(default_factory=dict)
    sums: tuple[int, int, bool] = (3, 20, False)


_FIXED = ("copy", "reverse", "sort", "insert_index", "remove_index", "replace_index")
_FREE = ("insert_random", "remove_random", "replace_random", "shuffle", "latin_square", "sudoku")
# Shuffle is in from the start: it cannot be answered by position, so it teaches to look names up. The index tasks are
# too: on copy and reverse alone the model learns to copy by distance, a habit that 600 steps did not break.
_LISTS = dict.fromkeys(_FIXED, 1.0) | {"sort": 2.0, "shuffle": 1.0}
STAGES = {
    "a": Stage(
        _LISTS | {"worded_sums": 2.0},
        (4, 6),
        {32: 0.92, 64: 0.08},
        {"copy": 0.95, "reverse": 0.95},
        1500,
        rate=1.0,
        hold=0.5,
        watch=200,
        starts={"sort": 2, "shuffle": 2},
    ),
    "b": Stage(
        _LISTS | {"worded_sums": 4.0},
        (6, 10),
        {32: 0.84, 64: 0.12, 128: 0.02, 256: 0.02},
        dict.fromkeys(_FIXED, 0.90),
        3600,
        rate=0.6,
    ),
    "c": Stage(
        dict.fromkeys(_FIXED, 0.8) | {"sort": 1.5, "replace_index": 1.2, "shuffle": 0.3, "worded_sums": 5.0},
        (10, 10),
        {32: 0.80, 64: 0.14, 128: 0.03, 256: 0.03},
        dict.fromkeys(_FIXED, 0.90) | {"worded_sums": 0.80},
        4000,
    ),
    # On from c at a low rate, where most of its gain lay: more of what it missed, and of long canvases, on which
    # answers changed with the rule of the end of text.
    "c2": Stage(
        dict.fromkeys(_FIXED, 0.7) | {"sort": 3.0, "insert_index": 1.2, "replace_index": 2.0, "worded_sums": 4.0},
        (10, 10),
        {32: 0.62, 64: 0.20, 128: 0.09, 256: 0.09},
        dict.fromkeys(_FIXED, 0.90) | {"worded_sums": 0.80},
        10000,
        rate=0.35,
        hold=0.3,
        watch=250,
    ),
    "d": Stage(
        dict.fromkeys(_FIXED, 1.0) | dict.fromkeys(_FREE, 0.8) | {"worded_sums": 5.0},
        (10, 15),
        {32: 0.46, 64: 0.44, 128: 0.05, 256: 0.05},
        dict.fromkeys((*_FIXED, *_FREE, "worded_sums"), 0.90),
        12000,
        sums=(5, 99, True),
    ),
}


def sample(task: str, rng: random.Random, stage: Stage, longest: int, shortest: int = 3) -> tasks.Sample:
    steps, largest, multiply = stage.sums
    return tasks.generate(
        task, rng, shortest=shortest, longest=longest, steps=steps, largest=largest, multiply=multiply
    )

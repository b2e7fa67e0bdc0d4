"""What is decoded, and the figures of an independent simulator (exact model, 400 runs, greedy) to hold it against."""

from __future__ import annotations

from typing import NamedTuple

from . import tasks

# Policy text (see `PolicyText`), then accuracy in % / mean steps on each of `tasks.NAMES`, n = 10. A rule joins by
# adding a line; lines of rules that are not registered are skipped, and registered rules without a line still decoded.
# "=": the rule compares exact equals there (a confidence of 9/10 with 0.9; in a Latin square 1/2 from two candidates
# with 1/2 from three). Noise lets equals pass half of the time, exact arithmetic always, rounding as it likes.
_LINES = """
    topk           100/10  100/10  100/11  100/9   100/10  100/16
    topk=2         100/5   48/5    100/6   100/5   27/5    33/8=
    random
    threshold=0.5  100/1   0/1     100/2   100/1   52/9    0/12.5=
    threshold=0.9  100/1   0/1=    100/10  100/8=  100/10  100/12
    threshold=0.95 100/1   100/10  100/11  100/9   100/10  100/12
    factor=1.0     100/1   100/2=  100/6=  100/4=  100/10  100/11
    wedlm          100/1   100/7   100/11  100/9   100/10  100/12
    entropy        100/1   0/1     100/8   100/6   100/10  100/12
    credit         100/1   0/1     100/8   100/6   100/10  100/12
    credit=0.95    100/1   100/10  100/11  100/9   100/10  100/12
    ete            100/1   100/10  100/6   100/5   100/10  100/8
    localleap      100/1   0/1=    100/8   100/6=  100/10  100/12
    prophet        100/1   100/10  100/11  100/9   100/10  14/10
    learn2pd
"""
SIZE, RUNS = 10, 400


class Cell(NamedTuple):
    """A published figure: a share, mean steps, and whether exact equals decide there."""

    accuracy: float
    steps: float
    equals: bool


class Line(NamedTuple):
    """A setting; ``published``: task to figure, empty if there is nothing to compare with."""

    policy: str
    published: dict[str, Cell]

    @property
    def name(self) -> str:
        """Of the rule, without its value."""
        return self.policy.partition("=")[0].partition("@")[0]


def _cell(text: str) -> Cell:
    accuracy, _, steps = text.rstrip("=").partition("/")
    return Cell(float(accuracy) / 100, float(steps), text.endswith("="))


def _line(text: str) -> Line:
    policy, *cells = text.split()
    return Line(policy, dict(zip(tasks.NAMES, map(_cell, cells), strict=True)) if cells else {})


def lines() -> list[Line]:
    """The settings in order."""
    return [_line(text) for text in _LINES.strip().splitlines()]

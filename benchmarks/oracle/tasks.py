"""ParallelBench's tasks (arXiv 2510.04767) as sets of equally likely answers, and their exact conditional marginals.

A prompt names *slots*: the items of a list, then the new item where there is one; the four symbols of a Latin square.
An answer puts a slot at each position. All of a task's answers are equally likely, so the marginals of what is still
undecided are counts over the answers that agree with what is decided.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor

_SIDE = 4  # of the Latin squares


def _latin_squares() -> list[list[int]]:
    """All 576 of side 4, row by row."""
    rows = list(permutations(range(_SIDE)))
    grids: list[list[int]] = [[]]
    for _ in range(_SIDE):
        grids = [
            [*grid, *row]
            for grid in grids
            for row in rows
            if all(row[i % _SIDE] != symbol for i, symbol in enumerate(grid))
        ]
    return grids


# Answers to a list of n items, slot n being the new one. Shuffle's n! are counted in closed form instead.
_ANSWERS: dict[str, Callable[[int], list[list[int]]]] = {
    "copy": lambda n: [list(range(n))],
    "replace_random": lambda n: [[*range(at), n, *range(at + 1, n)] for at in range(n)],
    "insert_random": lambda n: [[*range(at), n, *range(at, n)] for at in range(n + 1)],
    "remove_random": lambda n: [[*range(at), *range(at + 1, n)] for at in range(n)],
    "latin_square": lambda n: _latin_squares(),
}
NAMES = ("copy", "replace_random", "insert_random", "remove_random", "shuffle", "latin_square")


@dataclass(frozen=True)
class Task:
    """A task at one size.

    Attributes:
        slots: K, that a prompt names. length: S, positions of an answer.
        answers: float32 [C, S · K], the C answers one-hot; None where every order of the slots is one (shuffle).
    """

    name: str
    slots: int
    length: int
    answers: Tensor | None

    def marginals(self, shown: Tensor, undecided: Tensor) -> Tensor:
        """Probability of each slot at each position, given the decided positions.

        With no answer left that agrees (a wrong answer whatever follows) every slot is equally likely everywhere.

        Args:
            shown: bool [B, S, K], the slot at each decided position. undecided: bool [B, S].

        Returns:
            float64 [B, S, K], summing to 1 over the slots.
        """
        if self.answers is None:
            free = ~shown.any(1, keepdim=True)  # what is left may come at any place that is left, in any order
            counts = torch.where(undecided[..., None], free, shown).double()
        else:
            counts = self._agreeing(shown, undecided).float() @ self.answers  # at most 576: exact in float32
            counts = counts.view(len(shown), self.length, self.slots).double()
        total = counts.sum(-1, keepdim=True)
        return torch.where(total > 0, counts / total, 1 / self.slots)

    def right(self, shown: Tensor) -> Tensor:
        """Which finished answers (bool [B, S, K]) are among the task's; bool [B]. A shuffle may be the list itself."""
        if self.answers is None:
            return shown.any(1).all(1)
        return self._agreeing(shown, torch.zeros_like(shown[..., 0])).any(1)

    def _agreeing(self, shown: Tensor, undecided: Tensor) -> Tensor:
        """Answers that have the shown slot at every decided position, bool [B, C]."""
        assert self.answers is not None
        return shown.flatten(1).float() @ self.answers.T == (~undecided).sum(1, keepdim=True)


@cache
def make(name: str, n: int = 10) -> Task:
    """The task for lists of ``n`` items; Latin squares have side 4 whatever ``n`` is.

    Raises:
        ValueError: unknown task, or fewer than 2 items.
    """
    if name not in NAMES or n < 2:
        raise ValueError(f"task, n: {name!r}, {n} given; known: {', '.join(NAMES)}, of at least 2 items")
    if name == "shuffle":
        return Task(name, n, n, None)
    table = torch.tensor(_ANSWERS[name](n))
    slots = _SIDE if name == "latin_square" else n + (name in ("replace_random", "insert_random"))
    return Task(name, slots, table.shape[1], F.one_hot(table, slots).float().flatten(1))

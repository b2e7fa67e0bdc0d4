"""4x4 grids: sudoku with one solution, and Latin squares. A grid is text, one row a line, one character a cell."""

from __future__ import annotations

import random
import re
from functools import cache
from itertools import permutations
from typing import Any

Grid = tuple[str, ...]


@cache
def _latin_squares() -> tuple[Grid, ...]:
    """All 576 Latin squares on "1234"."""
    rows = ["".join(p) for p in permutations("1234")]
    found: list[Grid] = []

    def extend(grid: Grid) -> None:
        if len(grid) == 4:
            found.append(grid)
            return
        for row in rows:
            if all(a != b for above in grid for a, b in zip(above, row, strict=True)):
                extend((*grid, row))

    extend(())
    return tuple(found)


@cache
def _sudokus() -> tuple[Grid, ...]:
    """The 288 Latin squares whose 2x2 boxes hold all four digits too."""
    corners = [(r, c) for r in (0, 2) for c in (0, 2)]
    return tuple(
        g for g in _latin_squares() if all(len({*g[r][c : c + 2], *g[r + 1][c : c + 2]}) == 4 for r, c in corners)
    )


def make_sudoku(rng: random.Random, given: int = 12) -> tuple[str, str]:
    """A puzzle with ``given`` digits (0: empty) that has exactly one solution, and that solution."""
    while True:
        solution = rng.choice(_sudokus())
        shown = set(rng.sample(range(16), given))
        puzzle = tuple(
            "".join(d if 4 * r + c in shown else "0" for c, d in enumerate(row)) for r, row in enumerate(solution)
        )
        fits = sum(all(p in ("0", d) for p, d in zip("".join(puzzle), "".join(g), strict=True)) for g in _sudokus())
        if fits == 1:
            return "\n".join(puzzle), "\n".join(solution)


def make_latin(symbols: list[str], rng: random.Random) -> str:
    table = str.maketrans("1234", "".join(symbols))
    return "\n".join(rng.choice(_latin_squares())).translate(table)


def rows(text: str, digits: str = "1-4") -> list[str] | None:
    """Four lines of four of the digits and nothing else; empty lines do no harm."""
    rows = [line.strip() for line in text.split("\n") if line.strip()]
    return rows if len(rows) == 4 and all(re.fullmatch(f"[{digits}]{{4}}", row) for row in rows) else None


def render(grid: str) -> str:
    """Cells apart by spaces, rows by commas: one token a cell."""
    return ", ".join(" ".join(row) for row in grid.split("\n"))


def score_sudoku(text: str, about: dict[str, Any]) -> bool:
    return text.strip() == render(about["solution"])


def score_latin(text: str, about: dict[str, Any]) -> bool:
    rows = [row.split(" ") for row in text.strip().split(", ")]
    lines = [*rows, *([list(column) for column in zip(*rows, strict=True)] if len({*map(len, rows)}) == 1 else [[]])]
    return len(rows) == 4 and all(sorted(line) == sorted(about["symbols"]) for line in lines)

"""Tables of the command line, in a terminal of any width or where there is none."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

_WIDTH = 120


def console() -> Console:
    """For stdout: as wide as the terminal, 120 columns where it is none."""
    return Console() if sys.stdout.isatty() else Console(width=_WIDTH)


def show(console: Console, table: Table) -> None:
    """Print a table, at least as wide as its words and figures (120 columns at most), whatever the terminal: one that
    is squeezed further shows a letter a line or nothing, while a terminal wraps lines that are too long.
    """
    wide, width = console.options.update(max_width=_WIDTH), console.width
    for column in table.columns:
        if column.no_wrap:  # rich counts the longest word of these too
            column.min_width = max(Measurement.get(console, wide, c).maximum for c in (column.header, *column.cells))
    console.width = max(width, Measurement.get(console, wide, table).minimum)
    console.print(table)
    console.width = width

"""Tables of the command line, in a terminal of any width or where there is none."""

from __future__ import annotations

import sys

import torch
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from dllm_engine.model import LLaDA

_WIDTH = 120


def table(title: str) -> Table:
    return Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))


def add_words(table: Table, *names: str) -> None:
    """Columns of text, which may be folded."""
    for name in names:
        table.add_column(name, overflow="fold")


def add_figures(table: Table, *names: str) -> None:
    """Columns of figures, which may not."""
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)


def described(model: LLaDA) -> str:
    """Name, device and dtype, for a title."""
    threads = f" ({torch.get_num_threads()} threads)" if model.device.type == "cpu" else ""
    return f"{model.path and model.path.name}, {model.device}{threads}, {str(model.dtype).removeprefix('torch.')}"


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

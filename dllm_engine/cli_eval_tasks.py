"""Figures of each task of a benchmark, and their mean, for ``dllm-engine eval --benchmark``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dllm_engine.evaluate import Row

_MEANS = ("accuracy", "forward_passes", "tokens_per_forward")


def task_figures(baseline: Sequence[Row], rows: Sequence[Row]) -> dict[str, Any]:
    """``per_task``: figures of each task as `summary` gives them, with the paired loss (None for the baseline itself).

    ``task_mean`` is their mean, each task counting the same, as benchmarks report it; ``accuracy`` of the whole setting
    counts each question the same.
    """
    from dllm_engine.evaluate import paired_loss, summary

    per_task: dict[str, dict[str, Any]] = {}
    for task in dict.fromkeys(row.task for row in rows):
        pairs = [(a, b) for a, b in zip(baseline, rows, strict=True) if b.task == task]
        figures = summary([own for _, own in pairs])
        del figures["tasks"]
        loss = upper = None
        if rows is not baseline:
            loss, upper = paired_loss([a.right for a, _ in pairs], [b.right for _, b in pairs])
        per_task[task] = figures | {"loss": loss, "loss_upper": upper}
    means = {name: sum(f[name] for f in per_task.values()) / len(per_task) for name in _MEANS}
    return {"per_task": per_task, "task_mean": means}


def print_tasks(records: Sequence[dict[str, Any]]) -> None:
    """A table with a section a task, the settings below each other in it, and the mean of the tasks as the last one."""
    from rich.markup import escape

    from dllm_engine import tables

    table = tables.table("Task by task")
    tables.add_words(table, "task", "policy", "cache")
    tables.add_figures(table, "questions", "right %", "95 %\ninterval", "loss\n%", "95 %\nbound")
    tables.add_figures(table, "forward\npasses", "tokens/\nforward")
    for task in (*records[0]["per_task"], None):
        for i, record in enumerate(records):
            f = record["task_mean"] if task is None else record["per_task"][task]
            lost = f.get("loss") is not None
            table.add_row(
                escape(("mean of the tasks" if task is None else task) if i == 0 else ""),
                escape(record["label"]),
                record["cache"] + ("" if record["end_of_text"] == "auto" else f", {record['end_of_text']}"),
                "" if task is None else str(f["prompts"]),
                f"{100 * f['accuracy']:.1f}",
                "" if task is None else f"{100 * f['accuracy_low']:.0f} to {100 * f['accuracy_high']:.0f}",
                f"{100 * f['loss'] + 0:.1f}" if lost else "",
                f"≤ {100 * f['loss_upper']:.1f}" if lost else "",
                f"{f['forward_passes']:.2f}",
                f"{f['tokens_per_forward']:.2f}",
                end_section=i == len(records) - 1,
            )
    tables.show(tables.console(), table)

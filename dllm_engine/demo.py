"""``dllm-engine demo``: the same prompts decoded four ways, with what each cost."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from dllm_engine import tables, tasks
from dllm_engine.built_in import trained_tasks
from dllm_engine.evaluate import Row, Setting, run_all, summary
from dllm_engine.model import LLaDA
from dllm_engine.samples import canvas_for, read_parallelbench

WAYS = {
    "one token per step": Setting("topk", "none"),
    "threshold 0.9": Setting("threshold", "none"),
    "  + dual KV cache": Setting("threshold", "dual"),
    "learned filter + dual": Setting("auto", "dual"),
}
_FIGURES = ("forward\npasses", "tokens/\nforward", "tokens/\nsecond")


def run_demo(model: LLaDA, console: Console, seed: int, as_json: bool = False) -> None:
    """Ten prompts one at a time and as a batch, four ways."""
    rng = random.Random(seed)
    learned = trained_tasks(model)
    samples = [tasks.generate(learned[i % len(learned)], rng) for i in range(10)]
    settings = _settings(gen_length := canvas_for(model, samples))
    single = run_all(model, samples, settings, batch_size=1)
    batch = run_all(model, samples, settings, batch_size=len(samples))
    if as_json:
        records = [
            {"asked": asked, "policy": setting.policy_text, "cache": setting.cache, **summary(rows)}
            for asked, ways in (("one at a time", single), ("one batch", batch))
            for setting, rows in zip(settings, ways, strict=True)
        ]
        print(json.dumps(records, indent=1))
        return

    table = tables.table(f"Ten questions to {model.path and model.path.name}, {model.device}, {model.dtype}")
    table.add_column("question → answer")
    table.add_column("decoding", no_wrap=True)
    tables.add_figures(table, "right", *_FIGURES)
    names = "\n".join(WAYS)
    for i, sample in enumerate(samples):
        ways = [[rows[i]] for rows in single]
        answers = dict.fromkeys(row.text for [row] in ways)
        question = sample.prompt + "".join(f"\n[bold]→ {answer or '(nothing)'}[/]" for answer in answers)
        marks = "\n".join("[green]✓[/]" if row.right else "[red]✗[/]" for [row] in ways)
        table.add_row(question, names, marks, *_figures(ways), end_section=True)
    for title, ways in (("all ten, one at a time", single), ("all ten as one batch", batch)):
        marks = "\n".join(f"{sum(row.right for row in rows)}/10" for rows in ways)
        table.add_row(f"[bold]{title}[/]", names, marks, *_figures(ways), end_section=True)
    tables.show(console, table)
    console.print(
        "One forward pass is one run of the transformer; fewer passes for the same answer is what parallel decoding"
        f" gains. Canvas: {gen_length} tokens; tokens count up to the end of the answer."
    )


def run_data(
    model: LLaDA, console: Console, files: Sequence[Path], limit: int | None, batch_size: int, as_json: bool = False
) -> None:
    """Published ParallelBench files (JSON lines), four ways.

    Raises:
        ValueError: a file of no known task, or a row that is not of that task; names file and line.
    """
    from tqdm import tqdm

    sets = {file: read_parallelbench(file, limit) for file in files}
    records = []
    table = tables.table(f"ParallelBench items in the demo template, {model.path and model.path.name}, {model.device}")
    for name in ("file", "items", "decoding"):
        table.add_column(name, no_wrap=True)
    tables.add_figures(table, "right %", "95 %\ninterval", *_FIGURES)
    learned = trained_tasks(model)
    work = sum(-(-len(s) // batch_size) for s in sets.values()) * len(WAYS)
    with tqdm(total=work, unit="batch", disable=None) as bar:
        for file, samples in sets.items():
            bar.set_description(file.name)
            settings = _settings(canvas_for(model, samples))
            ways = run_all(model, samples, settings, batch_size=batch_size, on_batch=lambda *_: bar.update())
            figures = [summary(rows) for rows in ways]
            known = "" if samples[0].task in learned else " [dim](not learned)[/]"
            table.add_row(
                file.name + known,
                str(len(samples)),
                "\n".join(WAYS),
                "\n".join(f"{100 * f['accuracy']:.1f}" for f in figures),
                "\n".join(f"{100 * f['accuracy_low']:.0f} to {100 * f['accuracy_high']:.0f}" for f in figures),
                *_figures(ways),
                end_section=True,
            )
            for setting, own in zip(settings, figures, strict=True):
                asked = {"file": str(file), "gen_length": setting.gen_length}
                records.append(asked | {"policy": setting.policy_text, "cache": setting.cache, **own})
    if as_json:
        print(json.dumps(records, indent=1))
    else:
        tables.show(console, table)


def _settings(gen_length: int) -> list[Setting]:
    return [replace(setting, gen_length=gen_length) for setting in WAYS.values()]


def _figures(ways: Sequence[Sequence[Row]]) -> list[str]:
    """The cells of `_FIGURES`, a line for each of the ways."""
    lines = [
        (
            f"{f['forward_passes']:.1f}".removesuffix(".0"),
            f"{f['tokens_per_forward']:.1f}",
            f"{f['tokens_per_second']:,.0f}",
        )
        for f in map(summary, ways)
    ]
    return ["\n".join(column) for column in zip(*lines, strict=True)]

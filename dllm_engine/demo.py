"""``dllm-engine demo``: the same prompts decoded four ways, with what each cost."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from dllm_engine import tasks
from dllm_engine.config import read_json
from dllm_engine.decode import decode
from dllm_engine.evaluate import wilson
from dllm_engine.model import LLaDA
from dllm_engine.samples import canvas_for, read_parallelbench
from dllm_engine.tables import show
from dllm_engine.tokenizer import answer_text, encode_prompt

DEMO_MODEL = Path(__file__).parent / "demo_model"
BLOCK = 32


@dataclass(frozen=True)
class Way:
    name: str
    policy: str
    cache: str

    def record(self) -> dict[str, str]:
        return {"policy": self.policy, "cache": self.cache}


WAYS = (
    Way("one token per step", "topk", "none"),
    Way("threshold 0.9", "threshold", "none"),
    Way("  + dual KV cache", "threshold", "dual"),
    Way("learned filter + dual", "auto", "dual"),
)


@dataclass
class Tally:
    """What decodes cost and gave: answers and right or wrong a prompt, passes a sequence, generated tokens, seconds."""

    answers: list[str] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    passes: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def add(self, other: Tally) -> None:
        self.answers += other.answers
        self.right += other.right
        self.passes += other.passes
        self.tokens += other.tokens
        self.seconds += other.seconds

    def cells(self) -> list[str]:
        """Forward passes a sequence, tokens per forward, tokens per second."""
        mean = self.passes / len(self.right)
        return [
            f"{mean:.0f}" if mean == int(mean) else f"{mean:.1f}",
            f"{self.tokens / self.passes:.1f}",
            f"{self.tokens / self.seconds:,.0f}",
        ]


def measure(model: LLaDA, samples: Sequence[tasks.Sample], way: Way, gen_length: int) -> Tally:
    """One decode of ``samples`` as a batch."""
    import torch

    prompts = [encode_prompt(model.tokenizer, sample.prompt, chat=True) for sample in samples]
    began = time.perf_counter()
    out = decode(model, prompts, gen_length=gen_length, block_length=BLOCK, policy=way.policy, cache=way.cache, seed=0)
    if model.device.type == "cuda":
        torch.cuda.synchronize()  # host: the clock stops when the work is done
    seconds = time.perf_counter() - began
    texts = [answer_text(model, ids) for ids in out.sequences[:, -gen_length:].tolist()]
    return Tally(
        answers=texts,
        right=[tasks.score(sample, text) for sample, text in zip(samples, texts, strict=True)],
        passes=int(out.sequence_passes.sum()),
        tokens=int(out.generated_tokens.sum()),
        seconds=seconds,
    )


def run_demo(model: LLaDA, console: Console, seed: int, as_json: bool = False) -> None:
    """Ten prompts one at a time and as a batch, four ways."""
    rng = random.Random(seed)
    learned = trained_tasks(model)
    samples = [tasks.generate(learned[i % len(learned)], rng) for i in range(10)]
    gen_length = canvas_for(model, samples)
    for way in WAYS:
        measure(model, samples[:1], way, gen_length)  # warm-up: first calls allocate
    single: list[list[Tally]] = []
    for sample in samples:  # the ways take turns, so that a busy machine slows all of them
        single.append([measure(model, [sample], way, gen_length) for way in WAYS])
    batch = [measure(model, samples, way, gen_length) for way in WAYS]
    total = [Tally() for _ in WAYS]
    for tallies in single:
        for tally, one in zip(total, tallies, strict=True):
            tally.add(one)
    if as_json:
        rows = [
            _record({"asked": name, **way.record()}, tally)
            for name, tallies in (("one at a time", total), ("one batch", batch))
            for way, tally in zip(WAYS, tallies, strict=True)
        ]
        print(json.dumps(rows, indent=1))
        return

    table = _table(f"Ten questions to {model.path and model.path.name}, {model.device}, {model.dtype}")
    table.add_column("question → answer")
    table.add_column("decoding", no_wrap=True)
    _add_figures(table, ["right"])
    ways = "\n".join(way.name for way in WAYS)
    for sample, tallies in zip(samples, single, strict=True):
        answers = list(dict.fromkeys(tally.answers[0] for tally in tallies))
        question = sample.prompt + "".join(f"\n[bold]→ {answer or '(nothing)'}[/]" for answer in answers)
        marks = "\n".join("[green]✓[/]" if tally.right[0] else "[red]✗[/]" for tally in tallies)
        table.add_row(question, ways, marks, *_columns(tallies), end_section=True)
    for title, tallies in (("all ten, one at a time", total), ("all ten as one batch", batch)):
        marks = "\n".join(f"{sum(tally.right)}/10" for tally in tallies)
        table.add_row(f"[bold]{title}[/]", ways, marks, *_columns(tallies), end_section=True)
    show(console, table)
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
    table = _table(f"ParallelBench items in the demo template, {model.path and model.path.name}, {model.device}")
    for name in ("file", "items", "decoding"):
        table.add_column(name, no_wrap=True)
    _add_figures(table, ["right %", "95 %\ninterval"])
    learned = trained_tasks(model)
    work = sum(-(-len(s) // batch_size) for s in sets.values()) * len(WAYS)
    with tqdm(total=work, unit="batch", disable=None) as bar:
        for file, samples in sets.items():
            gen_length = canvas_for(model, samples)
            bar.set_description(file.name)
            measure(model, samples[:1], WAYS[0], gen_length)
            tallies = [Tally() for _ in WAYS]
            for first in range(0, len(samples), batch_size):
                for tally, way in zip(tallies, WAYS, strict=True):
                    tally.add(measure(model, samples[first : first + batch_size], way, gen_length))
                    bar.update()
            known = "" if samples[0].task in learned else " [dim](not learned)[/]"
            shares = [(sum(tally.right), len(tally.right)) for tally in tallies]
            low_high = [wilson(*share) for share in shares]
            table.add_row(
                file.name + known,
                str(len(samples)),
                "\n".join(way.name for way in WAYS),
                "\n".join(f"{100 * right / total:.1f}" for right, total in shares),
                "\n".join(f"{100 * low:.0f} to {100 * high:.0f}" for low, high in low_high),
                *_columns(tallies),
                end_section=True,
            )
            for way, tally in zip(WAYS, tallies, strict=True):
                records.append(_record({"file": str(file), "gen_length": gen_length, **way.record()}, tally))
    if as_json:
        print(json.dumps(records, indent=1))
    else:
        show(console, table)


def trained_tasks(model: LLaDA) -> list[str]:
    """Tasks of which a model trained here answered at least half, from the ``accuracy.json`` beside it.

    Raises:
        ValueError: the model has no such file, so it does not know the demo's template, or it cannot be read.
    """
    file = model.path / "accuracy.json" if model.path else None
    if file is None or not file.exists():
        raise ValueError(
            f"model: {model.path} has no accuracy.json; `demo` needs a model trained by benchmarks/train_demo.py"
            " (use `dllm-engine generate` for others)"
        )
    accuracy = read_json(file).get("accuracy")
    if not isinstance(accuracy, dict):
        raise ValueError(f'{file}: no "accuracy": the share of right answers by task is needed')
    return [task for task in tasks.names() if accuracy.get(task, 0.0) >= 0.5]


def _table(title: str) -> Table:
    return Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))


def _add_figures(table: Table, names: Sequence[str]) -> None:
    for name in (*names, "forward\npasses", "tokens/\nforward", "tokens/\nsecond"):
        table.add_column(name, justify="right", no_wrap=True)


def _columns(tallies: Sequence[Tally]) -> list[str]:
    return ["\n".join(column) for column in zip(*(tally.cells() for tally in tallies), strict=True)]


def _record(what: dict[str, Any], tally: Tally) -> dict[str, Any]:
    low, high = wilson(sum(tally.right), len(tally.right))
    return what | {
        "accuracy": sum(tally.right) / len(tally.right), "accuracy_low": low, "accuracy_high": high,
        "forward_passes": tally.passes / len(tally.right), "tokens_per_forward": tally.tokens / tally.passes,
        "tokens_per_second": tally.tokens / tally.seconds, "prompts": len(tally.right),
    }  # fmt: skip

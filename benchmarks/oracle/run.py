"""Every rule on a model that is never wrong: ``python -m benchmarks.oracle``.

The tasks are ParallelBench's (arXiv 2510.04767) at n = 10, and 4x4 Latin squares. The model gives the true conditional
marginals, so an error is the rule's alone: it committed together what is not independent. Printed are accuracy in % /
mean steps, and in brackets the figures of an independent simulator; "=" marks those where exact equals decide (a
confidence of 9/10 against a threshold of 0.9): noise breaks ties here, so that each equal passes half of the time.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from dllm_engine import LearnedFilter, decode, policies
from dllm_engine.built_in import DEMO_MODEL
from dllm_engine.evaluate import wilson
from dllm_engine.policies import Policy
from dllm_engine.policy_text import PolicyText

from . import tasks
from .model import OracleModel
from .published import RUNS, SIZE, Line, lines


def measure(
    model: OracleModel, text: str, *, runs: int, seed: int = 0, temperature: float = 0.0, backend: str = "auto"
) -> tuple[int, float]:
    """Right answers among ``runs`` instances, and the mean steps of one.

    Args:
        text: see `PolicyText`; ``topk=K`` commits K positions in each step, the rest in the last.
        seed: of the instances and of sampling; the model has its own.
    """
    parsed, length = PolicyText.parse(text), model.task.length
    policy: Policy | str
    if parsed.name == "topk":
        policy, steps = "topk", -(-length // int(parsed.value or 1))
    else:
        policy, steps = _policy(parsed, model), None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the filter was trained on cache")  # known: there is none here
        out = decode(
            model,
            model.prompts(runs, seed),
            gen_length=length,
            block_length=length,
            steps=steps,
            policy=policy,
            cache="none",
            temperature=temperature,
            end_of_text="off",
            seed=seed,
            backend=backend,
        )
    right = model.task.right(model.shown(out.sequences))
    return int(right.sum()), float(out.sequence_passes.double().mean())


def _policy(parsed: PolicyText, model: OracleModel) -> Policy | str:
    """`PolicyText.make`, where a bare ``learn2pd`` is the demo model's filter (it sees no token, so it fits), and
    ``adablock`` looks for an end of the text, which no answer has: there is no other delimiter.
    """
    if parsed.name == "learn2pd" and parsed.file is None:
        return policies.Learn2PD(LearnedFilter.from_pretrained(DEMO_MODEL, force=True), parsed.value)
    if parsed == PolicyText("adablock"):
        return policies.AdaBlock(delimiters=model.end_ids)
    return parsed.make(model)


def settings() -> tuple[list[Line], list[str]]:
    """Every registered rule's lines, a bare one where it has none; and the texts that are skipped."""
    listed, known = lines(), policies.names()
    bare = [Line(name, {}) for name in known if name not in {line.name for line in listed}]
    return [line for line in listed if line.name in known] + bare, [s.policy for s in listed if s.name not in known]


def records(
    chosen: Sequence[Line], *, names: Sequence[str] = tasks.NAMES, size: int, runs: int, seed: int, backend: str
) -> list[dict[str, Any]]:
    """Figures of each setting on each task."""
    models = {name: OracleModel(tasks.make(name, size), seed=seed) for name in names}
    found = []
    for line, name in tqdm([(line, name) for line in chosen for name in names], unit="cell", disable=None):
        right, steps = measure(models[name], line.policy, runs=runs, seed=seed, backend=backend)
        low, high = wilson(right, runs)
        cell = line.published.get(name) if size == SIZE or name == "latin_square" else None
        found.append({
            "policy": line.policy, "task": name, "size": size, "runs": runs, "seed": seed,
            "accuracy": right / runs, "accuracy_low": low, "accuracy_high": high, "forward_passes": steps,
            "published": cell and cell._asdict(),
        })  # fmt: skip
    return found


def show(found: Sequence[dict[str, Any]], skipped: Sequence[str]) -> None:
    names = list(dict.fromkeys(record["task"] for record in found))
    table = Table("policy", *names, title="accuracy % / steps (published)")
    cells: dict[str, list[str]] = {}
    for r in found:
        cell = f"{100 * r['accuracy']:.4g}/{r['forward_passes']:.3g}"
        if p := r["published"]:
            cell += f" ({100 * p['accuracy']:.0f}/{p['steps']:g}{'=' * p['equals']})"
        cells.setdefault(r["policy"], []).append(cell)
    for policy, row in cells.items():
        table.add_row(policy, *row)
    console = Console(width=140)
    console.print(table)
    if skipped:
        console.print(f"not registered: {', '.join(skipped)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", nargs="+", help="instead of every registered one, as `dllm-engine eval` takes them")
    parser.add_argument("--tasks", nargs="+", choices=tasks.NAMES, default=tasks.NAMES)
    parser.add_argument("--size", type=int, default=SIZE, help="items of a list")
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--json", action="store_true", help="print a list of objects, one a cell")
    args = parser.parse_args()
    chosen, skipped = settings()
    if args.policy:
        cells = {line.policy: line.published for line in chosen}
        chosen, skipped = [Line(text, cells.get(text, {})) for text in args.policy], []
    found = records(chosen, names=args.tasks, size=args.size, runs=args.runs, seed=args.seed, backend=args.backend)
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        show(found, skipped)

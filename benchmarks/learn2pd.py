"""Learn2PD on the demo model: which rule needs the fewest passes at equal quality? ``python benchmarks/learn2pd.py``.

Every rule is tuned on validation prompts with the same cache and end of text: the boldest setting that loses no more
than ``--slack`` against one token per step, and neither do all more cautious ones, is found, and the next more cautious
one taken (``--margin`` settings: 500 prompts do not tell a loss of 0.2 points from one of 0.5). Only the winners and
the baseline are decoded on the held-out prompts, the same ones for all; equal quality means that the one-sided 95 %
bound of the paired loss is under 0.5 points. The oracle commits just what equals the baseline's answer. Worded sums are
judged twice: by the final number ("answer"), as published scorers would, and by the whole working, which a rule can
garble while the number stays right.

Figures are printed and written to ``benchmarks/results/learn2pd.json``; an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from common import RESULTS, provenance
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from dllm_engine import LLaDA, tasks
from dllm_engine.built_in import DEMO_MODEL, trained_tasks
from dllm_engine.cli_eval_rows import KeptRows
from dllm_engine.evaluate import Row, Setting, paired_loss, run_all, summary
from dllm_engine.samples import canvas_for
from dllm_engine.tasks.sums import score_working

# from cautious to bold
THRESHOLDS = (0.99, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5)
FACTORS = (0.3, 0.5, 0.7, 1.0, 1.2, 1.4, 1.6, 2.0)
FILTERED = (0.998, 0.995, 0.99, 0.985, 0.98, 0.97, 0.96, 0.95, 0.93, 0.9, 0.8, 0.7)


def questions(model: LLaDA, family: str, count: int, seed: str) -> list[tasks.Sample]:
    """Fresh samples of a family's learned tasks, in turns."""
    learned = [task for task in trained_tasks(model) if (task == "worded_sums") == (family == "sums")]
    if not learned:
        raise SystemExit(f"the model learned no task of family {family!r}")
    rng = random.Random(f"{seed} {family}")
    return [tasks.generate(learned[i % len(learned)], rng, longest=10) for i in range(count)]


def rules(filters: dict[str, Path]) -> dict[str, list[str]]:
    """Name of a rule to its settings, as `PolicyText` reads them."""
    found = {
        "threshold": [f"threshold={value}" for value in THRESHOLDS],
        "factor": [f"factor={value}" for value in FACTORS],
    }
    return found | {name: [f"learn2pd={file}@{value}" for value in FILTERED] for name, file in filters.items()}


def decode_all(
    model: LLaDA, samples: Sequence[tasks.Sample], settings: Sequence[Setting], keep: Path, batch_size: int, what: str
) -> dict[Setting, list[Row]]:
    """Rows of every setting; what was kept in ``keep`` is not decoded again."""
    labels = {setting: setting.policy_text.replace("/", "-") for setting in settings}
    kept = KeptRows(keep, model, samples, labels, batch_size=batch_size, chat=True)
    finished = sum(-(-len(rows) // batch_size) for rows in kept.rows.values())
    total = len(settings) * -(-len(samples) // batch_size)
    with tqdm(total=total, initial=finished, desc=what, unit="batch", disable=None) as bar:

        def on_batch(setting: Setting, rows: list[Row]) -> None:
            kept.add(setting, rows)
            bar.update()

        rows = run_all(
            model, samples, settings, batch_size=batch_size, chat=True, done=kept.rows, on_batch=on_batch,
            on_turn=lambda setting: bar.set_description(f"{what}: {setting.policy_text}, {setting.cache}"),
        )  # fmt: skip
    return dict(zip(settings, rows, strict=True))


def graded(rows: Sequence[Row], samples: Sequence[tasks.Sample], quality: str) -> list[Row]:
    """Rows of sums judged by the whole working if that is asked for, else by the task's own scorer."""
    if quality == "answer":
        return list(rows)
    return [
        replace(row, right=score_working(row.text, sample.about)) if row.task == "worded_sums" else row
        for row, sample in zip(rows, samples, strict=True)
    ]


def compared(rows: Sequence[Row], baseline: Sequence[Row]) -> dict[str, Any]:
    loss, upper = paired_loss([row.right for row in baseline], [row.right for row in rows])
    return summary(rows) | {"loss": loss, "loss_upper": upper}


def tune_and_confirm(model: LLaDA, args: argparse.Namespace, where: dict[str, Any]) -> list[dict[str, Any]]:
    """Figures of the baseline, every rule's winner and the oracle, at one family, canvas, cache and end of text."""
    family, cache, end_of_text = where["family"], where["cache"], where["end_of_text"]
    validation = questions(model, family, args.validation, "v")
    held_out = questions(model, family, args.held_out, where["held_out_seed"])
    gen_length = where["gen_length"] or canvas_for(model, validation + held_out)
    name = f"{family}, {gen_length} tokens, cache {cache}, end of text {end_of_text}"

    def setting(text: str) -> Setting:
        return Setting(text, cache, end_of_text, 32, gen_length)

    filters = {path.name: path for path in args.filters if path.name.endswith(cache) or args.all_filters}
    candidates = rules(filters)
    texts = ["topk", *(text for values in candidates.values() for text in values)]
    tried = decode_all(
        model, validation, [setting(text) for text in texts], args.keep / "tune", args.batch_size, f"tune {name}"
    )
    tried = {one: graded(rows, validation, where["quality"]) for one, rows in tried.items()}
    winners = {}
    for rule, values in candidates.items():
        figures = {text: compared(tried[setting(text)], tried[setting("topk")]) for text in values}
        bold = (i for i, text in enumerate(values) if figures[text]["loss"] > args.slack)
        good = values[: next(bold, len(values))]
        if good:
            winners[rule] = good[max(0, len(good) - 1 - args.margin)]
    order = ["topk", *dict.fromkeys(winners.values()), "oracle"]
    final = decode_all(
        model, held_out, [setting(t) for t in order], args.keep / "confirm", args.batch_size, f"confirm {name}"
    )
    final = {one: graded(rows, held_out, where["quality"]) for one, rows in final.items()}
    baseline = final[setting("topk")]
    oracle = compared(final[setting("oracle")], baseline)
    records = []
    for rule, text in {"one token per step": "topk", **winners, "oracle": "oracle"}.items():
        figures = compared(final[setting(text)], baseline)
        records.append(
            where | {"gen_length": gen_length, "rule": rule, "setting": Path(text).name if "/" in text else text}
            | figures | {"of_oracle": oracle["forward_passes"] / figures["forward_passes"]}
        )  # fmt: skip
    return records


def show(records: Sequence[dict[str, Any]]) -> None:
    table = Table(title="Winners on the held-out prompts")
    for column in ("family", "quality", "canvas", "cache", "end of text", "margin", "rule", "setting"):
        table.add_column(column)
    for column in ("right %", "loss", "≤", "passes", "of oracle", "tokens/s"):
        table.add_column(column, justify="right")
    for r in records:
        table.add_row(
            r["family"], r["quality"], str(r["gen_length"]), r["cache"], r["end_of_text"], str(r["margin"]),
            r["rule"], r["setting"],
            f"{100 * r['accuracy']:.2f}", f"{100 * r['loss']:.2f}", f"{100 * r['loss_upper']:.2f}",
            f"{r['forward_passes']:.2f}", f"{r['of_oracle']:.2f}", f"{r['tokens_per_second']:,.0f}",
            end_section=r["rule"] == "oracle",
        )  # fmt: skip
    Console(width=150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--families", nargs="+", default=["sums", "lists"])
    parser.add_argument("--qualities", nargs="+", default=["answer", "working"], help="what must be right in sums")
    parser.add_argument("--gen-lengths", nargs="+", type=int, default=[0], help="0: what fits the answers")
    parser.add_argument("--caches", nargs="+", default=["none", "dual"])
    parser.add_argument("--end-of-text", nargs="+", default=["committed"])
    parser.add_argument("--filters", nargs="+", type=Path, default=[], help="directories named KIND-CACHE")
    parser.add_argument("--all-filters", action="store_true", help="not only those trained with the cache decoded with")
    parser.add_argument("--validation", type=int, default=500)
    parser.add_argument("--held-out", type=int, default=3000)
    parser.add_argument("--held-out-seed", default="h", help="other prompts for another margin, as once seen ones tell")
    parser.add_argument("--slack", type=float, default=0.002, help="loss that a winner may have on validation prompts")
    parser.add_argument(
        "--margin", type=int, default=1, help="settings that a winner is more cautious than the boldest"
    )
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--keep", type=Path, default=Path("runs/learn2pd"))
    args = parser.parse_args()
    model = LLaDA.from_pretrained(args.model, device="cpu", dtype="float32")
    file = RESULTS / "learn2pd.json"
    held = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    places = product(args.families, args.gen_lengths, args.caches, args.end_of_text, args.qualities)
    for family, gen_length, cache, end, quality in places:
        if family != "sums" and quality == "working":
            continue
        where = {
            "family": family, "quality": quality, "gen_length": gen_length, "cache": cache, "end_of_text": end,
            "margin": args.margin, "held_out_seed": args.held_out_seed,
        }  # fmt: skip
        records = [r | provenance(model.device) for r in tune_and_confirm(model, args, where)]
        same = ("family", "quality", "gen_length", "cache", "end_of_text", "margin", "held_out_seed")
        held = [h for h in held if any(h.get(key) != records[0][key] for key in same)] + records
        file.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
        show(records)


if __name__ == "__main__":
    main()

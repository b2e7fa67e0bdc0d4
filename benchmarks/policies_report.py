"""Every rule at several settings on the demo model: what wins where? ``python benchmarks/policies_report.py``.

The same fresh questions of every task that the model learned (and of some that it did not, marked so) are decoded by
every registered rule, from cautious to bold, and compared with one token per step without a cache, pair by pair. All
rules run with the dual cache; what a cache alone costs is shown for the schedule, a threshold and the shipped filter.

Worded sums are judged by the whole working: a rule can garble it while the final number stays right. What they score by
the number alone, as published scorers would, is a task of its own outside groups and mean.

The table goes between two markers of docs/policies.md, the picture to docs/policies.png and all figures to
benchmarks/results/policies.json; an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import operator
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, provenance
from learn2pd import decode_all
from policies_picture import draw
from rich.console import Console
from rich.table import Table

from dllm_engine import LLaDA, policies, tasks
from dllm_engine.built_in import DEMO_MODEL, trained_tasks
from dllm_engine.cli_plot import pyplot
from dllm_engine.evaluate import Row, Setting, paired_loss, summary
from dllm_engine.policy_text import PolicyText
from dllm_engine.samples import canvas_for
from dllm_engine.tasks.sums import score_working

# From cautious to bold, the rule's default among them; a rule that is not listed runs at its default alone.
SETTINGS: dict[str, tuple[str, ...]] = {
    "topk": ("topk", "topk=2", "topk=4", "topk=8"),
    "random": ("random", "random=2", "random=4"),
    "left_to_right": ("left_to_right", "left_to_right=2", "left_to_right=4"),
    "margin": ("margin", "margin=2", "margin=4"),
    "threshold": ("threshold=0.95", "threshold", "threshold=0.7", "threshold=0.5"),
    "factor": ("factor=0.5", "factor", "factor=1.6"),
    "learn2pd": ("learn2pd@0.99", "learn2pd", "learn2pd@0.9", "learn2pd@0.7"),
    "entropy": ("entropy=0.1", "entropy", "entropy=1.0"),
    "cad": ("cad=0.98", "cad", "cad=0.8"),
    "prophet": ("prophet=10/7.5/5", "prophet", "prophet=5/3/1.5"),
    "localleap": ("localleap=0.95/0.85/4", "localleap", "localleap=0.8/0.6/4"),
    "hierarchical": ("hierarchical=0.95/0.6", "hierarchical", "hierarchical=0.8/0.2"),
    "wedlm": ("wedlm=0.2/0.02", "wedlm", "wedlm=0.8/0.02"),
    "run_length": ("run_length=0.95", "run_length", "run_length=0.7"),
    "credit": ("credit=0.95", "credit", "credit=0.8"),
    "editing": ("editing=0.9/0.9", "editing", "editing=0.5/0.3"),
    "adablock": ("adablock=0.95", "adablock", "adablock=0.7"),
    "ete": ("ete=0.99", "ete", "ete=0.8"),
    "freedave": ("freedave=2", "freedave=4", "freedave"),
}
ALL_CACHES = ("topk", "threshold", "learn2pd")  # at their defaults
BASELINE = ("topk", "none")
NOT_TRAINED = ("shuffle", "replace_random")  # several right answers: positions depend on each other
SUMS, NUMBER = "worked_sums", "sums, final number"
BEGIN, END = "<!-- policies_report: begin -->", "<!-- policies_report: end -->"


def settings(rules: Sequence[str], gen_length: int) -> list[Setting]:
    """The baseline, then every rule's settings with the dual cache, then the other caches."""
    chosen = [BASELINE]
    chosen += [(text, "dual") for rule in rules for text in SETTINGS.get(rule, (rule,))]
    chosen += [(rule, cache) for rule in ALL_CACHES if rule in rules for cache in ("prefix", "none")]
    return [Setting(text, cache, gen_length=gen_length) for text, cache in dict.fromkeys(chosen)]


def questions(model: LLaDA, count: int, seed: int) -> list[tasks.Sample]:
    """``count`` fresh samples a task; a task's do not depend on the other tasks."""
    names = [*trained_tasks(model), *NOT_TRAINED]
    rngs = {name: random.Random(f"{seed} {name}") for name in names}
    return [tasks.generate(name, rngs[name], longest=10) for name in names for _ in range(count)]


def by_task(rows: Sequence[Row], samples: Sequence[tasks.Sample]) -> dict[str, list[Row]]:
    """Rows of each task; those of sums twice, by the whole working and by the final number."""
    found: dict[str, list[Row]] = {}
    for row, sample in zip(rows, samples, strict=True):
        if row.task == "worded_sums":
            found.setdefault(SUMS, []).append(replace(row, right=score_working(row.text, sample.about)))
            found.setdefault(NUMBER, []).append(row)
        else:
            found.setdefault(row.task, []).append(row)
    return found


def record(setting: Setting, own: dict[str, list[Row]], base: dict[str, list[Row]]) -> dict[str, Any]:
    """Figures of a setting: of each task, of lists, of sums, of what was not trained, and the mean of the learned."""
    groups = {task: [task] for task in own}
    groups["sums"] = [task for task in own if task == SUMS]
    groups["not trained"] = list(NOT_TRAINED)
    groups["lists"] = [task for task in own if task not in (SUMS, NUMBER, *NOT_TRAINED)]
    groups["mean"] = groups["lists"] + groups["sums"]  # as many questions of each, so the mean of the tasks
    figures = {}
    for group, names in groups.items():
        if not names:
            continue
        rows, reference = ([row for name in names for row in of[name]] for of in (own, base))
        loss, upper = paired_loss([row.right for row in reference], [row.right for row in rows])
        figures[group] = {k: v for k, v in summary(rows).items() if k != "tasks"} | {"loss": loss, "loss_upper": upper}
    rule = PolicyText.parse(setting.policy_text).name
    what = {
        "rule": rule,
        "setting": setting.policy_text,
        "cache": setting.cache,
        "default": setting.policy_text == rule,
    }
    return what | {"gen_length": setting.gen_length, "figures": figures}


def frontier(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records that no other with the same cache beats in accuracy or tokens per forward without losing the other."""

    def point(r: dict[str, Any]) -> tuple[float, float]:
        return r["figures"]["mean"]["accuracy"], r["figures"]["mean"]["tokens_per_forward"]

    def beaten(r: dict[str, Any], by: dict[str, Any]) -> bool:
        return by["cache"] == r["cache"] and point(by) != point(r) and min(map(operator.sub, point(by), point(r))) >= 0

    return [r for r in records if not any(beaten(r, other) for other in records)]


# -- table ------------------------------------------------------------------------------------------------------------

COLUMNS = (
    "rule", "cache", "lists, right %", "tokens/ forward", "sums, right %", "tokens/ forward", "mean, right %",
    "loss (bound)", "passes", "tokens/ forward", "tokens/ second",
)  # fmt: skip


def cells(r: dict[str, Any]) -> list[str]:
    def right(figures: dict[str, Any]) -> str:
        low, high = 100 * figures["accuracy_low"], 100 * figures["accuracy_high"]
        return f"{100 * figures['accuracy']:.1f} ({low:.0f}–{high:.0f})"

    line = [r["setting"], r["cache"]]
    for group in ("lists", "sums"):
        of = r["figures"].get(group)
        line += [right(of), f"{of['tokens_per_forward']:.2f}"] if of else ["", ""]
    mean = r["figures"]["mean"]
    loss = f"{100 * mean['loss'] + 0:.1f} (≤ {100 * mean['loss_upper']:.1f})"
    line += [right(mean), "" if (r["setting"], r["cache"]) == BASELINE else loss, f"{mean['forward_passes']:.2f}"]
    return [*line, f"{mean['tokens_per_forward']:.2f}", f"{mean['tokens_per_second']:,.0f}"]


def markdown(records: Sequence[dict[str, Any]], about: dict[str, Any]) -> str:
    best = [id(r) for r in frontier(records) if r["cache"] == "dual"]
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|---|" + "---:|" * (len(COLUMNS) - 2)]
    for r in records:
        name, *rest = cells(r)
        name = f"**`{name}`**" if id(r) in best else f"`{name}`"
        lines.append("| " + " | ".join([name, *rest]) + " |")
    one = records[0]["figures"]
    count = next(figures["prompts"] for task, figures in one.items() if task in tasks.names())
    caption = (
        f"{count} questions a task, {one['mean']['prompts']} in the mean, canvas {records[0]['gen_length']};"
        f" {about['device']}; commit {about['commit']}, {about['date']}. In brackets the 95 % interval, and the"
        " one-sided 95 % bound of the loss against the first row on the same questions. Sums count as right if the"
        " whole working is. Bold: with the dual cache no other setting of this run is both at least as right and as"
        " fast in tokens per forward. A forward of `freedave` computes several canvases; its price shows in tokens per"
        " second, for which the settings took turns."
    )
    return "\n".join([*lines, "", caption, "", "![Accuracy against tokens per forward](policies.png)"])


def update(page: str, table: str) -> str:
    """The page with the text between the two markers replaced.

    Raises:
        ValueError: a marker is missing, or there are several.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(f"the page needs {BEGIN} and, behind it, {END}, once each")
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def show(records: Sequence[dict[str, Any]]) -> None:
    table = Table(title="Every rule on the demo model")
    for i, name in enumerate(COLUMNS):
        table.add_column(name.replace(" ", "\n", 1), justify="left" if i < 2 else "right", no_wrap=True)
    for i, r in enumerate(records):
        after = records[i + 1] if i + 1 < len(records) else r
        table.add_row(*cells(r), end_section=(r["rule"], r["cache"]) != (after["rule"], after["cache"]))
    Console(width=160).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=60, help="questions a task (%(default)s)")
    parser.add_argument("--seed", type=int, default=21, help="of the questions (%(default)s)")
    parser.add_argument(
        "--keep", type=Path, default=Path("runs/policies"), help="rows of an interrupted run (%(default)s)"
    )
    parser.add_argument("--rules", nargs="+", default=policies.names(), metavar="NAME", help="default: all registered")
    parser.add_argument("--batch-size", type=int, default=60)
    parser.add_argument("--dry-run", action="store_true", help="page, picture and figures to --keep, as with --rules")
    args = parser.parse_args()
    if unknown := set(args.rules) - set(policies.names()):
        parser.error(f"--rules: {', '.join(sorted(unknown))} given; known: {', '.join(policies.names())}")
    if min(args.prompts, args.batch_size) < 1:
        parser.error("--prompts, --batch-size: at least 1 of each is needed")
    pyplot()  # a missing matplotlib or marker must not show after the decoding
    page = (ROOT / "docs" / "policies.md").read_text(encoding="utf-8")
    update(page, "")
    model = LLaDA.from_pretrained(DEMO_MODEL, device="cpu", dtype="float32")
    samples = questions(model, args.prompts, args.seed)
    chosen = settings(args.rules, canvas_for(model, samples))
    rows = decode_all(model, samples, chosen, args.keep, args.batch_size, "report")
    decoded = [by_task(own, samples) for own in rows.values()]
    records = [record(setting, own, decoded[0]) for setting, own in zip(chosen, decoded, strict=True)]
    about = provenance(model.device) | {"seed": args.seed, "batch_size": args.batch_size}
    partial = args.dry_run or set(args.rules) != set(policies.names())  # the page shows whole reports only
    docs, results = (args.keep, args.keep) if partial else (ROOT / "docs", RESULTS)
    (results / "policies.json").write_text(json.dumps({"about": about, "settings": records}, indent=1) + "\n", "utf-8")
    (docs / "policies.md").write_text(update(page, markdown(records, about)), encoding="utf-8")
    titles = {task: f"{task} (not trained)" if task in NOT_TRAINED else task for task in decoded[0]}
    draw(records, frontier(records), titles, docs / "policies.png")
    show(records)
    print(f"{results / 'policies.json'}, {docs / 'policies.md'} and policies.png written")


if __name__ == "__main__":
    main()

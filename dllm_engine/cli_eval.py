"""``dllm-engine eval``: its arguments, its table, its figures as JSON."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm_engine import cli_options
from dllm_engine.cli_options import note

if TYPE_CHECKING:
    from dllm_engine.evaluate import Row, Setting
    from dllm_engine.model import LLaDA
    from dllm_engine.tasks import Sample

_FRESH: dict[str, Any] = {"prompts": 100, "seed": 1, "names": (3, 6), "sum_steps": 3, "largest": 20}
_TOKENS_A_STEP = (1, 2, 4, 8)
_THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
_FACTORS = (0.5, 0.7, 1.0, 1.3, 1.6)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    questions = parser.add_argument_group("questions")
    source = questions.add_mutually_exclusive_group()
    source.add_argument(
        "--tasks",
        nargs="+",
        metavar="NAME",
        help="fresh questions of these tasks; learned: those the model learned (default)",
    )
    source.add_argument(
        "--data",
        type=Path,
        nargs="+",
        metavar="FILE.jsonl",
        help='published ParallelBench files in the demo\'s template, or rows {"prompt" or "messages", "answer"}, scored'
        " by exact match; with --benchmark, the files it publishes",
    )
    questions.add_argument(
        "--benchmark",
        metavar="NAME",
        help="parallelbench (--data DIR, of task_config.yaml and JSON lines) or gsm8k (--data FILE.jsonl): published"
        " questions through the model's chat template, with the benchmark's prompts; for real checkpoints",
    )
    # of fresh questions; see _FRESH
    questions.add_argument("--prompts", type=int, metavar="N", help="questions a task (100)")
    questions.add_argument("--seed", type=int, metavar="N", help="of the questions (1)")
    questions.add_argument("--names", type=int, nargs=2, metavar=("MIN", "MAX"), help="people in a list (3 6)")
    questions.add_argument("--sum-steps", type=int, metavar="N", help="of worded sums, at most (3)")
    questions.add_argument("--largest", type=int, metavar="N", help="number in worded sums (20)")
    questions.add_argument("--limit", type=int, metavar="N", help="first N rows of each file")
    cli_options.add_chat(questions)

    settings = parser.add_argument_group("settings", "Every combination is run; the first one is the baseline.")
    settings.add_argument(
        "--policy",
        nargs="+",
        metavar="NAME[=VALUE]",
        help=f"{cli_options.POLICY_FORMS}; or oracle (topk auto)",
    )
    settings.add_argument(
        "--cache",
        nargs="+",
        default=["dual"],
        metavar="NAME",
        help="none, prefix or dual (dual); dual/8 refreshes every 8 calls",
    )
    settings.add_argument(
        "--end-of-text", nargs="+", default=["auto"], metavar="NAME", help="auto, off, committed or predicted (auto)"
    )
    settings.add_argument("--block-length", type=int, metavar="N", help=cli_options.BLOCK_LENGTH)
    settings.add_argument(
        "--gen-length",
        type=int,
        metavar="N",
        help="tokens to generate (default: blocks that fit the longest answer; of gsm8k 256)",
    )
    settings.add_argument("--steps", type=int, metavar="N", help="steps of LLaDA's static schedule")
    settings.add_argument(
        "--sweep",
        action="store_true",
        help="instead of --policy: topk, threshold, factor and filters over their ranges, and the oracle",
    )
    settings.add_argument(
        "--filter",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="a filter of the sweep, by any name; may be repeated (default: the model's own)",
    )

    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="questions at once (%(default)s)")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="keep the rows here; the same command then goes on where it stopped"
    )
    parser.add_argument("--plot", type=Path, metavar="DIR", help="write frontier.png and frontier.json")
    parser.add_argument("--json", action="store_true", help="figures as JSON instead of a table")


def run(args: argparse.Namespace) -> None:
    from dllm_engine.evaluate import Setting
    from dllm_engine.published import GSM8K_LENGTH
    from dllm_engine.samples import canvas_for, longest_answer

    filters = _check(args)
    read = _read(args)
    model = cli_options.load(args)
    cli_options.settle_block_length(args, model)
    samples = read or _fresh(args, model)
    longest, least = longest_answer(model, samples), canvas_for(model, samples, args.block_length)
    gen_length = least if args.gen_length is None else args.gen_length
    if gen_length <= longest:
        raise ValueError(
            f"--gen-length: {gen_length} given; the longest answer has {longest} tokens and an end token:"
            f" {least} or a larger multiple of the block length {args.block_length} is needed"
        )
    if args.gen_length is None and args.benchmark == "gsm8k":
        gen_length = max(least, args.block_length * -(-GSM8K_LENGTH // args.block_length))
        note(f"gen_length {gen_length}: room for the model's own working")
    elif args.gen_length is None:
        note(f"gen_length {gen_length}: fits the longest answer ({longest} tokens) and its end token")
    texts = _sweep(args, model, filters) if args.sweep else args.policy
    settings = [
        Setting(text, cache, end_of_text, args.block_length, gen_length, args.steps)
        for cache, end_of_text, text in dict.fromkeys(product(args.cache, args.end_of_text, texts))
    ]
    labels = [_label(setting.policy_text, filters) for setting in settings]
    rows = _decode(args, model, samples, dict(zip(settings, labels, strict=True)))
    records = [
        _record(args, model, setting, label, rows[0], own)
        for setting, label, own in zip(settings, labels, rows, strict=True)
    ]
    if args.plot:
        from dllm_engine.cli_plot import draw

        (args.plot / "frontier.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
        draw(records, args.plot / "frontier.png")
        note(f"{args.plot / 'frontier.png'} and frontier.json written")
    if args.json:
        print(json.dumps(records, indent=1))
    else:
        from dllm_engine import tables

        _print_table(records, f"{len(samples)} questions to {tables.described(model)}")
        if args.benchmark:
            from dllm_engine.cli_eval_tasks import print_tasks

            print_tasks(records)


# -- from arguments to questions and settings -------------------------------------------------------------------------


def _check(args: argparse.Namespace) -> dict[str, str]:
    """The sweep's filters (file to name); fills in defaults. Raises ValueError for what is wrong without a model."""
    from dllm_engine import checks, policies, tasks
    from dllm_engine.policy_text import PolicyText
    from dllm_engine.refresh import Cache

    cli_options.check_counts(args, "prompts", "limit", "batch_size", "block_length", "gen_length", "steps")
    if args.benchmark and args.data is None:
        raise ValueError("--benchmark: needs --data: its published files")
    if args.benchmark and args.chat is False:
        raise ValueError("--no-chat: the questions of a benchmark go through the chat template")
    if args.limit is not None and args.data is None:
        raise ValueError("--limit: needs --data (--prompts is the number of fresh questions)")
    for name, value in _FRESH.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
        elif args.data is not None:
            raise ValueError(f"--{name.replace('_', '-')}: of fresh questions, not of --data (see --limit)")
    for task in args.tasks or ():
        if task not in ("learned", *tasks.names()):
            raise ValueError(f"--tasks: {task!r} given; known: learned, {', '.join(tasks.names())}")
    if args.sweep and (args.policy or args.steps):
        raise ValueError("--sweep: sets policies and steps itself; --policy and --steps must go")
    if args.filter and not args.sweep:
        raise ValueError("--filter: needs --sweep (else --policy learn2pd=FILE)")
    args.policy = args.policy or ["topk", "auto"]
    for text in args.policy:
        PolicyText.parse(text, oracle=True)
    for cache in args.cache:
        Cache.of(cache)
    for end_of_text in args.end_of_text:
        checks.check_options(end_of_text=end_of_text)
    filters: dict[str, str] = {}
    for text in args.filter:
        name, _, file = text.partition("=")
        if not name or not file or name in (*filters.values(), *policies.names(), "oracle"):
            raise ValueError(f"--filter: {text!r} given; NAME=FILE is needed, the name used by nothing else")
        if PolicyText.parse(f"learn2pd={file}").value is not None:
            raise ValueError(f"--filter: {text!r} given; the sweep sets the thresholds, a file alone is needed")
        if file in filters:
            raise ValueError(f"--filter: {text!r} given; {filters[file]} is this file already")
        filters[file] = name
    if args.plot:
        from dllm_engine.cli_plot import pyplot

        pyplot()  # a missing matplotlib, or no directory, must not show after an hour of decoding
    for directory in filter(None, (args.output, args.plot)):
        directory.mkdir(parents=True, exist_ok=True)
    return filters


def _read(args: argparse.Namespace) -> list[Sample]:
    """The questions of --data; none without it. Tells what of a benchmark is left out."""
    from dllm_engine import published
    from dllm_engine.samples import read_samples

    if not args.benchmark:
        return [sample for file in args.data or () for sample in read_samples(file, args.limit)]
    samples, left_out = published.read(args.benchmark, args.data, args.limit)
    for line in left_out:
        note(f"left out: {line}")
    if args.model is None:
        note("the built-in model was not trained on these prompts: its figures say nothing (--model PATH_OR_HUB_ID)")
    return samples


def _fresh(args: argparse.Namespace, model: LLaDA) -> list[Sample]:
    from dllm_engine import tasks
    from dllm_engine.built_in import trained_tasks

    names = args.tasks or ["learned"]
    if "learned" in names:
        try:
            names = [*trained_tasks(model), *(name for name in names if name != "learned")]
        except ValueError as error:
            raise ValueError(f"{error}. --tasks with other names, or --data FILE.jsonl, needs none") from None
    samples = []
    for task in dict.fromkeys(names):
        rng = random.Random(f"{args.seed} {task}")  # its own: another task beside it changes nothing
        options = {
            "shortest": args.names[0],
            "longest": args.names[1],
            "steps": args.sum_steps,
            "largest": args.largest,
        }
        try:
            samples += [tasks.generate(task, rng, **options) for _ in range(args.prompts)]
        except ValueError as error:
            option = "--sum-steps, --largest" if task.endswith("_sums") else "--names"
            raise ValueError(f"{option}: {error}") from None
    return samples


def _sweep(args: argparse.Namespace, model: LLaDA, filters: dict[str, str]) -> list[str]:
    from dllm_engine.filter import FILTER_FILE

    texts = [f"topk={k}" for k in _TOKENS_A_STEP if args.block_length % k == 0]
    texts += [f"threshold={value}" for value in _THRESHOLDS] + [f"factor={value}" for value in _FACTORS]
    learned = [f"learn2pd={file}" for file in filters]
    if not learned and model.path is not None and (model.path / FILTER_FILE).exists():
        learned = ["learn2pd"]
    return [*texts, *(f"{text}@{value}" for text in learned for value in _THRESHOLDS), "oracle"]


def _label(policy_text: str, filters: dict[str, str]) -> str:
    for file, name in filters.items():
        policy_text = policy_text.replace(f"learn2pd={file}@", f"{name}@")
    return policy_text


# -- decoding ---------------------------------------------------------------------------------------------------------


def _decode(
    args: argparse.Namespace, model: LLaDA, samples: list[Sample], labels: dict[Setting, str]
) -> list[list[Row]]:
    from tqdm import tqdm

    from dllm_engine.cli_eval_rows import KeptRows
    from dllm_engine.evaluate import run_all

    kept = KeptRows(args.output, model, samples, labels, batch_size=args.batch_size, chat=args.chat)
    total = len(labels) * -(-len(samples) // args.batch_size)
    finished = sum(-(-len(rows) // args.batch_size) for rows in kept.rows.values())
    if finished:
        note(f"resuming: {finished} of {total} batches are in {args.output}")

    def on_batch(setting: Setting, rows: list[Row]) -> None:
        kept.add(setting, rows)
        bar.update()

    with tqdm(total=total, initial=finished, unit="batch", disable=None) as bar:
        return run_all(
            model,
            samples,
            list(labels),
            batch_size=args.batch_size,
            chat=args.chat,
            done=kept.rows,
            on_turn=lambda setting: bar.set_description(f"{labels[setting]}, {setting.cache}"),
            on_batch=on_batch,
        )


# -- figures ----------------------------------------------------------------------------------------------------------


def _record(
    args: argparse.Namespace, model: LLaDA, setting: Setting, label: str, baseline: list[Row], rows: list[Row]
) -> dict[str, Any]:
    """The object of a setting; loss and ratio are None for the baseline itself."""
    import torch

    from dllm_engine.evaluate import paired_loss, summary
    from dllm_engine.options import resolve_backend

    loss: float | None = None
    upper: float | None = None
    ratio: float | None = None
    if rows is not baseline:
        loss, upper = paired_loss([row.right for row in baseline], [row.right for row in rows])
        ratio = sum(row.passes for row in baseline) / sum(row.passes for row in rows)
    rule, value = _rule_and_value(setting, label)
    by_task = {}
    if args.benchmark:
        from dllm_engine.cli_eval_tasks import task_figures

        by_task = task_figures(baseline, rows)
    return {
        "policy": setting.policy_text, "label": label, "rule": rule, "value": value, "cache": setting.cache,
        "end_of_text": setting.end_of_text, "block_length": setting.block_length, "gen_length": setting.gen_length,
        "steps": setting.policy.steps(setting.gen_length, setting.steps), **summary(rows),
        "loss": loss, "loss_upper": upper, "passes_ratio": ratio, "batch_size": args.batch_size, "seed": args.seed,
        "model": str(model.path), "device": str(model.device), "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(), "backend": resolve_backend("auto", model, 0.0), **by_task,
    }  # fmt: skip


def _rule_and_value(setting: Setting, label: str) -> tuple[str, float | None]:
    """What a line of the plot joins, and where on it a point lies."""
    policy = setting.policy
    return (label.rpartition("@")[0] or label) if policy.name == "learn2pd" else policy.name, policy.value


def _print_table(records: Sequence[dict[str, Any]], title: str) -> None:
    from rich.markup import escape

    from dllm_engine import tables

    ends = len({record["end_of_text"] for record in records}) > 1
    table = tables.table(title)
    tables.add_words(table, "policy", "cache", *(["end of\ntext"] if ends else []))
    tables.add_figures(table, "right %", "95 %\ninterval", "loss\n%", "95 %\nbound")
    tables.add_figures(table, "forward\npasses", "times\nfewer", "tokens/\nforward", "tokens/\nsecond")
    for r in records:
        first = r["loss"] is None
        table.add_row(
            escape(r["label"]),
            r["cache"],
            *([r["end_of_text"]] if ends else []),
            f"{100 * r['accuracy']:.1f}",
            f"{100 * r['accuracy_low']:.1f} to {100 * r['accuracy_high']:.1f}",
            "" if first else f"{100 * r['loss'] + 0:.1f}",
            "" if first else f"≤ {100 * r['loss_upper']:.1f}",
            f"{r['forward_passes']:.2f}",
            "" if first else f"{r['passes_ratio']:.2f}",
            f"{r['tokens_per_forward']:.2f}",
            f"{r['tokens_per_second']:,.0f}",
        )
    console = tables.console()
    tables.show(console, table)
    console.print(
        "Loss: accuracy of the first row minus that of this one on the same prompts, with its one-sided 95 % bound."
        f" Passes: runs of the transformer a prompt. Settings took turns, {records[0]['batch_size']} prompts a batch."
    )

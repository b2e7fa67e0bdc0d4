"""``dllm-engine train-filter``: from prompts to a filter file, in one command."""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm_engine import cli_options

if TYPE_CHECKING:
    from dllm_engine.model import LLaDA

DEFAULT_QUESTIONS = 4000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_argument_group("prompts")
    source.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE.jsonl",
        help='rows {"prompt": str} or {"messages": [...]}, as the model will be asked'
        " (default: fresh questions of the tasks that the built-in model learned)",
    )
    source.add_argument(
        "--limit", type=int, metavar="N", help=f"first N rows, or fresh questions ({DEFAULT_QUESTIONS})"
    )
    cli_options.add_chat(source)

    traces = parser.add_argument_group("traces", "Decoded as the filter will be used.")
    traces.add_argument("--gen-length", type=int, default=128, metavar="N", help="tokens to generate (%(default)s)")
    traces.add_argument("--block-length", type=int, metavar="N", help=cli_options.BLOCK_LENGTH)
    traces.add_argument("--cache", default="dual", metavar="NAME", help="none, prefix or dual (%(default)s)")
    traces.add_argument("--end-of-text", default="auto", metavar="NAME", help="auto, off, committed or predicted")
    traces.add_argument(
        "--ends-wait",
        action=argparse.BooleanOptionalAction,
        help="an end token is committed only if nothing before it is undecided, so that end of text changes no answer"
        " (default: for kind position; the published rule does not)",
    )
    traces.add_argument("--batch-size", type=int, default=32, metavar="N", help="prompts at once (%(default)s)")
    traces.add_argument("--backend", default="auto", metavar="NAME", help="see `dllm-engine info` (%(default)s)")

    fit = parser.add_argument_group("filter")
    fit.add_argument("--kind", default="position", metavar="NAME", help="position (ours) or block (as published)")
    fit.add_argument(
        "--risk", type=float, default=0.0003, metavar="R", help="share of wrong commits to accept (%(default)s)"
    )
    fit.add_argument("--epochs", type=int, metavar="N", help="passes over the training rows")
    fit.add_argument("--seed", type=int, default=0, metavar="N", help="the same seed, the same filter (%(default)s)")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="filter.safetensors, its traces and its reliability diagram; the same command goes on where it stopped",
    )
    parser.add_argument("--json", action="store_true", help="figures as JSON")


def run(args: argparse.Namespace) -> None:
    from dllm_engine import checks, inputs, traces, train_filter
    from dllm_engine.filter import KINDS, model_ids
    from dllm_engine.refresh import Cache

    cli_options.check_counts(args, "batch_size", "gen_length", "block_length", "epochs")
    if args.limit is not None and args.limit < 10:
        raise ValueError(f"--limit: {args.limit} given; at least 10 are needed, thousands are better")
    if args.output.suffix == ".safetensors" or args.output.is_file():
        raise ValueError(f"--output: {args.output} given; a directory is needed, the filter is a file in it")
    if args.kind not in KINDS:
        raise ValueError(f"--kind: {args.kind!r} given; known: {', '.join(KINDS)}")
    if not train_filter.LEAST_RISK <= args.risk < 1:
        raise ValueError(f"--risk: {args.risk} given; {train_filter.LEAST_RISK:g} or more and less than 1 allowed")
    Cache.of(args.cache)
    checks.check_seeds(args.seed, 1)
    checks.check_options(end_of_text=args.end_of_text)
    began = time.perf_counter()
    rows = _rows(args)
    model = cli_options.load(args)
    cli_options.settle_block_length(args, model)
    prompts = _prompts(args, model, rows)
    inputs.check_room(model, prompts, args.gen_length)
    longest = max(map(len, prompts))
    inputs.check_lengths(model, longest, gen_length=args.gen_length, block_length=args.block_length, steps=None)
    ends_wait = args.ends_wait if args.ends_wait is not None else args.kind == "position"
    data = traces.collect(
        model,
        prompts,
        args.output / "traces",
        gen_length=args.gen_length,
        block_length=args.block_length,
        cache=args.cache,
        end_of_text=args.end_of_text,
        ends_wait=ends_wait,
        batch_size=args.batch_size,
        backend=args.backend,
    )
    learned, found = train_filter.train(data, kind=args.kind, risk=args.risk, epochs=args.epochs, seed=args.seed)
    learned.ids, learned.cache, learned.ends_wait = model_ids(model), args.cache, ends_wait
    index = json.loads((args.output / "traces" / traces.INDEX_FILE).read_text(encoding="utf-8"))
    learned.about = {
        "model": str(model.path and model.path.name), "traces": index, "risk": args.risk, "seed": args.seed,
        "figures": train_filter.describe(found),
    }  # fmt: skip
    learned.save_pretrained(args.output)
    _tell(args, learned, found, len(prompts), len(data["prompt"]), time.perf_counter() - began)
    try:
        train_filter.plot(found, args.output / "calibration.png")
    except ImportError:
        cli_options.note("no calibration.png: matplotlib is missing (pip install 'dllm-engine[plots]')")


def _rows(args: argparse.Namespace) -> list[dict[str, Any]] | None:
    """Rows of the file, or None for fresh questions."""
    from dllm_engine.samples import read_prompts

    if args.prompts is None:
        if args.model is not None:
            raise ValueError(
                "--prompts: needed with --model; a JSONL file of prompts like those the model will be asked"
            )
        return None
    rows = read_prompts(args.prompts, args.limit)
    if len(rows) < 10:
        raise ValueError(f"--prompts: {len(rows)} given; at least 10 are needed, thousands are better")
    return rows


def _prompts(args: argparse.Namespace, model: LLaDA, rows: list[dict[str, Any]] | None) -> list[list[int]]:
    from dllm_engine import tasks
    from dllm_engine.built_in import trained_tasks
    from dllm_engine.tokenizer import encode_rows

    if rows is None:
        rng, learned = random.Random(f"train-filter {args.seed}"), trained_tasks(model)
        # every second one a worded sum: of the lists almost every prediction is final at once
        lists = [task for task in learned if task != "worded_sums"] or learned
        turns = [task for one in lists for task in (one, *({"worded_sums"} & {*learned}))]
        count = args.limit or DEFAULT_QUESTIONS
        questions = [tasks.generate(turns[i % len(turns)], rng, longest=10) for i in range(count)]
        rows = [{"prompt": question.prompt} for question in questions]
    return encode_rows(model.tokenizer, rows, chat=args.chat)


def _tell(args: argparse.Namespace, learned: Any, found: Any, prompts: int, steps: int, seconds: float) -> None:
    from dllm_engine.filter import FILTER_FILE
    from dllm_engine.train_filter import describe

    parameters = sum(p.numel() for p in learned.parameters())
    if args.json:
        facts = {
            "filter": str(args.output / FILTER_FILE), "kind": learned.kind, "parameters": parameters,
            "threshold": learned.threshold, "prompts": prompts, "steps": steps, "seconds": round(seconds, 1),
            **describe(found),
        }  # fmt: skip
        print(json.dumps(facts, indent=1))
        return
    print(f"{args.output / FILTER_FILE}: {learned.kind}, {parameters:,} parameters, threshold {learned.threshold:.4f}")
    print(f"{prompts:,} prompts, {steps:,} steps, {seconds:.0f} s")
    for name, values in found.items():
        print(
            f"{name}: {values.rows:,} undecided positions, {100 * values.final:.1f} % final;"
            f" commits {100 * values.committed:.1f} %, {100 * values.wrong:.2f} % of them wrong"
        )

"""``dllm-engine ray-decode``: a file of prompts, decoded by the workers of a Ray cluster."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from dllm_engine import cli_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE.jsonl",
        help='rows {"prompt": str} or {"messages": [...]}; other fields are kept',
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="part-*.jsonl in the order of the input; the same command goes on where it stopped",
    )
    cli_options.add_chat(parser)
    parser.add_argument("--json", action="store_true", help="figures as JSON")
    group = parser.add_argument_group("workers", "Each holds a model of its own.")
    group.add_argument("--workers", type=int, default=1, metavar="N", help="how many (%(default)s)")
    group.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts at once in one (%(default)s)")
    group.add_argument(
        "--rows-per-task",
        type=int,
        default=64,
        metavar="N",
        help="rows that one takes at a time, and rows of an output file (%(default)s)",
    )
    group.add_argument("--cpus-per-worker", type=float, default=1, metavar="N", help="and threads (%(default)s)")
    group.add_argument(
        "--gpus-per-worker", type=float, metavar="N", help="(default: 1 where there are GPUs, unless --device cpu)"
    )
    group.add_argument("--address", help="of the cluster (default: the running one, else one on this machine)")


def run(args: argparse.Namespace) -> None:
    import json

    from dllm_engine.integrations.ray_file import decode_file
    from dllm_engine.options import DEFAULTS

    done = decode_file(
        args.prompts,
        args.output,
        model=args.model,
        workers=args.workers,
        batch_size=args.batch_size,
        rows_per_task=args.rows_per_task,
        seed=args.seed,
        chat=args.chat,
        device=args.device,
        dtype=args.dtype,
        cpus_per_worker=args.cpus_per_worker,
        gpus_per_worker=args.gpus_per_worker,
        address=args.address,
        progress=True,
        **{name: getattr(args, name) for name in DEFAULTS},
    )
    if args.json:
        print(json.dumps(asdict(done), indent=1))
    elif not done.decoded:
        print(f"{args.output}: all {done.rows:,} rows were there already")
    else:
        print(
            f"{args.output}: {done.decoded:,} of {done.rows:,} rows decoded in {done.seconds:.0f} s,"
            f" {done.generated_tokens:,} tokens, {done.generated_tokens / max(done.forward_passes, 1):.1f} a pass"
        )

"""``dllm-engine bench``: how fast a model decodes here, under rules that take turns on the same prompts."""

from __future__ import annotations

import argparse
import json
import operator
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dllm_engine import cli_options

if TYPE_CHECKING:
    from dllm_engine.decode import DecodeOutput
    from dllm_engine.evaluate import Setting
    from dllm_engine.model import LLaDA
    from dllm_engine.policies import Policy


class Contender(NamedTuple):
    """``name`` as the table has it, the rest as in `Setting`."""

    name: str
    policy: str
    cache: str
    end_of_text: str

    def setting(self, args: argparse.Namespace) -> Setting:
        from dllm_engine.evaluate import Setting

        return Setting(self.policy, self.cache, self.end_of_text, args.block_length, args.gen_length)


BASELINES = {  # LLaDA's own way, and the best that needs no training
    "topk": Contender("one token per step", "topk", "none", "off"),
    "threshold": Contender("threshold 0.9 + dual cache", "threshold=0.9", "dual", "committed"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE.jsonl", help='first rows of it, {"prompt": str} or {"messages": [...]}'
    )
    parser.add_argument(
        "--count", type=int, default=8, metavar="N", help="prompts; without a file worded sums (%(default)s)"
    )
    cli_options.add_chat(parser)
    parser.add_argument(
        "--policy", nargs="+", default=["auto"], metavar="NAME[=VALUE]", help="what is compared, see `generate` (auto)"
    )
    parser.add_argument("--cache", default="dual", metavar="NAME", help="of --policy (%(default)s)")
    parser.add_argument("--end-of-text", default="auto", metavar="NAME", help="of --policy (%(default)s)")
    parser.add_argument(
        "--baselines", nargs="*", default=[*BASELINES], choices=BASELINES, metavar="NAME",
        help="topk (one token per step, no cache, every position decoded) and threshold (0.9, dual cache, end of text"
        " committed), in this order before the others; the first row is what the others are compared with (both)",
    )  # fmt: skip
    parser.add_argument("--gen-length", type=int, default=128, metavar="N", help="tokens to generate (%(default)s)")
    parser.add_argument("--block-length", type=int, metavar="N", help=cli_options.BLOCK_LENGTH)
    parser.add_argument(
        "--batch-size", type=int, nargs="+", default=[1, 8], metavar="N", help="prompts at once, each in turn (1 8)"
    )
    parser.add_argument("--turns", type=int, default=3, metavar="N", help="of each contender (%(default)s)")
    parser.add_argument("--backend", default="auto", metavar="NAME", help="see `dllm-engine info` (%(default)s)")
    parser.add_argument("--json", action="store_true", help="figures as JSON instead of a table")


def run(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from dllm_engine.evaluate import checked
    from dllm_engine.tokenizer import encode_rows

    contenders = _check(args)
    rows = _rows(args)
    model = cli_options.load(args)
    cli_options.settle_block_length(args, model)
    prompts = encode_rows(model.tokenizer, rows, chat=args.chat)
    made = {contender: checked(model, contender.setting(args), prompts) for contender in contenders}
    records: list[dict[str, Any]] = []
    sizes = dict.fromkeys(min(size, len(prompts)) for size in args.batch_size)
    with tqdm(total=len(sizes) * len(contenders) * (args.turns + 1), desc="bench", leave=False, disable=None) as bar:
        for size in sizes:
            records += _measure(args, model, prompts, made, size, bar.update)
    if args.json:
        print(json.dumps(records, indent=1))
    else:
        _print(records, model, len(prompts))


def _check(args: argparse.Namespace) -> list[Contender]:
    """Raises ValueError for what is wrong without a model."""
    from dllm_engine import checks
    from dllm_engine.policy_text import PolicyText
    from dllm_engine.refresh import Cache

    cli_options.check_counts(args, "count", "gen_length", "block_length", "turns", "batch_size")
    for policy in args.policy:
        PolicyText.parse(policy)
    Cache.of(args.cache)
    checks.check_options(end_of_text=args.end_of_text)
    own = [Contender(policy, policy, args.cache, args.end_of_text) for policy in args.policy]
    return list(dict.fromkeys([*(BASELINES[name] for name in BASELINES if name in args.baselines), *own]))


def _rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    from dllm_engine import tasks
    from dllm_engine.samples import read_prompts

    if args.prompts is None:
        rng = random.Random(0)
        return [{"prompt": tasks.generate("worded_sums", rng).prompt} for _ in range(args.count)]
    return read_prompts(args.prompts, args.count)


def _measure(
    args: argparse.Namespace,
    model: LLaDA,
    prompts: list[list[int]],
    contenders: dict[Contender, Policy | str],
    size: int,
    tick: Callable[[], Any],
) -> list[dict[str, Any]]:
    """Figures of every contender (with its policy) at one batch size; the first batch goes before, untimed."""
    from dllm_engine.evaluate import decode_as, synchronize

    def turn(contender: Contender, stop: int = len(prompts)) -> tuple[list[float], list[DecodeOutput]]:
        seconds, outs, policy = [], [], contenders[contender]
        for first in range(0, stop, size):
            began = time.perf_counter()
            part = prompts[first : first + size]
            outs.append(decode_as(model, part, contender.setting(args), policy, seed=first, backend=args.backend))
            synchronize(model)
            seconds.append(time.perf_counter() - began)
        tick()
        return seconds, outs

    for contender in contenders:
        turn(contender, stop=1)
    turns: dict[Contender, list[list[float]]] = {contender: [] for contender in contenders}
    outs = {}
    for _ in range(args.turns):
        for contender in contenders:
            seconds, outs[contender] = turn(contender)
            turns[contender].append(seconds)

    texts = {
        contender: [
            row[-args.gen_length :][:count]
            for out in outs[contender]
            for row, count in zip(out.sequences.tolist(), out.generated_tokens.tolist(), strict=True)
        ]
        for contender in contenders
    }
    tokens = {contender: sum(map(len, texts[contender])) for contender in contenders}
    records, first = [], next(iter(contenders))
    for contender in contenders:
        passes = sum(int(out.sequence_passes.sum()) for out in outs[contender])
        taken = [sum(batches) for batches in turns[contender]]
        faster = [sum(other) / own for own, other in zip(taken, turns[first], strict=True)]
        records.append({
            **contender._asdict(), "batch_size": size, "prompts": len(prompts), "turns": args.turns,
            "forward_passes": passes / len(prompts), "tokens_per_forward": tokens[contender] / passes,
            "seconds_per_batch": statistics.median(s for batches in turns[contender] for s in batches),
            "tokens_per_second": tokens[contender] / statistics.median(taken),
            "times_first": statistics.median(faster) * tokens[contender] / max(tokens[first], 1),
            "same_texts_as_first": sum(map(operator.eq, texts[first], texts[contender])),
            "backend": outs[contender][0].settings["backend"],
        })  # fmt: skip
    return records


def _print(records: Sequence[dict[str, Any]], model: LLaDA, prompts: int) -> None:
    from rich.markup import escape

    from dllm_engine import tables

    title = f"{prompts} prompts to {tables.described(model)}, backend {records[0]['backend']}"
    table = tables.table(title)
    tables.add_figures(table, "prompts\nat once")
    tables.add_words(table, "policy", "cache")
    tables.add_figures(table, "forward\npasses", "tokens/\nforward", "seconds\na batch", "tokens/\nsecond")
    tables.add_figures(table, "times\nthe first", "texts as\nthe first")
    for i, r in enumerate(records):
        new = i == 0 or records[i - 1]["batch_size"] != r["batch_size"]
        end = i + 1 < len(records) and records[i + 1]["batch_size"] != r["batch_size"]
        table.add_row(
            str(r["batch_size"]) if new else "", escape(r["name"]), r["cache"], f"{r['forward_passes']:.1f}",
            f"{r['tokens_per_forward']:.1f}", f"{r['seconds_per_batch']:.3g}", f"{r['tokens_per_second']:,.0f}",
            f"{r['times_first']:.1f}", f"{r['same_texts_as_first']}/{prompts}",
            end_section=end,
        )  # fmt: skip
    console = tables.console()
    tables.show(console, table)
    console.print(
        "Medians of turns. Tokens: those before the end of the answer. Passes: runs of the transformer a prompt."
    )

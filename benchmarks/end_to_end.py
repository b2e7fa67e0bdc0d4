"""From prompt to answer against the loops that people run: ``python benchmarks/end_to_end.py --case CASE``.

  demo   the built-in model on worded sums and lists: LLaDA's loop (one token a step, logits of the whole canvas), then
         what each part of the engine adds to it, and Fast-dLLM's dual-cache loop; tokens a second count what is before
         the first end token, and every line has its accuracy
  vocab  random weights with LLaDA's vocabulary of 126,464 words: the engine against Fast-dLLM's loop at the same rule
         and cache
  8b     random weights of LLaDA-8B's shape, bfloat16, for a GPU; ``--layers`` shrinks it

The contenders take turns, prompt by prompt; the factors are medians over prompts. In float32, lines that must give the
same tokens are compared on every prompt, and an unequal one stops the run. Random logits are almost uniform and would
never pass the threshold: the random head is scaled (``--peak``) until a step commits several tokens, as in real text.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from common import append
from contenders import BLOCK, FAST, LLADA, THRESHOLD, Contender, fast_dllm, llada, ours, take_turns
from learn2pd import questions
from models import SHAPES, random_model
from rich.console import Console
from rich.table import Table

from dllm_engine import LLaDA, tasks
from dllm_engine.built_in import DEMO_MODEL
from dllm_engine.cli_plot import pyplot
from dllm_engine.evaluate import wilson
from dllm_engine.tokenizer import answer_text, encode_prompt

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SOFTMAX = {"float64": torch.float64, "model": None}  # of LLaDA's loop
DEFAULTS: dict[str, tuple[int, list[int], str]] = {  # turns, gen_lengths, dtype
    "demo": (20, [256], "float32"),
    "vocab": (5, [128], "float32"),
    "8b": (5, [128], "bfloat16"),
}


def demo_contenders(model: LLaDA, softmax_dtype: torch.dtype | None, gen_length: int) -> list[Contender]:
    """LLaDA's loop, the engine with one part more a line, Fast-dLLM's loop."""
    parts = [
        ("our op", "topk", "none", "off", LLADA),
        ("+ dual cache", "topk", "dual", "off", ""),
        (f"+ threshold {THRESHOLD}", "threshold", "dual", "off", FAST),
        ("+ learned filter", "auto", "dual", "off", ""),
        ("+ end of text, committed", "auto", "dual", "committed", ""),
        ("+ end of text, predicted", "auto", "dual", "predicted", ""),
        # the strongest simple baseline: all but the filter
        (f"threshold {THRESHOLD}, end of text", "threshold", "dual", "committed", ""),
    ]
    steps = [
        ours(name, model, gen_length, same_as, policy=policy, cache=cache, end_of_text=end_of_text)
        for name, policy, cache, end_of_text, same_as in parts
    ]
    return [llada(model, gen_length, softmax_dtype), *steps, fast_dllm(model, gen_length)]


def random_contenders(model: LLaDA, softmax_dtype: torch.dtype | None, gen_length: int) -> list[Contender]:
    """Fast-dLLM's loop and the engine; on a GPU, where it takes seconds, also LLaDA's."""
    engine = ours("dllm-engine", model, gen_length, FAST, policy="threshold", cache="dual", end_of_text="off")
    slow = [llada(model, gen_length, softmax_dtype)] if model.device.type == "cuda" else []
    return [*slow, fast_dllm(model, gen_length), engine]


def run_demo(args: argparse.Namespace, device: torch.device, console: Console) -> list[dict[str, Any]]:
    model = LLaDA.from_pretrained(args.model, device=device, dtype="float32")
    half = -(-args.turns // 2)
    families = [questions(model, family, half, "end to end") for family in ("sums", "lists")]
    samples: list[tasks.Sample] = list(chain(*zip(*families, strict=True)))[: args.turns]
    prompts = [torch.tensor([encode_prompt(model.tokenizer, s.prompt, chat=True)], device=device) for s in samples]
    longest = max(prompt.shape[1] for prompt in prompts) + max(args.gen_lengths)
    if longest > model.config.max_sequence_length:  # the size of a table; the model never saw canvases near it anyway
        model.config = replace(model.config, max_sequence_length=longest)
    records = []
    for gen_length in args.gen_lengths:
        make = partial(demo_contenders, model, SOFTMAX[args.softmax])
        contenders = take_turns(make, gen_length, prompts, exact=True)
        lines = []
        for one in contenders:
            generated = [decoded.sequences[0, -gen_length:].tolist() for decoded in one.turns]
            ends = [[i for i, token in enumerate(ids) if token in model.end_ids] for ids in generated]
            one.counts = [at[0] if at else gen_length for at in ends]
            texts = [answer_text(model, ids) for ids in generated]
            one.right = [tasks.score(sample, text) for sample, text in zip(samples, texts, strict=True)]
        for one in contenders:
            low, high = wilson(sum(one.right), len(one.right))
            accuracy = {"accuracy": sum(one.right) / len(one.right), "accuracy_low": low, "accuracy_high": high}
            lines.append(one.record(contenders) | accuracy | {"gen_length": gen_length, "dtype": "float32"})
        show(lines, f"demo model, {len(prompts)} prompts, one at a time, gen_length {gen_length}", console)
        if not any(contenders[0].right):
            console.print(f"{LLADA} has no answer right: the model does not know this length, its speeds say little")
        records += lines
    return records


def run_random(args: argparse.Namespace, device: torch.device, console: Console) -> list[dict[str, Any]]:
    shape, dtype, prompt_length = sized(args), DTYPES[args.dtype], args.prompt_length
    longest = prompt_length + max(args.gen_lengths)
    model = random_model(shape, device=device, dtype=dtype, max_length=longest, peak=args.peak)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(shape.vocab - 2, (args.turns, 1, prompt_length), generator=generator)
    records = []
    for gen_length in args.gen_lengths:
        make = partial(random_contenders, model, SOFTMAX[args.softmax])
        contenders = take_turns(make, gen_length, list(ids.to(device)), exact=dtype == torch.float32)
        for one in contenders:
            one.counts = [gen_length] * args.turns
        about = {
            "gen_length": gen_length, "prompt_length": prompt_length, "dtype": args.dtype, "peak": args.peak,
            "layers": shape.n_layers,
        }  # fmt: skip
        lines = [one.record(contenders) | about for one in contenders]
        steps = lines[-1]["forward_passes"] * BLOCK / gen_length
        title = f"{args.case}, {shape.n_layers} layers of {shape.d_model}, {shape.vocab:,} words, {args.dtype}, prompt"
        show(lines, f"{title} {prompt_length}, gen_length {gen_length}, {steps:.1f} steps a block", console)
        if not 1 < steps < BLOCK:
            message = f"--peak {args.peak}: {steps:.1f} steps a block; between 1 and {BLOCK} the rule would decide"
            if args.case == "vocab":
                raise AssertionError(message)
            console.print(message)
        records += lines
    return records


def show(lines: Sequence[dict[str, Any]], title: str, console: Console) -> None:
    columns: dict[str, Callable[[dict[str, Any]], str]] = {"": lambda r: r["contender"]}
    if "accuracy" in lines[0]:
        columns["right %"] = lambda r: f"{100 * r['accuracy']:.0f}"
        columns["95 %"] = lambda r: f"{100 * r['accuracy_low']:.0f} to {100 * r['accuracy_high']:.0f}"
    columns["passes"] = lambda r: f"{r['forward_passes']:.1f}"
    columns["s/prompt"] = lambda r: f"{r['seconds']:.3f}"
    columns["ms/pass"] = lambda r: f"{1e3 * r['seconds_per_pass']:.2f}"
    columns["tokens/s"] = lambda r: f"{r['tokens_per_second']:,.1f}"
    if "speedup_over_llada" in lines[0]:
        columns["x LLaDA"] = lambda r: f"{r['speedup_over_llada']:.2f}"
    columns["x Fast-dLLM"] = lambda r: f"{r['speedup_over_fast_dllm']:.2f}"
    columns["same tokens"] = lambda r: f"{r['same_tokens']:.0%}" if "same_tokens" in r else ""
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="right" if name else "left")
    for r in lines:
        table.add_row(*(cell(r) for cell in columns.values()))
    console.print(table)


def plot(records: Sequence[dict[str, Any]], file: Path) -> None:
    """Bars of tokens a second, a panel for each length."""
    plt = pyplot()
    lengths = list(dict.fromkeys(r["gen_length"] for r in records))
    figure, axes = plt.subplots(1, len(lengths), figsize=(2 + 6 * len(lengths), 4), squeeze=False, layout="constrained")
    for axis, length in zip(axes[0], lengths, strict=True):
        lines = [r for r in records if r["gen_length"] == length][::-1]
        colours = ["#7F7F7F" if r["contender"] in (LLADA, FAST) else "#0072B2" for r in lines]
        bars = axis.barh([r["contender"] for r in lines], [r["tokens_per_second"] for r in lines], color=colours)
        factors = [r.get("speedup_over_llada", r["speedup_over_fast_dllm"]) for r in lines]
        axis.bar_label(bars, [f" {factor:.1f} times" for factor in factors])
        axis.set(xlabel="tokens a second (median factor over the first line)", title=f"gen_length {length}")
        axis.set_xlim(0, 1.3 * max(r["tokens_per_second"] for r in lines))
        axis.spines[["top", "right"]].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def sized(args: argparse.Namespace) -> Any:
    """The shape of ``--case``, with ``--layers``."""
    shape = SHAPES[args.case]
    return replace(shape, n_layers=args.layers) if args.layers else shape


def check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Fills in what was not given; what cannot run is an error."""
    turns, lengths, dtype = DEFAULTS[args.case]
    for gen_length in args.gen_lengths or []:
        if gen_length < 1 or gen_length % BLOCK:
            parser.error(f"--gen-lengths: {gen_length} given; multiples of {BLOCK} are needed")
    for name in ("turns", "prompt_length", "layers"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}: {value} given; at least 1 is needed")
    args.turns, args.gen_lengths = args.turns or turns, args.gen_lengths or lengths
    args.dtype = args.dtype or dtype
    if args.case == "demo":
        return
    shape, size = sized(args), DTYPES[args.dtype].itemsize
    canvas = args.prompt_length + max(args.gen_lengths)
    needed = shape.parameters() * size + canvas * shape.vocab * (size + 2 * 8)  # logits and two float64 copies of them
    gib = math.ceil(needed / 2**30)
    if torch.device(args.device).type == "cuda":
        free = torch.cuda.mem_get_info()[0]
        if needed > free:
            parser.error(f"--case {args.case}: {gib} GiB are needed, {free / 2**30:.0f} are free on this GPU")
    elif args.case == "8b" and not args.layers:
        parser.error(f"--case 8b: this needs a GPU with {gib} GiB free; --layers 2 runs a shrunk model on a CPU")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=DEFAULTS, default="demo")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--turns", type=int, help="prompts, each decoded once by everyone (demo 20, others 5)")
    parser.add_argument("--gen-lengths", type=int, nargs="+", help="default: demo 256, others 128")
    parser.add_argument(
        "--softmax",
        choices=SOFTMAX,
        default="float64",
        help="LLaDA's loop: as in its first releases and forks, or in the model's own type, as in those since",
    )
    parser.add_argument("--model", type=Path, default=DEMO_MODEL, help="demo: a model trained by train_demo.py")
    parser.add_argument("--prompt-length", type=int, default=128, help="vocab, 8b: random tokens (%(default)s)")
    parser.add_argument("--peak", type=float, default=18.0, help="vocab, 8b: deviation of the logits (%(default)s)")
    parser.add_argument("--layers", type=int, help="vocab, 8b: instead of 8 and 32")
    parser.add_argument("--dtype", choices=DTYPES, help="vocab, 8b: default float32 and bfloat16")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a bar chart (PNG)")
    parser.add_argument("--dry-run", action="store_true", help="print only, append nothing")
    args = parser.parse_args()
    check(args, parser)
    if args.plot:
        pyplot()  # a missing matplotlib is told before anything is measured
    device, console = torch.device(args.device), Console(width=150)
    records = (run_demo if args.case == "demo" else run_random)(args, device, console)
    if not args.dry_run:
        about = {"benchmark": "end_to_end", "case": args.case, "softmax": args.softmax}
        console.print(f"appended to {append([about | record for record in records], device)}")
    if args.plot:
        plot(records, args.plot)


if __name__ == "__main__":
    main()

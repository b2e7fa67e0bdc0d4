"""How time grows with the canvas, the batch and the generation: ``python benchmarks/scaling.py``.

  length      one step at one sequence: LLaDA's (whole canvas, logits of all of it), the engine's inside a block
  batch       a whole decode under the dual cache: Fast-dLLM's loop and the engine
  gen_length  a whole decode of one prompt: LLaDA's loop, Fast-dLLM's with the dual cache, the engine with it

Weights are random, and every rule is LLaDA's static schedule at four tokens a step, so that all contenders make the
same number of steps at every size. In float32 the two decodes under the dual cache must give the same tokens before
they are timed. *growth* is the exponent between a line and the one before: 1 is linear, 0 is flat.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from baselines import fast_dllm_generate, llada_generate
from block_step import BLOCK, DTYPES, BlockStep
from common import append, interleaved
from models import SHAPES, random_model
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dllm_engine import LLaDA, decode
from dllm_engine.cli_plot import pyplot

A_STEP = 4  # tokens
LLADA, FAST, OURS = "LLaDA's loop", "Fast-dLLM's loop, dual", "dllm-engine, dual"
COLOURS = {LLADA: "#000000", FAST: "#E69F00", OURS: "#0072B2"}
Contenders = dict[str, Callable[[], Any]]


def random_prompt(model: LLaDA, batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size - 2, (batch, length), generator=generator).to(model.device)


def by_length(model: LLaDA, length: int, prompt_length: int) -> Contenders:
    prompt = random_prompt(model, 1, length - BLOCK)
    return {
        LLADA: partial(llada_generate, model, prompt, steps=1, gen_length=BLOCK, block_length=BLOCK),
        OURS: BlockStep(model, 1, length).step,
    }


def by_batch(model: LLaDA, batch: int, prompt_length: int) -> Contenders:
    both = decodes(model, random_prompt(model, batch, prompt_length), 2 * BLOCK)
    return {name: both[name] for name in (FAST, OURS)}


def by_gen_length(model: LLaDA, gen_length: int, prompt_length: int) -> Contenders:
    return decodes(model, random_prompt(model, 1, prompt_length), gen_length)


def decodes(model: LLaDA, prompt: Tensor, gen_length: int) -> Contenders:
    schedule: dict[str, Any] = {"gen_length": gen_length, "block_length": BLOCK, "steps": gen_length // A_STEP}
    return {
        LLADA: partial(llada_generate, model, prompt, **schedule),
        FAST: partial(fast_dllm_generate, model, prompt, **schedule, cache="dual"),
        OURS: partial(decode, model, prompt, **schedule, policy="topk", cache="dual", end_of_text="off", seed=0),
    }


WAYS: dict[str, Callable[[LLaDA, int, int], Contenders]] = {
    "length": by_length,
    "batch": by_batch,
    "gen_length": by_gen_length,
}


def measure(model: LLaDA, axis: str, sizes: Sequence[int], prompt_length: int, seconds: float) -> list[dict[str, Any]]:
    """Records of one axis, sizes ascending."""
    records: list[dict[str, Any]] = []
    before: dict[str, dict[str, Any]] = {}
    for size in sizes:
        contenders = WAYS[axis](model, size, prompt_length)
        same = [contenders[name]().sequences for name in (FAST, OURS) if FAST in contenders]
        if same and model.dtype == torch.float32 and not torch.equal(*same):
            raise AssertionError(f"{axis} {size}: {FAST!r} and {OURS!r} give different tokens")
        for name, turns in interleaved(contenders, model.device, seconds, least=3).items():
            record = {
                "benchmark": "scaling", "axis": axis, "size": size, "contender": name, "runs": len(turns),
                "prompt_length": prompt_length, "seconds": statistics.median(turns),
            }  # fmt: skip
            if name in before:
                last = before[name]
                record["growth"] = math.log(record["seconds"] / last["seconds"]) / math.log(size / last["size"])
            before[name] = record
            records.append(record)
    return records


def show(records: Sequence[dict[str, Any]], axis: str, console: Console) -> None:
    names = list(dict.fromkeys(r["contender"] for r in records))
    unit = "a step" if axis == "length" else "a decode"
    table = Table(title=f"{unit} by {axis}", title_justify="left")
    table.add_column(axis, justify="right")
    for name in names:
        table.add_column(f"{name}, ms", justify="right")
        table.add_column("growth", justify="right")
    for size in dict.fromkeys(r["size"] for r in records):
        cells = []
        for r in (r for r in records if r["size"] == size):
            cells += [f"{1e3 * r['seconds']:,.2f}", f"{r['growth']:.2f}" if "growth" in r else ""]
        table.add_row(f"{size:,}", *cells)
    console.print(table)


def plot(records: Sequence[dict[str, Any]], file: Path) -> None:
    """A panel for each axis, both scales logarithmic."""
    plt = pyplot()
    used = list(dict.fromkeys(r["axis"] for r in records))
    figure, axes = plt.subplots(1, len(used), figsize=(1 + 4.5 * len(used), 4), squeeze=False, layout="constrained")
    for panel, axis in zip(axes[0], used, strict=True):
        for name, colour in COLOURS.items():
            line = [(r["size"], 1e3 * r["seconds"]) for r in records if (r["axis"], r["contender"]) == (axis, name)]
            if line:
                panel.plot(*zip(*line, strict=True), "o-", color=colour, label=name)
        panel.set(xscale="log", yscale="log", xlabel=axis, ylabel="ms a step" if axis == "length" else "ms a decode")
        sizes = sorted({r["size"] for r in records if r["axis"] == axis})
        panel.set_xticks(sizes, [f"{size:,}" for size in sizes], minor=False)
        panel.minorticks_off()
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--shape",
        choices=[name for name, shape in SHAPES.items() if not shape.dream],
        help="default: small, on a GPU 8b",
    )
    parser.add_argument("--layers", type=int, help="instead of the shape's")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32, of 8b bfloat16")
    parser.add_argument("--lengths", type=int, nargs="*", help="default 256 512 1024 2048, on a GPU to 8192")
    parser.add_argument("--batches", type=int, nargs="*", help="default 1 2 4 8, on a GPU to 32")
    parser.add_argument("--gen-lengths", type=int, nargs="*", help="default 64 128 256, on a GPU to 512")
    parser.add_argument("--prompt-length", type=int, default=64, help="of the decodes (%(default)s)")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each line of a table (%(default)s)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="the three as one picture (PNG)")
    parser.add_argument("--dry-run", action="store_true", help="print only, append nothing")
    args = parser.parse_args()
    device, console = torch.device(args.device), Console(width=150)
    on_gpu = device.type == "cuda"
    name = args.shape or ("8b" if on_gpu else "small")
    if name == "8b" and not on_gpu and not args.layers:
        parser.error("--shape 8b: LLaDA-8B's shape needs a GPU; --layers shrinks it")
    shape = replace(SHAPES[name], n_layers=args.layers) if args.layers else SHAPES[name]
    sizes: dict[str, list[int]] = {
        "length": [256, 512, 1024, 2048] + [4096, 8192] * on_gpu if args.lengths is None else args.lengths,
        "batch": [1, 2, 4, 8] + [16, 32] * on_gpu if args.batches is None else args.batches,
        "gen_length": [64, 128, 256] + [512] * on_gpu if args.gen_lengths is None else args.gen_lengths,
    }
    if any(size <= BLOCK for size in sizes["length"]) or any(
        size < 1 for size in (*sizes["batch"], args.prompt_length)
    ):
        parser.error(f"--lengths must be above {BLOCK}, --batches and --prompt-length at least 1")
    if any(size < 1 or size % BLOCK for size in sizes["gen_length"]):
        parser.error(f"--gen-lengths: multiples of {BLOCK} are needed")
    sizes = {axis: sorted(set(values)) for axis, values in sizes.items() if values}
    if not sizes:
        parser.error("nothing to measure: --lengths, --batches and --gen-lengths are all empty")

    if args.plot:
        pyplot()  # a missing matplotlib is told before anything is measured
    dtype = DTYPES[args.dtype or ("bfloat16" if name == "8b" else "float32")]
    longest = max(*sizes.get("length", [0]), args.prompt_length + max([*sizes.get("gen_length", []), 2 * BLOCK]))
    model = random_model(shape, device=device, dtype=dtype, max_length=longest)
    records: list[dict[str, Any]] = []
    for axis, values in sizes.items():
        found = measure(model, axis, values, args.prompt_length, args.seconds)
        show(found, axis, console)
        found = [r | {"shape": name, "layers": shape.n_layers, "dtype": str(dtype)[6:]} for r in found]
        if not args.dry_run:  # at once: what comes after it may be stopped
            console.print(f"appended to {append(found, device)}")
        records += found
    if args.plot:
        plot(records, args.plot)


if __name__ == "__main__":
    main()

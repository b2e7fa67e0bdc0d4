"""One decode step after the final norm: ``python benchmarks/decode_step.py``.

Every backend against (a) the reference decoders' way: logits of the whole canvas, a float64 softmax, gather, top-k with
host syncs; (b) a good unfused way: ``linear`` on the rows that matter, float32 logsumexp and max, vectorised commit;
(c) ``torch.compile`` of (b); (d) the matrix product alone. A backend that fails its check is not timed. On a GPU all
but (a), which asks the host, are replayed as CUDA graphs.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import append, failure, fma_rate, graphed, interleaved, matmul_rate, peak_memory, ratio, read_bandwidth
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dllm_engine import backends, ops
from dllm_engine.policies import Threshold
from dllm_engine.rules import Rule
from dllm_engine.state import DecodeState

BLOCK, PROMPT, THRESHOLD = 32, 256, 0.9
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


_told: set[str] = set()


class Problem:
    """``rows`` undecided rows in blocks of at most 32, at the end of a canvas with 256 more."""

    def __init__(self, dim: int, vocab: int, rows: int, dtype: torch.dtype, head: Tensor) -> None:
        device = head.device
        generator = torch.Generator(device).manual_seed(0)
        self.head, self.width = head, min(rows, BLOCK)
        self.canvas = torch.randn(PROMPT + rows, dim, generator=generator, device=device).to(dtype)
        batch = rows // self.width
        self.hidden = self.canvas[PROMPT:].view(batch, self.width, dim)
        start = [0, self.width, 0, self.width, 0, self.width]
        fresh = torch.tensor([start] * batch, device=device).view(torch.uint8).flatten()
        self.fresh = torch.cat((fresh, torch.ones(rows, dtype=torch.uint8, device=device)))
        self.changed = self.fresh.clone()  # what a step reads and changes, in one piece: restored by one copy
        progress, undecided = self.changed.split((len(fresh), rows))
        ids = torch.full((2, batch, self.width), vocab - 1, device=device)
        seeds, quota = torch.zeros_like(ids[0, :, 0]), torch.ones_like(ids[0, 0])
        self.state = DecodeState.of(
            ids[0], undecided.view(torch.bool).view(batch, -1), ids[1], progress.view(torch.int64).view(batch, -1),
            seeds, quota, prompt_length=0, fill_id=0,
        )  # fmt: skip
        self.sequences = torch.arange(batch, device=device)
        self.rule: Rule = Threshold(THRESHOLD).rule(self.width, device)
        self.banned = ops.id_tensor([vocab - 1], device)
        self.undecided = torch.ones(rows, dtype=torch.bool, device=device)

    def fused(self, backend: str) -> Callable[[], Any]:
        def run() -> Any:
            self.changed.copy_(self.fresh)  # some bytes, part of the time
            return ops.decode_step_(
                self.hidden, self.head, self.state, self.sequences, self.rule, banned_ids=self.banned, backend=backend
            )

        return run

    def reference(self) -> Any:
        """(a) LLaDA's generate.py: everything for every position of the canvas, the host asked for the count."""
        logits = F.linear(self.canvas, self.head)
        p = F.softmax(logits.to(torch.float64), dim=-1)
        x0 = torch.argmax(logits, dim=-1)
        x0_p = torch.gather(p, -1, x0[:, None])[:, 0]
        x0_p[:PROMPT] = -np.inf
        transfer = torch.zeros_like(x0, dtype=torch.bool)
        _, index = torch.topk(x0_p, k=int(self.undecided.sum().item() // len(self.undecided)))
        transfer[index] = True
        return x0, transfer

    def unfused(self) -> Any:
        """(b)"""
        return unfused(self.canvas[PROMPT:], self.head, self.undecided)

    def product(self) -> Any:
        """(d)"""
        return F.linear(self.canvas[PROMPT:], self.head)


def unfused(hidden: Tensor, head: Tensor, undecided: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(hidden, head).float()
    best, token = logits.max(-1)
    confidence = (best - logits.logsumexp(-1)).exp().masked_fill(~undecided, -1)
    chosen = (confidence >= THRESHOLD) | (torch.arange(len(token), device=token.device) == confidence.argmax())
    return token, chosen & undecided


def random_head(shape: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[V, D] of a shape as the command line has it; logits have the standard deviation 3."""
    vocab, dim = map(int, shape.split("x"))
    return torch.randn(vocab, dim, device=device).mul_(3 / dim**0.5).to(dtype)


def check(problem: Problem, backend: str) -> str:
    """Why a backend must not be timed: it cannot run, or a few rows' statistics are not float64's; "" if it may."""
    if reason := backends.BACKENDS[backend].refuses(problem.hidden.flatten(0, 1), problem.head):
        return reason
    rows = torch.arange(min(4, len(problem.canvas) - PROMPT), device=problem.head.device) + PROMPT
    stats = ops.row_stats(problem.canvas, problem.head, rows, backend=backend)
    x = torch.cat([problem.canvas[rows].double() @ part.double().T for part in problem.head.split(16384)], dim=1)
    bound = 1e-4 * (1 + x.abs().amax())
    for name, expected in (("logsumexp", x.logsumexp(1)), ("logit", x.amax(1))):
        error = (getattr(stats, name) - expected).abs().max()
        if not error <= bound:
            return f"{name} is off by {error:.2g}, {bound:.2g} allowed"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", default=["126464x4096"], help="VOCABULARYxWIDTH")
    parser.add_argument("--rows", nargs="+", type=int, help="default: 1 8 32, on a GPU also 64 256 1024")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=None)
    parser.add_argument("--backends", nargs="+", help="default: every one that can run")
    parser.add_argument("--without", nargs="+", default=[], choices=["a", "b", "c", "d"], help="baselines to leave out")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each table line's contenders together")
    args = parser.parse_args()
    device, console = torch.device(args.device), Console(width=150)
    rows_list = args.rows or ([1, 8, 32] if device.type == "cpu" else [1, 8, 32, 64, 256, 1024])
    for rows in rows_list:
        if rows < 1 or (rows > BLOCK and rows % BLOCK):
            parser.error(f"--rows: {rows} given; 1 to {BLOCK} or a multiple of {BLOCK}")
    dtypes = args.dtypes or (["bfloat16", "float32"] if device.type == "cpu" else ["bfloat16"])
    bandwidth = read_bandwidth(device)
    file = None
    for name in dtypes:
        dtype = DTYPES[name]
        roof = fma_rate(torch.get_num_threads()) if device.type == "cpu" else matmul_rate(device, dtype)
        console.print(f"roofs, {name}: {roof / 1e9:,.0f} GFLOP/s, {bandwidth / 1e9:,.0f} GB/s")
        for shape in args.shapes:
            head = random_head(shape, dtype, device)
            vocab, dim = head.shape
            for rows in rows_list:
                line = measure(Problem(dim, vocab, rows, dtype, head), rows, args, console)
                for record in line:
                    record |= {"vocab": vocab, "width": dim, "rows": rows, "dtype": name}
                    record |= {"roof_flops": roof, "roof_bandwidth": bandwidth}
                file = append(line, device)
                print_table(line, f"{rows} rows x {vocab} x {dim}, {name}", console)
    console.print(f"written to {file}")


def measure(problem: Problem, rows: int, args: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    device = problem.head.device
    contenders: dict[str, Callable[[], Any]] = {}

    def take(name: str, run: Callable[[], Any], reason: str) -> None:
        if not (reason := reason or failure(run)):
            contenders[name] = run
        elif (message := f"{name} is not timed: {reason}") not in _told:
            console.print(message, markup=False)
            _told.add(message)

    for backend in args.backends or backends.BACKENDS:
        take(backend, problem.fused(backend), failure(partial(check, problem, backend)))
    compiled = torch.compile(unfused, dynamic=False)
    baselines: dict[str, Callable[[], Any]] = {
        "a": problem.reference,
        "b": problem.unfused,
        "c": lambda: compiled(problem.canvas[PROMPT:], problem.head, problem.undecided),
        "d": problem.product,
    }
    for name, run in baselines.items():
        if name not in args.without:
            take(name, run, "")
    timed = contenders
    if device.type == "cuda":
        timed = {name: run if name == "a" else graphed(run) for name, run in contenders.items()}
    times = interleaved(timed, device, args.seconds)
    flops, read = 2.0 * rows * problem.head.numel(), problem.head.nbytes
    records = []
    for name, run in contenders.items():
        median = statistics.median(times[name])
        record = {
            "benchmark": "decode_step", "contender": name, "seconds": median, "runs": len(times[name]),
            "flops": flops / median, "bandwidth": read / median, "peak_bytes": peak_memory(run, device),
        }  # fmt: skip
        record |= {f"speedup_over_{key}": ratio(times[key], times[name]) for key in baselines if key in times}
        records.append(record)
    return records


NAMES = {"a": "(a) whole canvas, float64", "b": "(b) unfused", "c": "(c) compiled (b)", "d": "(d) product alone"}


def print_table(records: list[dict[str, Any]], title: str, console: Console) -> None:
    table = Table(title=title, title_justify="left")
    for column in ("", "ms", "GFLOP/s", "of roof", "GB/s", "of roof", "peak MB", "x (a)", "x (b)", "x (c)", "x (d)"):
        table.add_column(column, justify="right" if column else "left")
    for r in records:
        times = [f"{r[f'speedup_over_{key}']:.2f}" if f"speedup_over_{key}" in r else "" for key in "abcd"]
        table.add_row(
            NAMES.get(r["contender"], r["contender"]), f"{1e3 * r['seconds']:,.2f}", f"{r['flops'] / 1e9:,.0f}",
            f"{r['flops'] / r['roof_flops']:.0%}", f"{r['bandwidth'] / 1e9:,.1f}",
            f"{r['bandwidth'] / r['roof_bandwidth']:.0%}", f"{r['peak_bytes'] / 1e6:,.1f}", *times,
        )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    main()

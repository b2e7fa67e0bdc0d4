"""Attention of one block to a cache: ``python benchmarks/block_attention.py``.

The kernel against torch's attention with an additive mask, as the engine calls it, and against the time that reading
the keys and values once would take. Each contender is one CUDA graph over the layers of a cache too large to stay in
L2, so that neither launches nor cached keys flatter. Half of the sequences are shorter (padding), hence the mask. One
that fails its check is not timed. Needs a GPU.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from common import append, failure, graphed, interleaved, peak_memory, ratio, read_bandwidth
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dllm_engine.kernel_limits import block_attention_unavailable

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CACHE_BYTES, MAX_LAYERS = 512 * 2**20, 32  # several times the L2 of an H200


class Problem:
    """Queries [B, H, S, Dh] and a cache [layers, 2, B, H_kv, L, Dh]; odd sequences have L / 8 columns of padding."""

    def __init__(self, batch: int, length: int, args: argparse.Namespace, dtype: torch.dtype) -> None:
        device, heads, key_heads, dim = torch.device("cuda"), args.heads, args.key_heads or args.heads, args.head_dim
        generator = torch.Generator(device).manual_seed(0)
        layer = 2 * batch * key_heads * length * dim * dtype.itemsize
        layers = min(MAX_LAYERS, max(1, math.ceil(CACHE_BYTES / layer)))
        self.grouped = key_heads != heads
        shape = (layers, 2, batch, key_heads, length, dim)
        self.cache = torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)
        q = torch.randn(batch, args.rows, heads, dim, generator=generator, device=device)
        self.q = q.to(dtype).transpose(1, 2)
        self.first = torch.arange(batch, device=device) % 2 * (length // 8)
        self.end = torch.full_like(self.first, length)
        hidden = torch.arange(length, device=device) < self.first[:, None]
        mask = torch.zeros(batch, 1, 1, length, dtype=dtype, device=device)
        self.mask = mask.masked_fill_(hidden[:, None, None], -torch.inf)
        columns = int((self.end - self.first).sum())
        self.bytes = 2 * columns * key_heads * dim * dtype.itemsize + 2 * self.q.nbytes  # a layer's
        self.flops = 4 * columns * heads * args.rows * dim

    def contenders(self, splits: list[int]) -> dict[str, Callable[[int], Tensor]]:
        from dllm_engine.kernels.block_attention import block_attention

        def kernel(splits: int | None) -> Callable[[int], Tensor]:
            return lambda i: block_attention(
                self.q, self.cache[i, 0], self.cache[i, 1], self.first, self.end, splits=splits
            )

        def torch_(mask: Tensor | None) -> Callable[[int], Tensor]:
            return lambda i: F.scaled_dot_product_attention(
                self.q, self.cache[i, 0], self.cache[i, 1], attn_mask=mask, enable_gqa=self.grouped
            )

        # without a mask torch does more work, by a faster kernel: what there is to win elsewhere
        found = {"kernel": kernel(None)} | {f"kernel, {n} splits": kernel(n) for n in splits}
        return found | {"torch, mask": torch_(self.mask), "torch, no mask": torch_(None)}

    def check(self, run: Callable[[int], Tensor]) -> str:
        """Why a contender must not be timed: its first and last sequence against float64; "" if they fit."""
        found = run(0)
        for b in {0, len(self.q) - 1}:
            seen = self.cache[0, :, b, :, int(self.first[b]) :].double()
            k, v = seen.repeat_interleave(self.q.shape[1] // self.cache.shape[3], 1)
            expected = (self.q[b].double() @ k.mT / math.sqrt(self.q.shape[-1])).softmax(-1) @ v
            error = float((found[b].double() - expected).abs().max())
            bound = float((2 * torch.finfo(self.q.dtype).eps + 1e-6) * expected.abs().max())
            if not error <= bound:
                return f"sequence {b} is off by {error:.2g}, {bound:.2g} allowed"
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--key-heads", type=int, help="default: as many as heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--splits", nargs="+", type=int, default=[], help="other numbers of programs to time too")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each table line's contenders together")
    args = parser.parse_args()
    device, dtype, console = torch.device("cuda"), DTYPES[args.dtype], Console(width=130)
    if not torch.cuda.is_available():
        parser.exit(2, "this benchmark needs a GPU: torch.cuda.is_available() is False\n")
    if reason := block_attention_unavailable(device, dtype, args.head_dim):
        parser.exit(2, f"the kernel cannot run here: {reason}\n")
    bandwidth = read_bandwidth(device)
    console.print(f"roof: {bandwidth / 1e9:,.0f} GB/s")
    for batch in args.batches:
        for length in args.lengths:
            problem = Problem(batch, length, args, dtype)
            line = measure(problem, args, bandwidth, console)
            shape = {"batch": batch, "length": length, "rows": args.rows, "heads": args.heads, "dtype": args.dtype}
            shape |= {"key_heads": args.key_heads or args.heads, "head_dim": args.head_dim}
            file = append([record | shape for record in line], device)  # what comes after it may be stopped
            print_table(line, f"batch {batch}, {args.rows} rows to {length} columns", console)
            del problem
    console.print(f"written to {file}")


def measure(problem: Problem, args: argparse.Namespace, bandwidth: float, console: Console) -> list[dict[str, Any]]:
    device, layers = problem.q.device, len(problem.cache)
    contenders = problem.contenders(args.splits)
    graphs = {}
    for name, run in contenders.items():
        # without a mask padding is seen: another result by intent
        if reason := failure(partial(run, 0) if name == "torch, no mask" else partial(problem.check, run)):
            console.print(f"{name} is not timed: {reason}", markup=False)
        else:
            graphs[name] = graphed(lambda run=run: [run(i) for i in range(layers)])  # type: ignore[misc]
    if not graphs:
        return []
    times = interleaved(graphs, device, args.seconds)
    records = []
    for name in graphs:
        median = statistics.median(times[name]) / layers
        record = {
            "benchmark": "block_attention", "contender": name, "seconds": median, "runs": len(times[name]),
            "layers": layers, "floor_seconds": problem.bytes / bandwidth, "flops": problem.flops / median,
            "bandwidth": problem.bytes / median, "roof_bandwidth": bandwidth,
            "peak_bytes": peak_memory(lambda run=contenders[name]: run(0), device),  # type: ignore[misc]
        }  # fmt: skip
        if "torch, mask" in times:
            record["speedup_over_torch"] = ratio(times["torch, mask"], times[name])
        records.append(record)
    return records


def print_table(records: list[dict[str, Any]], title: str, console: Console) -> None:
    table = Table(title=title, title_justify="left")
    for column in ("", "µs a layer", "floor µs", "x floor", "GB/s", "of roof", "GFLOP/s", "peak MB", "x torch"):
        table.add_column(column, justify="right" if column else "left")
    for r in records:
        speedup = f"{r['speedup_over_torch']:.2f}" if "speedup_over_torch" in r else ""
        table.add_row(
            r["contender"], f"{1e6 * r['seconds']:,.1f}", f"{1e6 * r['floor_seconds']:,.1f}",
            f"{r['seconds'] / r['floor_seconds']:.2f}", f"{r['bandwidth'] / 1e9:,.0f}",
            f"{r['bandwidth'] / r['roof_bandwidth']:.0%}", f"{r['flops'] / 1e9:,.0f}", f"{r['peak_bytes'] / 1e6:,.1f}",
            speedup,
        )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    main()

"""Products of a block's rows with a layer's matrices: ``python benchmarks/products.py``.

The kernel of `dllm_engine.kernels.products` against torch's product (cuBLAS on a GPU), and against the time that
reading the matrix once would take. A contender is one CUDA graph over as many matrices of one kind as do not stay in
L2. What comes in parts is added up by the kernel that follows: `block_step.py` times that too. ``--sweep`` tries tiles
of other sizes and other numbers of parts. One that fails its check is not timed. On a CPU torch's alone is timed.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import append, failure, graphed, interleaved, ratio, read_bandwidth, side_by_side
from models import SHAPES, Shape
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dllm_engine import kernel_limits
from dllm_engine.kernels import products
from dllm_engine.kernels.products import Config, Parts, linear

MATRIX_BYTES, MOST = 512 * 2**20, 32  # several times the L2 of an H200; matrices
SHARED = 227 * 1024 // 2 - 1024  # bytes of shared memory that leave room for two programs


def matrices(shape: Shape) -> dict[str, tuple[int, int]]:
    """Features and depth of the products of a layer."""
    d, mlp = shape.d_model, shape.mlp
    return {"qkv": (d + 2 * shape.kv_size, d), "attn_out": (d, d), "gate_up": (2 * mlp, d), "ff_out": (d, mlp)}


def choices(size: int, depth: int, rows: int) -> list[tuple[Config, int]]:
    """Tiles and parts to try."""
    found = []
    for sizes in itertools.product((64, 128), (64, 128), (4, 8), (3, 4, 5, 6), (1, 2, 4, 8)):
        config, parts = Config(*sizes[:4]), sizes[4]
        programs = math.ceil(size / config.features) * parts
        fits = config.stages * (max(16, rows) + config.features) * config.depth * 2 <= SHARED
        if fits and depth // parts >= 4 * config.depth and (parts == 1 or programs <= 2 * products.PROGRAMS):
            found.append((config, parts))
    return found


class Problem:
    """Rows, and matrices of one kind."""

    def __init__(self, rows: int, size: int, depth: int, dtype: torch.dtype, device: torch.device, total: int) -> None:
        generator = torch.Generator(device).manual_seed(0)
        count = min(MOST, max(1, math.ceil(total / (size * depth * dtype.itemsize))))
        weights = torch.empty(count, size, depth, dtype=dtype, device=device)
        self.weights = weights.normal_(std=depth**-0.5, generator=generator)
        self.x = torch.randn(rows, depth, generator=generator, device=device).to(dtype)

    def kernel(self, i: int, config: Config | None = None, parts: int | None = None) -> Tensor | Parts:
        return linear(self.x, self.weights[i], config=config, parts=parts)

    def torch(self, i: int) -> Tensor:
        return F.linear(self.x, self.weights[i])

    def check(self, run: Callable[[int], Tensor | Parts]) -> str:
        """Why a contender must not be timed, "" if it may: against float64."""
        product = run(0)
        found = product.sums.double().sum(0) if isinstance(product, Parts) else product.double()
        truth = self.x.double() @ self.weights[0].double().T
        error, bound = (found - truth).abs().max().item(), torch.finfo(self.x.dtype).eps * truth.abs().max().item()
        return "" if error <= bound else f"off by {error:.2g}, {bound:.2g} allowed"


def compile_kernel(rows: int, config: Config, dtype: torch.dtype) -> None:
    """Into Triton's cache, with and without parts; one that does not fit is told when it is timed."""
    x, weight = (torch.zeros(n, 1024, dtype=dtype, device="cuda") for n in (rows, 256))
    for parts in (1, 2):
        failure(functools.partial(linear, x, weight, config=config, parts=parts))


def compile_all(args: argparse.Namespace, dtype: torch.dtype) -> None:
    wanted = {
        (rows, config)
        for rows in args.rows
        for size in matrices(SHAPES[args.shape]).values()
        for config, _ in choices(*size, rows)
    }
    side_by_side(compile_kernel, *zip(*sorted(wanted), strict=True), [dtype] * len(wanted))


def contenders(problem: Problem, sweep: bool) -> dict[str, Callable[[int], Tensor | Parts]]:
    rows, (size, depth) = len(problem.x), problem.weights.shape[1:]
    found: dict[str, Callable[[int], Tensor | Parts]] = {"torch": problem.torch}
    if problem.x.device.type in kernel_limits.devices():
        found["kernel"] = problem.kernel
        for config, parts in choices(size, depth, rows) if sweep else ():
            name = f"{config.features} x {config.depth}, {config.warps} warps, {config.stages} stages, {parts} parts"
            found[name] = functools.partial(problem.kernel, config=config, parts=parts)
    return found


def measure(problem: Problem, sweep: bool, seconds: float, bandwidth: float, console: Console) -> list[dict[str, Any]]:
    device, count = problem.x.device, len(problem.weights)
    calls = {}
    for name, run in contenders(problem, sweep).items():
        if reason := failure(functools.partial(problem.check, run)):
            console.print(f"{name} is not timed: {reason}", markup=False)
            continue

        def every(run: Callable[[int], Any] = run) -> None:
            for i in range(count):
                run(i)

        calls[name] = graphed(every) if device.type == "cuda" else every
    times = interleaved(calls, device, seconds)
    floor = problem.weights[0].nbytes / bandwidth
    records = []
    for name, turns in times.items():
        record = {"contender": name, "seconds": statistics.median(turns) / count, "runs": len(turns), "floor": floor}
        if "torch" in times:
            record["speedup_over_torch"] = ratio(times["torch"], turns)
        records.append(record)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--rows", nargs="+", type=int, default=[32])
    parser.add_argument("--sweep", action="store_true", help="other tiles and numbers of parts too; on a GPU")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each matrix and number of rows (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print only, append nothing")
    args = parser.parse_args()
    device, dtype, console = torch.device(args.device), torch.bfloat16, Console(width=120)
    if not 1 <= min(args.rows) <= max(args.rows) <= products.MAX_ROWS:
        parser.error(f"--rows: 1 to {products.MAX_ROWS} allowed")
    if args.sweep and device.type != "cuda":
        parser.error("--sweep: tiles are timed on a GPU")
    if args.sweep:
        compile_all(args, dtype)
    bandwidth = read_bandwidth(device)
    console.print(f"roof: {bandwidth / 1e9:,.1f} GB/s")
    for rows, (name, (size, depth)) in itertools.product(args.rows, matrices(SHAPES[args.shape]).items()):
        problem = Problem(rows, size, depth, dtype, device, MATRIX_BYTES if device.type == "cuda" else 1)
        records = measure(problem, args.sweep, args.seconds, bandwidth, console)
        about = {"benchmark": "products", "matrix": name, "rows": rows, "features": size, "depth": depth}
        about |= {"dtype": "bfloat16", "roof_bandwidth": bandwidth, "matrices": len(problem.weights)}
        if not args.dry_run:
            console.print(f"appended to {append([about | record for record in records], device)}")
        show(records, f"{name}: {rows} rows x {size:,} x {depth:,}", problem.weights[0].nbytes, console)


def show(records: list[dict[str, Any]], title: str, read: int, console: Console) -> None:
    table = Table(title=title, title_justify="left")
    for column in ("", "µs", "floor µs", "x floor", "GB/s", "x torch"):
        table.add_column(column, justify="right" if column else "left")
    usual = [r for r in records if r["contender"] in ("torch", "kernel")]
    others = sorted((r for r in records if r not in usual), key=lambda r: r["seconds"])
    for r in usual + others[:5]:
        table.add_row(
            r["contender"], f"{1e6 * r['seconds']:,.1f}", f"{1e6 * r['floor']:,.1f}",
            f"{r['seconds'] / r['floor']:.2f}", f"{read / r['seconds'] / 1e9:,.0f}",
            f"{r['speedup_over_torch']:.2f}" if "speedup_over_torch" in r else "",
        )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    main()

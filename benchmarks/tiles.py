"""Which tiles of the Triton scoring kernel are the fastest on this GPU? ``python benchmarks/tiles.py``.

Every candidate of `dllm_engine.kernels.tiles` scores the same rows of a random LM head; each is checked against
float64. Printed are the fastest and the one that is taken without ``DLLM_AUTOTUNE=1``; all are appended to
``benchmarks/results/<device>.jsonl``. Processes compile side by side first.
"""

from __future__ import annotations

import argparse
import functools
from dataclasses import asdict
from typing import Any

import torch
import triton
from common import append, read_bandwidth, side_by_side
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dllm_engine import ops
from dllm_engine.kernels import decode_step as kernels
from dllm_engine.kernels.tiles import Config, candidates


def arguments(rows: int, vocab: int, dim: int) -> tuple[Any, ...]:
    """Of `kernels._score`, without the tiles."""
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(rows, dim, generator=generator, device=device).bfloat16()
    head = torch.randn(vocab, dim, generator=generator, device=device).mul_(3 / dim**0.5).bfloat16()
    banned, none = ops.id_tensor([vocab - 1], device), torch.empty(0, dtype=torch.int64, device=device)
    index = torch.arange(rows, dtype=torch.int32, device=device)
    return hidden, head, rows, index, banned, none.int(), none.view(rows, 0), none.float(), 0.0, none, None


def compile_tiles(rows: int, config: Config) -> str:
    """Into Triton's cache, with sizes that a kernel is the same for; what went wrong, or nothing."""
    try:
        kernels._score(*arguments(rows, 1264, 256), config, consecutive=True)
        torch.cuda.synchronize()
    except Exception as error:  # too large for the device, mostly; the others are to be timed in any case
        return f"{config}: {error}"
    return ""


def logits_of(found: tuple[Tensor, Tensor]) -> Tensor:
    """The best logit of each row."""
    return found[0][3].amax(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32, 64, 128, 256, 1024])
    parser.add_argument("--shape", default="126464x4096", help="VOCABULARYxWIDTH (%(default)s)")
    parser.add_argument("--milliseconds", type=int, default=40, help="of each candidate (%(default)s)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("tiles are timed on a GPU, and torch finds none")
    vocab, dim = map(int, args.shape.split("x"))
    device, console = torch.device("cuda"), Console(width=120)

    wanted = {(candidates(rows)[0].rows, config) for rows in args.rows for config in candidates(rows)}
    failures = sum(map(bool, side_by_side(compile_tiles, *zip(*sorted(wanted, key=repr), strict=True))))
    console.print(f"{len(wanted)} kernels compiled, {failures} of them too large for this device")

    bandwidth = read_bandwidth(device)
    for rows in args.rows:
        call = arguments(rows, vocab, dim)
        hidden, head = call[:2]
        logits = torch.cat([hidden.double() @ part.double().T for part in head.split(16384)], 1)
        truth = logits[:, :-1].amax(1)  # the last id is banned
        usual, records = kernels.config_for(hidden, head, rows, False, False, True), []
        for config in dict.fromkeys([usual, *candidates(rows)]):
            run = functools.partial(kernels._score, *call, config, consecutive=True)
            try:
                error = (logits_of(run()) - truth).abs().max().item()
            except Exception as reason:
                if not isinstance(reason, triton.runtime.errors.OutOfResources):
                    console.print(f"{config} left out: {reason}", markup=False)
                continue
            if not error <= 1e-4 * (1 + truth.abs().max().item()):
                console.print(
                    f"{config} is WRONG: the best logit of a row of {rows} is off by {error:.2g}", markup=False
                )
                continue
            milliseconds = triton.testing.do_bench(run, warmup=10, rep=args.milliseconds, return_mode="median")
            records.append({"benchmark": "tiles", "rows": rows, "seconds": milliseconds / 1e3, **asdict(config)})
        records.sort(key=lambda r: r["seconds"])
        about = {"vocab": vocab, "width": dim, "dtype": "bfloat16", "roof_bandwidth": bandwidth}
        file = append([r | about | {"tile_rows": r["rows"], "rows": rows} for r in records], device)
        table = Table(title=f"{rows} rows x {vocab} x {dim}, {len(records)} candidates", title_justify="left")
        for column in ("tile", "depth", "warps", "stages", "ms", "GB/s", "of copy", "TFLOP/s", ""):
            table.add_column(column, justify="right")
        for place, r in enumerate(records):
            config = Config(*(r[name] for name in ("rows", "ids", "depth", "warps", "stages")))
            if place >= 5 and config != usual:
                continue
            rate, flops = head.nbytes / r["seconds"], 2 * rows * head.numel() / r["seconds"]
            table.add_row(
                f"{config.rows} x {config.ids}", *map(str, (config.depth, config.warps, config.stages)),
                f"{1e3 * r['seconds']:.3f}", f"{rate / 1e9:,.0f}", f"{rate / bandwidth:.0%}",
                f"{flops / 1e12:,.0f}", f"taken, {place + 1}." if config == usual else "",
            )  # fmt: skip
        console.print(table)
    console.print(f"appended to {file}")


if __name__ == "__main__":
    main()

"""Kernels for a profiler to count in: ``ncu --profile-from-start off python benchmarks/counters.py``.

The scoring of the decode step where bytes are the limit (32 rows) and where products are (1,024), by each backend that
can run, the attention of a block, and a layer's widest and narrowest product. Each call is made once before, which
compiles it, and once between the profiler's marks, in the order that is printed. `gpu.py` runs this with the sections
that tell what a kernel waits for.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import block_attention
import torch
from common import failure, synchronize
from decode_step import Problem, check, random_head

from dllm_engine import backends
from dllm_engine.kernel_limits import block_attention_unavailable

ROWS, COLUMNS = (32, 1024), 2048


def calls(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name and call of each; one that fails its check is told and left out."""
    device, dtype = torch.device(args.device), torch.bfloat16
    head = random_head(args.shape, dtype, device)
    for rows in ROWS:
        problem = Problem(head.shape[1], head.shape[0], rows, dtype, head)
        for name in args.backends:
            if reason := failure(partial(check, problem, name)):
                print(f"{name}, {rows} rows: left out: {reason}")
            else:
                yield f"{name}, {rows} rows x {args.shape}", problem.fused(name)
    if not block_attention_unavailable(device, dtype, 128):
        shape = argparse.Namespace(heads=32, key_heads=None, head_dim=128, rows=32)
        attention = block_attention.Problem(1, COLUMNS, shape, dtype)
        run = attention.contenders([])["kernel"]
        if reason := failure(partial(attention.check, run)):
            print(f"attention: left out: {reason}")
        else:
            yield f"attention, 32 rows to {COLUMNS} columns", partial(run, 0)
        import products

        width = head.shape[1]
        for name, (size, depth) in {"gate_up": (6 * width, width), "attn_out": (width, width)}.items():
            product = products.Problem(32, size, depth, dtype, device, 1)
            if reason := failure(partial(product.check, product.kernel)):
                print(f"{name}: left out: {reason}")
            else:
                yield f"{name}, 32 rows x {size} x {depth}", partial(product.kernel, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", default="126464x4096", help="VOCABULARYxWIDTH (%(default)s)")
    parser.add_argument("--backends", nargs="+", default=["triton", "cuda"], choices=backends.BACKENDS)
    args = parser.parse_args()
    device = torch.device(args.device)
    for name, run in calls(args):
        run()
        synchronize(device)
        if device.type == "cuda":
            torch.cuda.profiler.start()
        run()
        synchronize(device)
        if device.type == "cuda":
            torch.cuda.profiler.stop()
        print(name, flush=True)


if __name__ == "__main__":
    main()

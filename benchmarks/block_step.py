"""Where the time of one step inside a block goes: ``python benchmarks/block_step.py``.

A step under the dual cache is a call of the block's rows against cached keys, the decode step on its hidden states,
and the host's work around the two: deciding who joins, launching, reading where the sequences stand. The first two are
timed alone, the whole as the engine runs it; *host* is the difference (on a busy machine it can come out negative).
On a GPU the first two are one CUDA graph; the model's share of it is what is left without the second.
Beside them stands its floor: the bytes that it must read (matrices, keys and values) over the bandwidth measured in
this run, or its multiplications over the rate measured in this run, whichever is longer. On a GPU the bandwidth is a
copy's; reading alone can be some per cent faster. Where the kernels of `dllm_engine.kernels.layer` are used, the step
takes turns with more and fewer of them: each value of ``DLLM_LAYER_KERNELS`` that can be had and gives the same.

Weights and cache are random. All rows of the blocks are undecided: a step's head costs most then.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from common import append, fma_rate, graphed, interleaved, matmul_rate, ratio, read_bandwidth
from models import SHAPES, Shape, random_model
from rich.console import Console
from rich.table import Table

from dllm_engine import LLaDA, ops
from dllm_engine.buffers import Buffers, available_bytes
from dllm_engine.kv_cache import KVCache
from dllm_engine.layers import Kernels
from dllm_engine.loop import Loop
from dllm_engine.options import Options
from dllm_engine.state import DecodeState

BLOCK = 32
VARIABLE = "DLLM_LAYER_KERNELS"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class BlockStep:
    """Sequences in the first block call after their refresh, which can be made again and again."""

    def __init__(self, model: LLaDA, batch: int, length: int) -> None:
        device, config = model.device, model.config
        self.model = model
        options = Options.resolve(
            model, longest_prompt=length - BLOCK, gen_length=BLOCK, block_length=BLOCK, steps=None, policy="threshold",
            cache="dual", temperature=0.0, cfg_scale=0.0, end_of_text="off", backend="auto",
        )  # fmt: skip
        buffers = Buffers(device)
        # instead of a refresh, which takes minutes at the largest sizes
        buffers.take("KV cache", KVCache.shape(config, batch, length), model.dtype).normal_()
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(config.vocab_size - 2, (batch, length - BLOCK), generator=generator).to(device)
        self.state = DecodeState(
            prompt, torch.zeros(batch, dtype=torch.int64, device=device), gen_length=BLOCK, block_length=BLOCK,
            steps=None, seeds=[0] * batch, mask_id=model.mask_id, fill_id=model.fill_id, buffers=buffers,
        )  # fmt: skip
        self.state.step_in_block.fill_(1)
        self.state.step.fill_(1)  # at 0 a refresh is due
        self.loop = Loop(model, self.state, options, buffers)
        self.others: dict[Kernels, Loop] = {}  # the same on the same buffers, with other kernels
        if self.loop.block_calls is not None and self.loop.block_calls.kernels:
            before = os.environ.get(VARIABLE)
            for kernels in other_kernels(self.loop.block_calls.kernels, model, batch * BLOCK):
                os.environ[VARIABLE] = str(int(kernels))
                self.others[kernels] = Loop(model, self.state, options, buffers)
            os.environ.pop(VARIABLE, None)
            if before is not None:
                os.environ[VARIABLE] = before
        changed = (self.state.tokens, self.state.undecided, self.state.predicted, self.state.progress)
        self.saved = [(tensor, tensor.clone()) for tensor in changed]
        self.where = self.loop.where
        self.everyone = list(range(batch))
        self.sequences, self.hidden = self.forward()

    def restore(self) -> None:
        for tensor, saved in self.saved:
            tensor.copy_(saved)
        for loop in (self.loop, *self.others.values()):
            loop.where = self.where

    def left_out(self) -> list[str]:
        """Takes out of ``others`` what would be timed for other work, and tells why: kernels that give another result
        from turn to turn, or launched early another than one after the other, or hardly one prediction of torch's.

        Raises:
            AssertionError: the engine's own choice is such.
        """
        assert self.loop.block_calls is not None
        used, found, wrong = self.loop.block_calls.kernels, {}, {}
        for kernels, loop in {used: self.loop, **self.others}.items():
            turns = []
            for _ in range(4):  # kernel by kernel, captured, replayed
                self.step(loop)
                turns.append([tensor.clone() for tensor, _ in self.saved])
            found[kernels] = turns[0]
            if not all(map(equal, turns, turns[1:])):
                wrong[kernels] = "a step gives something else from turn to turn"
        if {Kernels.EARLY, Kernels.PRODUCTS} <= found.keys() and not equal(
            found[Kernels.EARLY], found[Kernels.PRODUCTS]
        ):
            wrong.setdefault(Kernels.EARLY, "a step gives something else than the same kernels one after the other")
        of_torch = found[Kernels.NONE][2][:, -BLOCK:]
        for kernels, (_, _, predicted, _) in found.items():
            share = float((predicted[:, -BLOCK:] == of_torch).double().mean())
            if share < 0.5:  # random weights are sure of nothing: rounding decides some of their predictions
                wrong.setdefault(kernels, f"{share:.0%} of the predictions are those of torch's layers")
        if used in wrong:
            raise AssertionError(f"layer kernels {used.name}: {wrong[used]}")
        self.others = {kernels: loop for kernels, loop in self.others.items() if kernels not in wrong}
        return [f"layer kernels {kernels.name} left out: {reason}" for kernels, reason in wrong.items()]

    @torch.inference_mode()
    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The model call."""
        starts, ends, *_ = zip(*self.where, strict=True)
        return self.loop.forward(self.everyone, list(starts), list(ends), refresh=False, width=BLOCK)

    @torch.inference_mode()
    def call(self) -> None:
        """Model call and op in one, as a GPU's engine makes them, and the same copy."""
        self.restore()
        assert self.loop.block_calls is not None
        self.loop.block_calls(self.everyone)

    @torch.inference_mode()
    def decode_step(self) -> None:
        """The op, and a copy of the state that it changes."""
        self.restore()
        loop = self.loop
        assert loop.rule is not None
        ops.decode_step_(
            self.hidden, self.model.lm_head, self.state, self.sequences, loop.rule, known=True, **loop.scoring
        )

    @torch.inference_mode()
    def step(self, loop: Loop | None = None) -> None:
        """Both, as the engine makes them, and the same copy."""
        self.restore()
        (loop or self.loop).step()


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, a, b))


def other_kernels(used: Kernels, model: LLaDA, rows: int) -> list[Kernels]:
    """What else a layer of ``rows`` rows could be made of here, and would differ."""
    from dllm_engine.kernels import early, products

    most = Kernels.EARLY if not early.unavailable(model.device) else Kernels.PRODUCTS
    if not products.fits(torch.empty(rows, 0, dtype=model.dtype, device="meta")):
        return [Kernels.NONE] if used else [Kernels.BETWEEN]  # the products are torch's in any case
    return [kernels for kernels in Kernels if kernels != used and kernels <= max(most, used)]


def cache_bytes(shape: Shape, batch: int, length: int, dtype: torch.dtype) -> int:
    return KVCache.bytes_per_token(shape.config(length), dtype) * batch * length


def work(shape: Shape, batch: int, length: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that a step reads at least, and its floating-point operations."""
    attention = 2 * shape.n_layers * shape.d_model * length
    return (
        shape.read_parameters() * dtype.itemsize + cache_bytes(shape, batch, length, dtype),
        2 * batch * (BLOCK + shape.dream) * (shape.used_parameters() + attention),
    )


def measure(
    model: LLaDA, shape: Shape, batch: int, length: int, roofs: dict[str, float], seconds: float
) -> dict[str, Any]:
    """A record of one batch and length."""
    block = BlockStep(model, batch, length)
    if block.loop.block_calls is not None:
        for message in block.left_out():
            print(message)
    contenders: dict[str, Callable[[], Any]] = {"decode_step": block.decode_step, "step": block.step}
    if block.loop.block_calls is None:
        contenders["forward"] = block.forward
    else:
        contenders |= {"call": block.call, "decode_step": graphed(block.decode_step)}
    for kernels, loop in block.others.items():
        contenders[f"step, {kernels.name}"] = partial(block.step, loop)
    times = interleaved(contenders, model.device, seconds)
    if (calls := times.pop("call", None)) is not None:
        times["forward"] = [call - op for call, op in zip(calls, times["decode_step"], strict=True)]
    parts = zip(times["step"], times["forward"], times["decode_step"], strict=True)
    read, operations = work(shape, batch, length, model.dtype)
    block_calls = block.loop.block_calls
    compared: dict[str, Any] = {}
    if block_calls is not None:
        captured = block_calls.buffers.graphs_work and any(block_calls.buffers.graphs.values())
        compared = {"layer_kernels": block_calls.kernels.name, "captured": captured}
    for kernels in block.others:
        others = times.pop(f"step, {kernels.name}")
        compared[f"step_{kernels.name}_seconds"] = statistics.median(others)
        compared[f"speedup_over_{kernels.name}"] = ratio(others, times["step"])
    return {
        "benchmark": "block_step", "batch": batch, "length": length, "block": BLOCK, "runs": len(times["step"]),
        **{f"{name}_seconds": statistics.median(turns) for name, turns in times.items()}, **compared,
        "host_seconds": statistics.median(step - forward - op for step, forward, op in parts),
        "bytes": read, "operations": operations, "floor_bytes_seconds": read / roofs["bandwidth"],
        "floor_operations_seconds": operations / roofs["flops"],
        **{f"roof_{name}": roof for name, roof in roofs.items()},
    }  # fmt: skip


def show(records: list[dict[str, Any]], title: str, console: Console) -> None:
    table = Table(title=title, title_justify="left")
    for column in (
        "length", "batch", "step ms", "forward ms", "decode step ms", "host ms", "bytes floor ms", "FLOP floor ms",
        "of the longer",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    others = [kernels.name for kernels in Kernels if any(f"step_{kernels.name}_seconds" in r for r in records)]
    for name in others:
        table.add_column(f"step, {name}", justify="right")
    for r in records:
        names = ("step", "forward", "decode_step", "host", "floor_bytes", "floor_operations")
        cells = [f"{1e3 * r[f'{name}_seconds']:,.2f}" for name in names]
        floor = max(r["floor_bytes_seconds"], r["floor_operations_seconds"])
        compared = [r.get(f"step_{name}_seconds") for name in others]
        cells += [f"{floor / r['step_seconds']:.0%}", *("" if s is None else f"{1e3 * s:,.2f}" for s in compared)]
        table.add_row(f"{r['length']:,}", str(r["batch"]), *cells)
    console.print(table)


def measured_roofs(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Bytes and floating-point operations a second; the latter NaN on a CPU without a compiler or AVX2."""
    flops = matmul_rate(device, dtype) if device.type == "cuda" else fma_rate(torch.get_num_threads())
    return {"bandwidth": read_bandwidth(device), "flops": flops}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    shapes = parser.add_mutually_exclusive_group()
    for name, text in (
        ("small", "4 layers of 256, 8,192 words, float32: for a CPU"),
        ("moe", "LLaDA-MoE's shape instead of LLaDA-8B's: 14 GiB"),
        ("dream", "Dream-7B's shape instead: 14 GiB"),
    ):
        shapes.add_argument(f"--{name}", action="store_const", dest="shape", const=name, default="8b", help=text)
    parser.add_argument("--layers", type=int, help="instead of 32 (with --small 4, --moe 16, --dream 28)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16, with --small float32")
    parser.add_argument("--lengths", type=int, nargs="+", help="of the canvas; default 512 2048 8192, small 512 2048")
    parser.add_argument("--batches", type=int, nargs="+", help="default 1 4 16 64, small 1 8")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each length and batch (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print only, append nothing")
    args = parser.parse_args()
    device, console = torch.device(args.device), Console(width=150)
    small = args.shape == "small"
    lengths = args.lengths or ([512, 2048] if small else [512, 2048, 8192])
    batches = args.batches or ([1, 8] if small else [1, 4, 16, 64])
    if min(lengths) <= BLOCK or min(batches) < 1 or (args.layers is not None and args.layers < 1):
        parser.error(f"--lengths must be above {BLOCK}, --batches and --layers at least 1")
    shape = replace(SHAPES[args.shape], n_layers=args.layers) if args.layers else SHAPES[args.shape]
    dtype = DTYPES[args.dtype or ("float32" if small else "bfloat16")]
    weights = shape.parameters() * dtype.itemsize
    if device.type == "cpu" and args.shape == "8b" and not args.layers:
        parser.error(f"LLaDA-8B's shape needs a GPU with {weights / 2**30:.0f} GiB and more; --small runs on a CPU")
    free = available_bytes(device)
    if free is not None and weights > free:
        parser.error(f"the weights need {weights / 2**30:.1f} GiB, {free / 2**30:.1f} are free; --layers shrinks them")

    roofs = measured_roofs(device, dtype)
    console.print(f"measured: {roofs['bandwidth'] / 1e9:,.1f} GB/s, {roofs['flops'] / 1e9:,.0f} GFLOP/s")
    model = random_model(shape, device=device, dtype=dtype, max_length=max(lengths))
    records, file = [], None
    for length in lengths:
        for batch in batches:
            gc.collect()  # the cache of the sizes before, if a cycle holds it
            needed, free = cache_bytes(shape, batch, length, dtype), available_bytes(device)
            if free is not None and 1.1 * needed > free:  # the rows of the call take some more
                sizes = f"{needed / 2**30:.1f} GiB of cache do not fit into {free / 2**30:.1f} GiB"
                console.print(f"length {length:,}, batch {batch} left out: {sizes}")
                continue
            record = measure(model, shape, batch, length, roofs, args.seconds)
            record |= {"layers": shape.n_layers, "width": shape.d_model, "experts": shape.experts}
            records.append(record | {"dtype": str(dtype)[6:]})
            if not args.dry_run:
                file = append(records[-1:], device)
    show(records, f"{shape.n_layers} layers of {shape.d_model}, {shape.vocab:,} words, {str(dtype)[6:]}", console)
    if not args.dry_run:
        console.print(f"appended to {file}")


if __name__ == "__main__":
    main()

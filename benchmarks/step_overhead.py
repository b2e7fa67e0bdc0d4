"""What a pass of `decode` costs beside the tensor operations that it consists of.

    python benchmarks/step_overhead.py [--batch 1 16] [--seconds 20]

Both contenders decode the same prompts with the built-in model, one token a pass (64 passes, two of them refreshes),
dual cache, and must give the same tokens:

  engine  `decode()`
  bare    the same tensor operations one after the other on fixed shapes, all outputs allocated before, no checks, no
          modules, no scheduling: what is left to win

They take turns. With one thread the time is the process's own CPU time, so that other work on the machine counts less.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import append, ratio
from torch import Tensor

from dllm_engine import LLaDA, decode, native, ops
from dllm_engine.built_in import DEMO_MODEL
from dllm_engine.policies import TopK
from dllm_engine.state import DecodeState
from dllm_engine.step import Step

GEN, BLOCK = 64, 32
QUESTION = "Sort: 0 Alan Wells, 1 Grace Wright, 2 Amy Fox, 3 Louis Price, 4 Rose Stewart, 5 Martin Gonzalez"


class Rows:
    """Buffers for calls of a fixed number of rows."""

    def __init__(self, model: LLaDA, batch: int, rows: int) -> None:
        config, heads = model.config, model.config.n_heads
        width = config.d_model

        def make(*shape: int) -> Tensor:
            return torch.empty(batch, rows, *shape)

        self.x, self.h, self.square, self.attended = (make(width) for _ in range(4))
        self.scale = make(1)
        self.q, self.k, self.v, self.turned = (make(heads, config.head_dim) for _ in range(4))
        self.gate, self.up = (make(config.mlp_hidden_size) for _ in range(2))


class Bare:
    """A decode of ``batch`` equally long prompts, written out."""

    def __init__(self, model: LLaDA, prompt: list[int], batch: int) -> None:
        self.model, self.batch, self.prompt = model, batch, torch.tensor([prompt] * batch)
        self.length = len(prompt) + GEN
        config = model.config
        self.cache = torch.zeros(config.n_layers, 2, batch, config.n_heads, self.length, config.head_dim)
        cos, sin = model.rope_tables(torch.arange(self.length)[None])
        self.cos, self.sin = (t[0, 0, :, None].contiguous() for t in (cos, sin))
        self.whole, self.block = Rows(model, batch, self.length), Rows(model, batch, BLOCK)
        rule = TopK().rule(BLOCK, model.device)
        assert rule is not None
        self.rule = rule
        self.ids = torch.zeros(2, batch, BLOCK, dtype=torch.int64)
        self.values = torch.zeros(5, batch, BLOCK)
        self.hidden = torch.empty(batch, BLOCK, config.d_model)
        self.banned = ops.id_tensor((model.mask_id, *range(model.vocab_size, len(model.lm_head))), model.device)
        self.sequences, self.none32 = torch.arange(batch), torch.empty(0, dtype=torch.int32)
        self.none64 = torch.empty(0, dtype=torch.int64)

    def norm(self, x: Tensor, weight: Tensor, b: Rows) -> Tensor:
        torch.mul(x, x, out=b.square)
        torch.mean(b.square, -1, keepdim=True, out=b.scale)
        b.scale.add_(self.model.config.rms_norm_eps).rsqrt_()
        torch.mul(x, b.scale, out=b.h)
        return b.h.mul_(weight)

    def turn(self, x: Tensor, first: int, last: int, b: Rows) -> None:
        half = x.shape[-1] // 2
        torch.neg(x[..., half:], out=b.turned[..., :half])
        b.turned[..., half:].copy_(x[..., :half])
        b.turned.mul_(self.sin[first:last])
        x.mul_(self.cos[first:last]).add_(b.turned)

    def forward(self, tokens: Tensor, first: int, last: int, b: Rows) -> Tensor:
        model, (batch, rows) = self.model, tokens.shape
        layers: Any = model.blocks

        def multiply(x: Tensor, weight: Tensor, out: Tensor) -> None:
            torch.mm(x.view(batch * rows, -1), weight.t(), out=out.view(batch * rows, -1))

        b.x.copy_(F.embedding(tokens, model.wte.weight))
        for layer, kept in zip(layers, self.cache, strict=True):
            h = self.norm(b.x, layer.attn_norm.weight, b)
            for proj, out in ((layer.q_proj, b.q), (layer.k_proj, b.k), (layer.v_proj, b.v)):
                multiply(h, proj.weight, out)
            self.turn(b.q, first, last, b)
            self.turn(b.k, first, last, b)
            kept[0, :, :, first:last].copy_(b.k.transpose(1, 2))
            kept[1, :, :, first:last].copy_(b.v.transpose(1, 2))
            attended = F.scaled_dot_product_attention(b.q.transpose(1, 2), kept[0], kept[1])
            b.attended.view(batch, rows, -1, b.q.shape[-1]).copy_(attended.transpose(1, 2))
            multiply(b.attended, layer.attn_out.weight, b.square)
            b.x.add_(b.square)
            h = self.norm(b.x, layer.ff_norm.weight, b)
            multiply(h, layer.ff_proj.weight, b.gate)
            multiply(h, layer.up_proj.weight, b.up)
            torch.ops.aten.silu.out(b.gate, out=b.gate)
            b.gate.mul_(b.up)
            multiply(b.gate, layer.ff_out.weight, b.square)
            b.x.add_(b.square)
        return self.norm(b.x, model.ln_f.weight, b)

    def step(self, state: DecodeState) -> Step:
        return Step(
            self.hidden, self.model.lm_head, self.sequences, state.tokens, state.undecided, state.predicted,
            state.progress, state.seeds, state.quota, self.rule.bounds, self.rule.weights, self.ids, self.values,
            self.banned, self.none32, self.none64, self.none64, state.prompt_length, self.model.fill_id, 0.0, 0,
            math.inf, False, False, False,
        )  # fmt: skip

    @torch.inference_mode()
    def __call__(self) -> Tensor:
        model = self.model
        state = DecodeState(
            self.prompt, torch.zeros(self.batch, dtype=torch.int64), gen_length=GEN, block_length=BLOCK, steps=GEN,
            seeds=[0] * self.batch, mask_id=model.mask_id, fill_id=model.fill_id,
        )  # fmt: skip
        step = self.step(state)
        for first in range(state.prompt_length, self.length, BLOCK):
            last = first + BLOCK
            self.hidden.copy_(self.forward(state.tokens, 0, self.length, self.whole)[:, first:last])
            native.decode_step_(step)
            while state.progress.tolist()[0][0] == first:
                hidden = self.forward(state.tokens[:, first:last], first, last, self.block)
                native.decode_step_(step._replace(hidden=hidden))
        return state.tokens


def turns(contenders: dict[str, Callable[[], Any]], seconds: float) -> tuple[str, dict[str, list[float]]]:
    """The clock's name, and the seconds of every call."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in contenders}
    began = time.perf_counter()
    while len(times["bare"]) < 5 or time.perf_counter() - began < seconds:
        for name, run in contenders.items():
            start = clock()
            run()
            times[name].append(clock() - start)
    return ("cpu" if clock is time.process_time else "wall"), times


def measure(model: LLaDA, prompt: list[int], batch: int, seconds: float) -> dict[str, Any]:
    bare = Bare(model, prompt, batch)
    prompts = [prompt] * batch
    settings: dict[str, Any] = {"gen_length": GEN, "block_length": BLOCK, "policy": "topk", "end_of_text": "off"}
    out = decode(model, prompts, cache="dual", **settings)
    if not torch.equal(out.sequences, bare()):
        raise AssertionError("the two loops give different tokens")
    contenders: dict[str, Callable[[], Any]] = {
        "engine": lambda: decode(model, prompts, cache="dual", **settings),
        "bare": bare,
    }
    clock, times = turns(contenders, seconds)
    engine, least = (statistics.median(times[name]) / out.forward_passes for name in ("engine", "bare"))
    return {
        "benchmark": "step_overhead",
        "batch": batch,
        "passes": out.forward_passes,
        "engine_us_per_pass": round(engine * 1e6, 1),
        "bare_us_per_pass": round(least * 1e6, 1),
        "ratio": round(ratio(times["engine"], times["bare"]), 3),
        "turns": len(times["bare"]),
        "clock": clock,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--seconds", type=float, default=20.0, help="for each batch size (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print only, append nothing")
    arguments = parser.parse_args()
    from dllm_engine.tokenizer import encode_prompt

    model = LLaDA.from_pretrained(DEMO_MODEL, device="cpu", dtype="float32")
    prompt = encode_prompt(model.tokenizer, QUESTION, chat=True)
    rows = [measure(model, prompt, batch, arguments.seconds) for batch in arguments.batch]
    first = rows[0]
    for row in rows:
        engine, bare = row["engine_us_per_pass"], row["bare_us_per_pass"]
        print(f"batch {row['batch']:3}: {engine:9,.1f} µs a pass, bare {bare:9,.1f} µs, ratio {row['ratio']:.2f}")
        if row is not first:
            gain = [row["batch"] / row[f"{name}_us_per_pass"] for name in ("engine", "bare")]
            base = [first["batch"] / first[f"{name}_us_per_pass"] for name in ("engine", "bare")]
            shares = [g / b for g, b in zip(gain, base, strict=True)]
            row["scaling_engine"], row["scaling_bare"] = (round(s, 3) for s in shares)
            print(
                f"           throughput over batch {first['batch']}: {shares[0]:.2f} times, bare {shares[1]:.2f} times"
            )
    if not arguments.dry_run:
        print("appended to", append(rows, model.device))


if __name__ == "__main__":
    main()

"""Launches of the CUDA kernel on CPU tensors: compiled to PTX by nvcc, and run by `ptx.machine`."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ptx.machine import Machine
from ptx.memory import memory_of
from ptx.text import Kernel, parse

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
PROCESSORS = 3  # of the device: few, so that a block has several units of work
POINTER, INT64, INT32, FLOAT, DOUBLE = ctypes.c_uint64, ctypes.c_int64, ctypes.c_int32, ctypes.c_float, ctypes.c_double


def structure(name: str, **fields: Any) -> Any:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


def named(kind: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), kind)


# csrc/include/dllm/decode_step.h and csrc/cuda/tiles.h
Matrix = structure("Matrix", data=POINTER, type=INT32, stride=INT64)
Stats = structure(
    "Stats", hidden=Matrix, head=Matrix, dim=INT64, vocab=INT64, rows=POINTER, count=INT64,
    **named(POINTER, "banned excluded"), **named(INT64, "banned_count excluded_count"), probe_ids=POINTER, probes=INT64,
    temperature=FLOAT, noise_keys=POINTER,
    **named(POINTER, "token second_token logit second_logit logsumexp log_odds entropy probe_logits out_at"),
)  # fmt: skip
Step = structure(
    "Step", batch=INT64, width=INT64, sequences=POINTER, **named(INT64, "length prompt_length block_length fill_id"),
    **named(POINTER, "tokens undecided predicted progress seeds quota bounds weights"), filter_length=INT64, cut=DOUBLE,
    **named(INT32, "decided_is_one position all_rows"), end_ids=POINTER, end_count=INT64, waiting_ids=POINTER,
    waiting_count=INT64, **named(POINTER, "token logit second_logit log_odds entropy"),
)  # fmt: skip
Call = structure(
    "Call", stats=Stats, step=Step, **named(INT64, "hidden_rows tiles segments tickets"),
    **named(POINTER, "ticket states ranks"),
)  # fmt: skip
STATE_BYTES, SEGMENT, FAN, IDS, STAGES = 56, 256, 32, 128, 3


class Module:
    """Stands in for `dllm_engine._cuda`."""

    def __init__(self, kernels: dict[str, Kernel]) -> None:
        self.kernels = kernels
        self.machines: dict[str, Machine] = {}
        self.given: list[Tensor] = []  # what the next launch gets the addresses of
        self.launches = 0

    @staticmethod
    def division(vocab: int, count: int) -> tuple[int, int, int, int, int]:
        """Rows of a tile, tiles, segments, tickets of a tile, states of a row: `cuda_workspace`."""
        tile_rows = 32 if count <= 32 else 64
        nodes = segments = -(-vocab // SEGMENT)
        states = tickets = 0
        while nodes > 1:
            states, nodes = states + nodes, -(-nodes // FAN)
            tickets += nodes
        return tile_rows, -(-count // tile_rows), segments, tickets, states

    def workspace(self, vocab: int, count: int) -> tuple[int, int]:
        _, tiles, _, tickets, states = self.division(vocab, count)
        return 1 + tiles * tickets, states * count * STATE_BYTES + count * 4

    def row_stats(self, call: Any, hidden_rows: int, scratch: Any) -> None:
        self.launch(self.stats(*call), hidden_rows, Step(), scratch)

    def decode_step(self, call: Any, step: Any, scratch: Any) -> None:
        width, (sequences, batch), state, sizes, rule, flags, end_ids, waiting_ids = step
        token, logit, _, second_logit, _, log_odds, entropy, _ = call[-1]
        given = Step(
            batch, width, sequences, *sizes, *state, *rule, *flags, *end_ids, *waiting_ids, token, logit, second_logit,
            log_odds, entropy,
        )  # fmt: skip
        self.launch(self.stats(*call), batch * width, given, scratch)

    @staticmethod
    def stats(
        hidden: Any, head: Any, dim: int, vocab: int, rows: Any, banned: Any, excluded: Any, probe_ids: Any,
        temperature: float, noise_keys: Any, results: Any,
    ) -> Any:  # fmt: skip
        token, logit, second_token, *others = results
        return Stats(
            Matrix(*hidden), Matrix(*head), dim, vocab, *rows, banned[0], excluded[0], banned[1], excluded[1],
            *probe_ids, temperature, noise_keys[0], token, second_token, logit, *others, 0,
        )  # fmt: skip

    def launch(self, stats: Any, hidden_rows: int, step: Any, scratch: Sequence[int]) -> None:
        rows, tiles, segments, tickets, states = self.division(stats.vocab, stats.count)
        ranks = scratch[1] + states * stats.count * STATE_BYTES
        call = Call(stats, step, hidden_rows, tiles, segments, tickets, scratch[0], scratch[1], ranks)
        (name,) = (n for n in self.kernels if re.search(rf"TypeE{stats.head.type}ELi{rows}E", n))
        if name not in self.machines:
            depth = 64 if rows == 32 else 32
            shared = STAGES * (rows + IDS) * depth * 2 + rows * (IDS + 4) * 4
            self.machines[name] = Machine(self.kernels[name], shared)
        blocks = min(tiles * segments, 2 * PROCESSORS)
        order = torch.randperm(blocks).tolist()  # a GPU promises none
        self.machines[name].run(memory_of(self.given), (blocks,), [(bytes(call), bytes)], order)
        self.given.clear()
        self.launches += 1


@functools.cache
def compiled(architecture: str) -> dict[str, Kernel]:
    with tempfile.TemporaryDirectory() as directory:
        to = Path(directory) / "decode_step.ptx"
        command = [str(NVCC), "-O3", "-std=c++17", f"-arch={architecture}", "-ptx", "-o", str(to)]
        subprocess.run([*command, str(ROOT / "csrc/cuda/decode_step.cu")], check=True)
        return parse(to.read_text(encoding="utf-8"))


def install(put: Callable[[Any, str, Any], None]) -> Module:
    """The backend ``cuda`` runs on CPU tensors; ``put`` is `setattr`, or what undoes it at the end of a test."""
    from dllm_engine import cuda, step
    from dllm_engine.backends import BACKENDS, Backend

    module = Module(compiled("compute_80"))
    put(cuda, "_cuda", module)

    def noted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*values: Any) -> Any:
            result = function(*values)
            module.given += [value for value in (*values, *result) if isinstance(value, Tensor)]
            return result

        return call

    for place, names in ((step, "matrix listed pointers"), (cuda, "_scratch")):
        for name in names.split():
            put(place, name, noted(getattr(place, name)))
    put(torch.cuda, "device", lambda device: contextlib.nullcontext())
    put(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    put(torch.cuda, "is_current_stream_capturing", lambda: False)

    def fits(hidden: Tensor, lm_head: Tensor) -> str:
        same = hidden.dtype == lm_head.dtype and hidden.dtype in cuda.TYPES
        aligned = all(m.data_ptr() % 16 == 0 and m.stride(-2) % 8 == 0 for m in (hidden, lm_head))
        return "" if same and aligned and hidden.shape[-1] % 8 == 0 else "it cannot take these matrices"

    BACKENDS["cuda"] = Backend("", ("cpu",), cuda.row_stats, cuda.decode_step_, fits)
    return module

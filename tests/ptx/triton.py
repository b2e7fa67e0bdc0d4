"""Launches of Triton kernels on CPU tensors: compiled for a GPU as Triton would, and run by `ptx.machine`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dllm_engine.kernel_limits import release
from ptx.machine import Machine
from ptx.memory import Fault, memory_of
from ptx.text import parse
from ptx.tiles import TileMap

NAMES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.uint8: "u8", torch.int8: "i8", torch.bool: "i1",
}  # fmt: skip
NUMBERS = {"i32": np.int32, "i64": np.int64, "fp32": np.float32, "i1": np.uint8}


@dataclass
class Device:
    """Stands in for a GPU of compute capability ``arch`` / 10.

    Attributes:
        launches: names of the kernels that ran. instructions: how many each thread was given there, in all its blocks.
    """

    arch: int
    launches: list[str] = field(default_factory=list)
    instructions: list[int] = field(default_factory=list)
    _compiled: dict[Any, Machine] = field(default_factory=dict)

    def run(self, kernel: Any, *values: Any, grid: Any, warmup: bool = False, **options: Any) -> None:
        """What ``kernel[grid](*values, **options)`` does, instead of ``JITFunction.run``."""
        from triton.runtime.jit import JITFunction

        assert isinstance(kernel, JITFunction)
        names = [p.name for p in kernel.params]
        given = dict(zip(names, values, strict=False)) | {k: v for k, v in options.items() if k in names}
        options = {k: v for k, v in options.items() if k not in names}
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        tiled = {name: value for name, value in given.items() if hasattr(value, "block_shape")}
        memory = memory_of([*tensors.values(), *(value.base for value in tiled.values())])

        signature, constants, attributes = {}, {}, {}
        arguments: list[tuple[Any, Any]] = []
        for n, parameter in enumerate(kernel.params):
            value = given[parameter.name]
            if parameter.name in tiled:
                kind = f"tensordesc<{NAMES[value.base.dtype]}{list(value.block_shape)}>"
                signature[parameter.name] = kind
                arguments.append((value, None))
                arguments += [(size, np.int32) for size in value.shape] + [(step, np.int64) for step in value.strides]
                continue
            if parameter.name in tensors:
                kind, number = f"*{NAMES[value.dtype]}", value.data_ptr()
            elif parameter.is_constexpr or (value == 1 and type(value) is int and not parameter.do_not_specialize):
                kind, constants[(n,)] = "constexpr", value
            elif isinstance(value, float):
                kind, number = "fp32", value
            else:
                kind, number = "i32" if -(2**31) <= value < 2**31 else "i64", value
            signature[parameter.name] = kind
            if kind == "constexpr":
                continue
            if kind != "fp32" and number % 16 == 0 and not parameter.do_not_specialize:
                attributes[(n,)] = [["tt.divisibility", 16]]
            arguments.append((number, NUMBERS.get(kind, np.uint64)))

        key = kernel.fn, *map(str, (signature, constants, attributes, sorted(options.items())))
        if key not in self._compiled:
            self._compiled[key] = self._compile(kernel, signature, constants, attributes, options)
        machine = self._compiled[key]
        entry = machine.kernel
        self.launches.append(entry.name)
        grid = grid(given) if callable(grid) else grid
        places = iter(machine.tiles)
        arguments = [(tile_map(v, next(places)), None) if hasattr(v, "block_shape") else (v, d) for v, d in arguments]
        # scratch memory that the compiler may ask for: none
        arguments += [(0, np.uint64)] * (len(entry.parameters) - len(arguments))
        if options.get("launch_pdl", False) != machine.dependent:
            raise Fault(f"{entry.name}: launched early and does not wait, or waits and is not launched early")
        machine.run(memory, grid, arguments)
        self.instructions.append(machine.issued)

    def _compile(self, kernel: Any, signature: Any, constants: Any, attributes: Any, options: Any) -> Machine:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        source = ASTSource(kernel, *_for_old_triton(signature, constants, attributes))
        compiled = triton.compile(source, target=GPUTarget("cuda", self.arch, 32), options=options)
        (entry,) = parse(compiled.asm["ptx"]).values()
        machine = Machine(entry, compiled.metadata.shared)
        machine.tiles = getattr(compiled.metadata, "tensordesc_meta", None) or []
        return machine


def tile_map(tiles: Any, meta: dict[str, Any]) -> TileMap:
    """Of a `TensorDescriptor`, as the compiler wants it."""
    (rows, columns), (stride, step) = tiles.shape, tiles.strides
    base, tile = tiles.base, tuple(meta["block_size"])
    line = tile[1] * base.element_size()
    assert (step, line) == (1, {1: 32, 2: 64, 3: 128}[meta["swizzle"]])
    assert base.data_ptr() % 16 == stride * base.element_size() % 16 == 0
    return TileMap(base.data_ptr(), rows, columns, stride * base.element_size(), base.element_size(), tile, line)


def _for_old_triton(signature: Any, constants: Any, attributes: Any) -> tuple[Any, Any, Any]:
    """Triton 3.2 takes names, no types of constants, and an object."""
    import triton

    if release(triton.__version__) > (3, 2):
        return signature, constants, attributes
    from triton.backends.compiler import AttrsDescriptor

    names = list(signature)
    divisible = {"arg_properties": {"tt.divisibility": [n for (n,) in attributes]}, "cls": "AttrsDescriptor"}
    types = {name: kind for name, kind in signature.items() if kind != "constexpr"}
    return types, {names[n]: value for (n,), value in constants.items()}, AttrsDescriptor.from_dict(divisible)


def install(device: Device, put: Callable[[Any, str, Any], None]) -> None:
    """Triton's kernels run on CPU tensors by ``device``; ``put`` is `setattr`, or one that is undone after a test."""
    from triton.runtime.jit import JITFunction

    from dllm_engine import graphs, kernel_limits
    from dllm_engine.backends import BACKENDS, Backend
    from dllm_engine.kernels import decode_step, early

    put(JITFunction, "run", lambda kernel, *values, **options: device.run(kernel, *values, **options))
    put(torch.cuda, "get_device_capability", lambda *_: divmod(device.arch, 10))
    put(kernel_limits, "devices", lambda: ("cpu",))
    put(early, "unavailable", lambda _: early.MISSING if device.arch >= 90 else "compute capability 9.0 is needed")
    put(graphs, "block_attention_unavailable", lambda *_: "")
    BACKENDS["triton"] = Backend("", ("cpu",), decode_step.row_stats, decode_step.decode_step_)

"""Runs PTX, one block of threads after the other, as strictly as a GPU may: a test's stand-in for the device.

What a GPU leaves open is settled for the worse. Copies under way have poisoned where they go until they are waited
for, products under way (`wgmma`) must not be read, shared memory begins as NaN, memory may not be read behind another
warp's back (`ptx.memory`), and approximate instructions are off by as much as is allowed. The machine knows the
instructions that the kernels here are made of and raises on any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ptx.memory import POISON, Array, Fault, Global, Memory
from ptx.ops import COMPARE, SMALL, TYPES, VALUE, convert, small
from ptx.text import Instruction, Kernel, Operand
from ptx.units import AsyncProducts, units
from ptx.warp import WARP

Run = Callable[[Array], None]
UINT = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


class Machine:
    """One launch.

    Attributes:
        mask: threads that take part in the instruction that runs. counts: instructions issued by name.
    """

    def __init__(self, kernel: Kernel, memory: Global, grid: Sequence[int], shared: int = 0) -> None:
        """shared: bytes of shared memory beside the kernel's own."""
        self.kernel, self.memory, self.threads = kernel, memory, kernel.threads
        self.grid = (*grid, 1, 1)[:3]
        self.shared_bytes = kernel.static_bytes + shared
        self.numbers = np.arange(self.threads)
        self.warps, self.lanes = (self.numbers // WARP).astype(np.int32), self.numbers % WARP
        self.all = np.ones(self.threads, bool)
        self.counts: dict[str, int] = {}
        self.units = units()
        products = self.units["wgmma"]
        assert isinstance(products, AsyncProducts)
        self.products = products
        self.program = [self._compile(i) for i in kernel.code]
        self.dependent = any(i.parts[:2] == ("griddepcontrol", "wait") for i in kernel.code)

    def run(self, arguments: Sequence[tuple[Any, Any]], order: Sequence[int] | None = None) -> None:
        """arguments: (value, numpy dtype) each, or bytes of a structure. order: in which blocks run."""
        self.parameters = np.zeros(self.kernel.parameter_bytes, np.uint8)
        for (at, size), (value, dtype) in zip(self.kernel.parameters.values(), arguments, strict=True):
            raw = np.frombuffer(value, np.uint8) if dtype is bytes else np.array([value], dtype).view(np.uint8)
            assert len(raw) <= size, (value, dtype, size)
            self.parameters[at : at + len(raw)] = raw
        blocks = int(np.prod(self.grid))
        with np.errstate(all="ignore"):
            for block in range(blocks) if order is None else order:
                self._block(block)

    def _block(self, block: int) -> None:
        x, y, _ = self.grid
        self.shared = Memory(np.full(self.shared_bytes, POISON, np.uint8), 0)
        self.memory.barrier()
        self.registers: dict[str, Array] = {
            name: np.full(self.threads, (1 << bits) - 1 if bits > 1 else False, UINT[bits])
            for name, bits in self.kernel.registers.items()
        }
        index = (block % x, block // x % y, block // (x * y))
        special = {"%tid.x": self.numbers, "%laneid": self.lanes, "%ntid.x": self.threads, "%warpid": self.warps}
        special |= {f"%ctaid.{d}": i for d, i in zip("xyz", index, strict=True)}
        special |= {f"%nctaid.{d}": i for d, i in zip("xyz", self.grid, strict=True)}
        for name in ("%tid.y", "%tid.z"):
            special[name] = 0
        for name, value in special.items():
            self.registers[name] = np.broadcast_to(np.asarray(value, np.uint32), self.threads).copy()
        for unit in self.units.values():
            unit.reset(self)
        self._threads()

    # -- control flow: groups of threads at the same instruction, the one that is furthest behind runs ---------------

    def _threads(self) -> None:
        code, labels, n = self.kernel.code, self.kernel.labels, len(self.kernel.code)
        groups: dict[int, Array] = {0: self.all.copy()}
        waiting: dict[int, Array] = {}
        alive = self.all.copy()
        self.early = self.all.copy() if self.dependent else ~self.all

        def join(at: int, mask: Array) -> None:
            groups[at] = groups[at] | mask if at in groups else mask

        while groups or waiting:
            if not groups:
                here = np.zeros(self.threads, bool)
                for mask in waiting.values():
                    here |= mask
                if len(waiting) != 1 or not np.array_equal(here, alive):
                    raise Fault(f"threads wait at {len(waiting)} barriers, {here.sum()} of {alive.sum()}")
                groups, waiting = waiting, {}
                self.shared.epoch += 1
                self.memory.barrier()
            at = min(groups)
            mask = groups.pop(at)
            stop = min(groups, default=n)
            while True:
                instruction = code[at]
                self.mask = mask if not instruction.guard else mask & self.predicate(instruction.guard)
                name = instruction.parts[0]
                if name == "bra":
                    target = labels[str(instruction.operands[0])]
                    stay = mask & ~self.mask
                    if self.mask.any():
                        join(target, self.mask)
                    if stay.any():
                        join(at + 1, stay)
                    break
                acts = name in ("ret", "exit") or ("global" in instruction.parts and name != "prefetch")
                if acts and (self.early & self.mask).any():
                    raise Fault(f"before the kernel ahead has ended: {instruction.text}")
                if name in ("ret", "exit"):
                    alive &= ~self.mask
                    if (mask & ~self.mask).any():
                        join(at + 1, mask & ~self.mask)
                    break
                if name in ("bar", "barrier") and instruction.parts[1] != "warp":
                    if not np.array_equal(self.mask, mask):
                        raise Fault(f"a barrier under a guard: {instruction.text}")
                    self.arrive(instruction, mask, alive)
                    waiting[at + 1] = waiting[at + 1] | mask if at + 1 in waiting else mask
                    break
                if self.mask.any():
                    self.counts[name] = self.counts.get(name, 0) + 1
                    try:
                        self.program[at](self.mask)
                    except Exception as error:
                        raise type(error)(f"{instruction.text}: {error}") from error
                at += 1
                if at >= stop:
                    join(at, mask)
                    break

    def arrive(self, instruction: Instruction, mask: Array, alive: Array) -> None:
        """A barrier; one that asks whether any thread had a predicate must be reached by all at once."""
        if instruction.parts[1] == "red":
            if not np.array_equal(mask, alive):
                raise Fault(f"threads apart at {instruction.text}")
            result, _, predicate = (str(o) for o in instruction.operands)
            if instruction.parts[2] != "or":
                raise NotImplementedError(instruction.text)
            self.registers[result][:] = self.predicate(predicate)[mask].any()

    def predicate(self, name: Operand) -> Array:
        """All threads' values; ``!`` negates."""
        assert isinstance(name, str)
        return ~self.registers[name[1:]] if name.startswith("!") else self.registers[name]

    # -- operands ----------------------------------------------------------------------------------------------------

    def read(self, operand: Operand, kind: str) -> Array:
        """All threads' values of an operand as ``kind`` (s32, f32, b64, ...)."""
        assert isinstance(operand, str)
        dtype = TYPES[kind]
        if operand.startswith("%"):
            register = self.registers[operand]
            self.products.check_read(operand)
            if register.dtype == np.bool_:
                return register
            return register.view(dtype) if register.itemsize == dtype.itemsize else register.astype(dtype)
        if operand in self.kernel.shared:
            return np.full(self.threads, self.kernel.shared[operand], dtype)
        if operand in self.kernel.parameters:  # their addresses begin at 0
            return np.full(self.threads, self.kernel.parameters[operand][0], dtype)
        if operand.startswith(("0f", "0d")):
            bits = np.array([int(operand[2:], 16)], np.uint32 if operand[1] == "f" else np.uint64)
            return np.broadcast_to(bits.view(dtype), self.threads)
        if kind == "pred":
            return np.full(self.threads, operand in ("-1", "1"))
        number = int(operand, 0)
        if dtype.kind == "f":
            return np.full(self.threads, number, UINT[dtype.itemsize * 8]).view(dtype)
        return np.full(self.threads, number & ((1 << 8 * dtype.itemsize) - 1), UINT[8 * dtype.itemsize]).view(dtype)

    def write(self, operand: Operand, value: Array, mask: Array | None = None) -> None:
        assert isinstance(operand, str)
        if operand == "_":
            return
        register = self.registers[operand]
        self.products.overwritten(operand)
        if register.dtype == np.bool_:
            bits = value
        else:
            value = np.ascontiguousarray(value)
            if value.itemsize != register.itemsize:  # a narrower value in a wider register: extended by its own sign
                wide = np.dtype(f"{'i' if value.dtype.kind == 'i' else 'u'}{register.itemsize}")
                value = value.astype(wide)
            bits = value.view(register.dtype)
        np.copyto(register, bits, where=self.mask if mask is None else mask)

    def addresses(self, operand: Operand, mask: Array) -> Array:
        """Of the threads in ``mask``."""
        assert isinstance(operand, str)
        text = operand[1:-1]
        sign = 1
        if "+" in text[1:]:
            name, offset = text.split("+")
        elif "-" in text[1:]:
            name, offset = text.split("-")
            sign = -1
        else:
            name, offset = text, "0"
        at = self.read(name, "b64").astype(np.int64)[mask]
        return at + sign * int(offset, 0)

    # -- compilation -------------------------------------------------------------------------------------------------

    def _compile(self, i: Instruction) -> Run:
        name = i.parts[0]
        special = {
            "ld": self._load, "st": self._store, "mov": self._move, "setp": self._compare, "cvt": self._convert,
        }  # fmt: skip
        if name in special:
            return special[name](i)
        if name in self.units:
            unit = self.units[name]
            return lambda mask: unit(self, i, mask)
        if name == "griddepcontrol":
            return self._depend(i)
        if name == "prefetch":
            return lambda mask: self.memory.check(self.addresses(i.operands[0], mask), i.text)
        if name in ("bra", "ret", "exit", "bar", "barrier", "membar", "fence", "cvta") or "warp" in i.parts:
            if name == "cvta":
                return lambda mask: self.write(i.operands[0], self.read(i.operands[1], "b64"))
            return lambda mask: None  # blocks run one after the other, so what one wrote is there for the next
        operation = VALUE.get(name)
        if operation is None:
            return self._unknown(i)
        kind = i.parts[-1]
        kinds = operation.kinds(i.parts)
        modifiers = i.parts[1:-1]

        def run(mask: Array) -> None:
            values = [self.read(o, k) for o, k in zip(i.operands[1:], kinds, strict=False)]
            if kind in SMALL:
                self.write(i.operands[0], small(kind, operation.run, modifiers, *values))
            else:
                self.write(i.operands[0], operation.run(kind, modifiers, *values))

        return run

    def _depend(self, i: Instruction) -> Run:
        def run(mask: Array) -> None:
            if i.parts[1] == "wait":
                self.early &= ~mask

        return run

    def _unknown(self, i: Instruction) -> Run:
        def run(mask: Array) -> None:
            raise NotImplementedError("not known to this machine")

        return run

    def _space(self, i: Instruction) -> Memory | Global:
        return self.shared if "shared" in i.parts or "shared_cta" in i.parts else self.memory

    def _load(self, i: Instruction) -> Run:
        kind = i.parts[-1]
        size = TYPES[kind].itemsize
        to = i.operands[0] if isinstance(i.operands[0], tuple) else (i.operands[0],)
        if "param" in i.parts:

            def constant(mask: Array) -> None:
                (at,) = np.unique(self.addresses(i.operands[1], mask))
                for n, register in enumerate(to):
                    value = self.parameters[at + n * size :][:size].view(TYPES[kind])
                    self.write(register, np.broadcast_to(value, self.threads))

            return constant

        def run(mask: Array) -> None:
            where = self.addresses(i.operands[1], mask)
            raw = self._space(i).get(where, size * len(to), self.warps[mask], "load")
            for n, register in enumerate(to):
                value = np.zeros(self.threads, TYPES[kind])
                value[mask] = np.ascontiguousarray(raw[:, n * size : (n + 1) * size]).view(TYPES[kind])[:, 0]
                self.write(register, value)

        return run

    def _store(self, i: Instruction) -> Run:
        kind = i.parts[-1]
        values = i.operands[1] if isinstance(i.operands[1], tuple) else (i.operands[1],)

        def run(mask: Array) -> None:
            columns = [self.read(v, kind)[mask].astype(TYPES[kind]) for v in values]
            raw = np.stack(columns, 1).view(np.uint8)
            self._space(i).put(self.addresses(i.operands[0], mask), raw, self.warps[mask], "store")

        return run

    def _move(self, i: Instruction) -> Run:
        to, source = i.operands[:2]
        kind = i.parts[-1]
        if kind == "pred":
            return lambda mask: self.write(to, self.read(source, "pred"))
        size = TYPES[kind].itemsize
        if isinstance(to, tuple):  # apart
            part = f"b{size * 8 // len(to)}"

            def apart(mask: Array) -> None:
                whole = self.read(source, kind).astype(TYPES[f"b{size * 8}"])
                parts = whole.view(TYPES[part]).reshape(self.threads, len(to))
                for n, register in enumerate(to):
                    self.write(register, parts[:, n])

            return apart
        if isinstance(source, tuple):  # together
            part = f"b{size * 8 // len(source)}"

            def together(mask: Array) -> None:
                parts = np.stack([self.read(o, part) for o in source], 1)
                self.write(to, np.ascontiguousarray(parts).view(TYPES[f"b{size * 8}"])[:, 0])

            return together

        def run(mask: Array) -> None:
            if not self.products.moved(self, to, source, mask):
                self.write(to, self.read(source, kind))

        return run

    def _compare(self, i: Instruction) -> Run:
        compare, kind = COMPARE[i.parts[1]], i.parts[-1]
        join = i.parts[2] if i.parts[2] in ("and", "or", "xor") else None
        second = isinstance(i.operands[1], str) and self.kernel.registers.get(i.operands[1]) == 1 and kind != "pred"
        first = 2 if second else 1

        def run(mask: Array) -> None:
            a, b = (self.read(o, kind) for o in i.operands[first : first + 2])
            yes = compare(a, b)
            no = ~yes
            if join is not None:
                c = self.predicate(i.operands[first + 2])
                operation = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[join]
                yes, no = operation(yes, c), operation(no, c)
            self.write(i.operands[0], yes)
            if second:
                self.write(i.operands[1], no)

        return run

    def _convert(self, i: Instruction) -> Run:
        to, source = i.parts[-2:]

        def run(mask: Array) -> None:
            values = [self.read(o, source) for o in i.operands[1:]]
            self.write(i.operands[0], convert(to, source, i.parts[1:-2], *values))

        return run

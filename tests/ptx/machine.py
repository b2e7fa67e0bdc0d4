"""Runs PTX, one block of threads after the other, as strictly as a GPU may: a test's stand-in for the device.

What a GPU leaves open is settled for the worse. Copies under way have poisoned where they go until they are waited
for, products under way (`wgmma`) must not be read, shared memory begins as NaN, memory may not be read behind another
warp's back (`ptx.memory`), and approximate instructions are off by as much as is allowed. The machine knows the
instructions that the kernels here are made of and raises on any other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ptx.memory import POISON, Array, Fault, Global, Memory
from ptx.ops import COMPARE, SMALL, TYPES, VALUE, convert, small
from ptx.text import Instruction, Kernel, Operand
from ptx.tiles import TileMap
from ptx.units import AsyncProducts, units
from ptx.warp import WARP

SPECIAL = dict.fromkeys(("%laneid", "%warpid", "%ntid.x"), 32)
SPECIAL |= {f"%{name}.{d}": 32 for name in ("tid", "ctaid", "nctaid") for d in "xyz"}
KINDS = {"bra": "branch", "ret": "end", "exit": "end", "bar": "barrier", "barrier": "barrier"}
Run = Callable[[Array], None]
Read = Callable[[], Array]
Write = Callable[[Array, Array], None]
UINT = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


class Step(NamedTuple):
    """An instruction made ready. acts: touches memory or ends, which is too early before `griddepcontrol.wait`."""

    instruction: Instruction
    kind: str  # "branch", "end", "barrier" or ""
    acts: bool
    run: Run


def _acts(i: Instruction) -> bool:
    return KINDS.get(i.parts[0]) == "end" or ("global" in i.parts and i.parts[0] != "prefetch")


class Machine:
    """A kernel made ready to be launched.

    Attributes:
        mask: threads that take part in the instruction that runs. whole: whether these are all threads. issued: how
        many instructions the last launch was.
    """

    def __init__(self, kernel: Kernel, shared: int = 0) -> None:
        """shared: bytes of shared memory beside the kernel's own."""
        self.kernel, self.threads = kernel, kernel.threads
        self.shared_bytes = kernel.static_bytes + shared
        self.numbers = np.arange(self.threads)
        self.warps, self.lanes = (self.numbers // WARP).astype(np.int32), self.numbers % WARP
        self.all = np.ones(self.threads, bool)
        self.registers: dict[str, Array] = {
            name: np.empty(self.threads, UINT[bits]) for name, bits in (kernel.registers | SPECIAL).items()
        }
        self.unset = [(r, False if r.dtype == np.bool_ else np.iinfo(r.dtype).max) for r in self.registers.values()]
        self.units = units()
        products = self.units["wgmma"]
        assert isinstance(products, AsyncProducts)
        self.products = products if any(i.parts[0] == "wgmma" for i in kernel.code) else None
        self.tiles: list[dict[str, Any]] = []  # what the compiler says of tensor maps
        self._readers: dict[tuple[Operand, str], Read] = {}
        self._writers: dict[Operand, Write] = {}
        self._places: dict[Operand, tuple[Read, int]] = {}
        self.program = [Step(i, KINDS.get(i.parts[0], ""), _acts(i), self._compile(i)) for i in kernel.code]
        self.dependent = any(i.parts[:2] == ("griddepcontrol", "wait") for i in kernel.code)

    def run(
        self, memory: Global, grid: Sequence[int], arguments: Sequence[tuple[Any, Any]],
        order: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        """A launch. arguments: (value, numpy dtype) each, or bytes of a structure, or a `TileMap`. order: of blocks."""
        self.memory, self.grid, self.issued = memory, (*grid, 1, 1)[:3], 0
        self.parameters = np.zeros(self.kernel.parameter_bytes, np.uint8)
        self.maps: dict[int, TileMap] = {}  # by the address of the parameter
        for (at, size), (value, dtype) in zip(self.kernel.parameters.values(), arguments, strict=True):
            if isinstance(value, TileMap):
                self.maps[at] = value
                continue
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
        for register, value in self.unset:
            register.fill(value)
        index = (block % x, block // x % y, block // (x * y))
        special = {"%tid.x": self.numbers, "%laneid": self.lanes, "%ntid.x": self.threads, "%warpid": self.warps}
        special |= {f"%ctaid.{d}": i for d, i in zip("xyz", index, strict=True)}
        special |= {f"%nctaid.{d}": i for d, i in zip("xyz", self.grid, strict=True)}
        for name in SPECIAL:  # 0: %tid.y and z
            self.registers[name][:] = special.get(name, 0)
        for unit in self.units.values():
            unit.reset(self)
        self._threads()

    # -- control flow: groups of threads at the same instruction, the one that is furthest behind runs ---------------

    def _threads(self) -> None:
        program, labels, n = self.program, self.kernel.labels, len(self.program)
        groups: dict[int, Array] = {0: self.all.copy()}
        waiting: dict[int, Array] = {}
        alive = self.all.copy()
        self.early = self.all.copy() if self.dependent else None

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
                self.shared.barrier()
                self.memory.barrier()
            at = min(groups)
            mask = groups.pop(at)
            stop = min(groups, default=n)
            whole = bool(mask.all())
            while True:
                instruction, kind, acts, run = program[at]
                if instruction.guard:
                    self.mask = mask & self.predicate(instruction.guard)
                    some = bool(self.mask.any())
                    self.whole = some and bool(self.mask.all())
                else:
                    self.mask, self.whole, some = mask, whole, True
                if kind == "branch":
                    stay = mask & ~self.mask
                    if some:
                        join(labels[str(instruction.operands[0])], self.mask)
                    if stay.any():
                        join(at + 1, stay)
                    break
                if acts and self.early is not None and (self.early & self.mask).any():
                    raise Fault(f"before the kernel ahead has ended: {instruction.text}")
                if kind == "end":
                    alive &= ~self.mask
                    if (mask & ~self.mask).any():
                        join(at + 1, mask & ~self.mask)
                    break
                if kind == "barrier" and instruction.parts[1] != "warp":
                    if not np.array_equal(self.mask, mask):
                        raise Fault(f"a barrier under a guard: {instruction.text}")
                    self.arrive(instruction, mask, alive)
                    waiting[at + 1] = waiting[at + 1] | mask if at + 1 in waiting else mask
                    break
                if some:
                    self.issued += 1
                    try:
                        run(self.mask)
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
        """All threads' values of an operand as ``kind`` (s32, f32, b64, ...); not to be kept, registers change."""
        return self.reader(operand, kind)()

    def reader(self, operand: Operand, kind: str) -> Read:
        """`read`, made ready."""
        if (operand, kind) not in self._readers:
            self._readers[operand, kind] = self._reader(operand, kind)
        return self._readers[operand, kind]

    def _reader(self, operand: Operand, kind: str) -> Read:
        assert isinstance(operand, str)
        dtype = TYPES[kind]
        if operand.startswith("%"):
            register, products = self.registers[operand], self.products
            same = register.dtype == np.bool_ or register.itemsize == dtype.itemsize
            seen = register if register.dtype == np.bool_ else register.view(dtype) if same else register

            def of_register() -> Array:
                if products is not None:
                    products.check_read(operand)
                return seen if same else seen.astype(dtype)

            return of_register
        value = self._constant(operand, kind, dtype)
        return lambda: value

    def _constant(self, operand: str, kind: str, dtype: np.dtype[Any]) -> Array:
        if operand in self.kernel.shared:
            return np.full(self.threads, self.kernel.shared[operand], dtype)
        if operand in self.kernel.parameters:  # their addresses begin at 0
            return np.full(self.threads, self.kernel.parameters[operand][0], dtype)
        if operand.startswith(("0f", "0d")):
            bits = np.array([int(operand[2:], 16)], np.uint32 if operand[1] == "f" else np.uint64)
            return np.broadcast_to(bits.view(dtype), self.threads)
        if kind == "pred":
            return np.full(self.threads, operand in ("-1", "1"))
        number = int(operand.removesuffix("U"), 0)
        if dtype.kind == "f":
            return np.full(self.threads, number, UINT[dtype.itemsize * 8]).view(dtype)
        return np.full(self.threads, number & ((1 << 8 * dtype.itemsize) - 1), UINT[8 * dtype.itemsize]).view(dtype)

    def write(self, operand: Operand, value: Array, mask: Array | None = None) -> None:
        """To all threads in ``mask``, or that take part."""
        self.writer(operand)(value, self.mask if mask is None else mask)

    def writer(self, operand: Operand) -> Write:
        """`write`, made ready."""
        if operand not in self._writers:
            self._writers[operand] = self._writer(operand)
        return self._writers[operand]

    def _writer(self, operand: Operand) -> Write:
        assert isinstance(operand, str)
        if operand == "_":
            return lambda value, mask: None
        register, products = self.registers[operand], self.products
        kind, size, plain = register.dtype, register.itemsize, register.dtype == np.bool_

        def write(value: Array, mask: Array) -> None:
            if products is not None:
                products.overwritten(operand)
            if not plain:
                if value.itemsize != size:  # a narrower value in a wider register: extended by its own sign
                    value = value.astype(f"{'i' if value.dtype.kind == 'i' else 'u'}{size}")
                value = value.view(kind)
            if mask is self.mask and self.whole:
                register[:] = value
            else:
                np.copyto(register, value, where=mask)

        return write

    def addresses(self, operand: Operand, mask: Array) -> Array:
        """Of the threads in ``mask``."""
        if operand not in self._places:
            parts = re.fullmatch(r"\[(.[^+-]*)([+-]?)(.*)\]", str(operand))
            assert parts is not None, operand
            self._places[operand] = self.reader(parts[1], "b64"), int(parts[2] + (parts[3] or "0"), 0)
        read, offset = self._places[operand]
        at = read().astype(np.int64)
        at += offset
        return at if mask is self.mask and self.whole else at[mask]

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

        readers = [self.reader(o, k) for o, k in zip(i.operands[1:], kinds, strict=False)]
        write = self.writer(i.operands[0])
        calculate = partial(small, kind, operation.run) if kind in SMALL else partial(operation.run, kind)

        def run(mask: Array) -> None:
            write(calculate(modifiers, *[read() for read in readers]), mask)

        return run

    def _depend(self, i: Instruction) -> Run:
        def run(mask: Array) -> None:
            if i.parts[1] == "wait" and self.early is not None:
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

        writers = [self.writer(register) for register in to]

        def run(mask: Array) -> None:
            where = self.addresses(i.operands[1], mask)
            found = self._space(i).get(where, size * len(to), self.warps[mask], "load").view(TYPES[kind])
            if not self.whole:
                some, found = found, np.zeros((self.threads, len(to)), TYPES[kind])
                found[mask] = some
            for n, write in enumerate(writers):
                write(found[:, n], mask)

        return run

    def _store(self, i: Instruction) -> Run:
        kind = i.parts[-1]
        values = i.operands[1] if isinstance(i.operands[1], tuple) else (i.operands[1],)

        readers = [self.reader(v, kind) for v in values]

        def run(mask: Array) -> None:
            raw = np.stack([read()[mask].astype(TYPES[kind]) for read in readers], 1).view(np.uint8)
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

        read, write = self.reader(source, kind), self.writer(to)

        def run(mask: Array) -> None:
            if self.products is None or not self.products.moved(self, to, source, mask):
                write(read(), mask)

        return run

    def _compare(self, i: Instruction) -> Run:
        compare, kind = COMPARE[i.parts[1]], i.parts[-1]
        join = i.parts[2] if i.parts[2] in ("and", "or", "xor") else None
        second = isinstance(i.operands[1], str) and self.kernel.registers.get(i.operands[1]) == 1 and kind != "pred"
        first = 2 if second else 1
        read_a, read_b = (self.reader(o, kind) for o in i.operands[first : first + 2])
        write = self.writer(i.operands[0])

        def run(mask: Array) -> None:
            yes = compare(read_a(), read_b())
            no = ~yes if second else yes
            if join is not None:
                c = self.predicate(i.operands[first + 2])
                operation = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[join]
                yes, no = operation(yes, c), operation(no, c)
            write(yes, mask)
            if second:
                self.write(i.operands[1], no)

        return run

    def _convert(self, i: Instruction) -> Run:
        to, source = i.parts[-2:]

        readers = [self.reader(o, source) for o in i.operands[1:]]
        write = self.writer(i.operands[0])

        def run(mask: Array) -> None:
            write(convert(to, source, i.parts[1:-2], *[read() for read in readers]), mask)

        return run

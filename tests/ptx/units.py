"""What a GPU does beside arithmetic, for `ptx.machine`: copies under way, matrices in shared memory, tensor cores."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from ptx.memory import POISON, SEVERAL, Array, Fault
from ptx.ops import from_bf16
from ptx.text import Instruction, Operand
from ptx.tiles import CopyEngine, swizzled
from ptx.warp import WARP, Atomic, Election, Reduction, Shuffle, Unit, Vote, check_whole

LANE = np.arange(WARP)
ROW, PAIR = LANE // 4, 2 * (LANE % 4)  # of a fragment: its row, the first of its two columns


class Copies(Unit):
    """cp.async: what was asked for is nowhere until it is waited for, and where it goes holds nothing."""

    def __init__(self, engine: CopyEngine) -> None:
        self.engine = engine

    def reset(self, machine: Any) -> None:
        self.group = np.zeros(machine.threads, np.int64)
        self.pending: list[tuple[Array, Array, Array, Array]] = []  # threads, groups, addresses, bytes

    def __call__(self, machine: Any, i: Instruction, mask: Array) -> None:
        if i.parts[2] == "bulk":
            self.engine(machine, i, mask)
        elif i.parts[2] == "commit_group":
            self.group[mask] += 1
        elif i.parts[2] == "wait_group":
            self.wait(machine, mask, int(str(i.operands[0]), 0))
        elif i.parts[2] in ("cg", "ca"):
            self.ask(machine, i, mask)
        else:
            raise NotImplementedError("not known to this machine")

    def ask(self, machine: Any, i: Instruction, mask: Array) -> None:
        size = int(str(i.operands[2]), 0)
        to, source = (machine.addresses(o, mask) for o in i.operands[:2])
        count = machine.read(i.operands[3], "s32")[mask] if len(i.operands) > 3 else np.full(mask.sum(), size)
        if ((count != 0) & (count != size)).any():
            raise NotImplementedError("part of a copy")
        values, warps = np.zeros((mask.sum(), size), np.uint8), machine.warps[mask]
        read = count > 0
        values[read] = machine.memory.get(source[read], size, warps[read], "copy from")
        machine.shared.put(to, np.full_like(values, POISON), warps, "copy to")
        self.pending.append((np.flatnonzero(mask), self.group[mask].copy(), to, values))

    def wait(self, machine: Any, mask: Array, but: int) -> None:
        """Until at most ``but`` of each thread's groups are under way."""
        left = []
        for threads, groups, to, values in self.pending:
            done = mask[threads] & (groups < self.group[threads] - but)
            if done.any():
                machine.shared.put(to[done], values[done], machine.warps[threads[done]], "copy arrives")
            if not done.all():
                left.append((threads[~done], groups[~done], to[~done], values[~done]))
        self.pending = left


class Matrices(Unit):
    """ldmatrix, stmatrix: up to four 8 x 8 matrices of 16 bits; lanes 8 m to 8 m + 7 hold the rows' addresses."""

    def __call__(self, machine: Any, i: Instruction, mask: Array) -> None:
        check_whole(mask)
        load = i.parts[0] == "ldmatrix"
        registers, at = i.operands if load else reversed(i.operands)
        count, turned = len(registers), "trans" in i.parts
        warps = machine.warps[mask][::WARP]
        rows = machine.addresses(at, mask).reshape(-1, WARP)[:, : 8 * count].reshape(-1)
        owners = np.repeat(warps, 8 * count)
        if load:
            found = machine.shared.get(rows, 16, owners, "ldmatrix").view(np.uint16).reshape(-1, count, 8, 8)
            found = found.swapaxes(2, 3) if turned else found
            pairs = np.ascontiguousarray(found[:, :, ROW[:, None], PAIR[:, None] + [0, 1]]).view(np.uint32)
            for m, register in enumerate(registers):
                value = np.zeros((machine.threads // WARP, WARP), np.uint32)
                value[warps] = pairs[:, m, :, 0]
                machine.write(register, value.reshape(-1))
        else:
            given = np.stack([machine.read(register, "b32").reshape(-1, WARP)[warps] for register in registers], 1)
            matrices = np.zeros((len(warps), count, 8, 8), np.uint16)
            matrices[:, :, ROW[:, None], PAIR[:, None] + [0, 1]] = given[..., None].view(np.uint16)
            matrices = np.ascontiguousarray(matrices.swapaxes(2, 3) if turned else matrices)
            machine.shared.put(rows, matrices.view(np.uint8).reshape(-1, 16), owners, "stmatrix")


def _floats(bits: Array, kind: str) -> Array:
    """uint16 as float64."""
    return (from_bf16(bits) if kind == "bf16" else bits.view(np.float16)).astype(np.float64)


def _pairs(machine: Any, registers: tuple[str, ...], kind: str) -> Array:
    """float64 [warps, 32, registers, 2] of registers that hold two elements each."""
    bits = np.stack([machine.read(r, "b32") for r in registers], 1)
    return _floats(bits.view(np.uint16), kind).reshape(-1, WARP, len(registers), 2)


def _left(machine: Any, registers: tuple[str, ...], kind: str) -> Array:
    """float64 [warps, 16, 16]: the left operand of m16..k16, from four registers a thread."""
    pairs = _pairs(machine, registers, kind)
    out = np.zeros((len(pairs), 16, 16))
    for r in range(4):
        out[:, (ROW + 8 * (r % 2))[:, None], PAIR[:, None] + 8 * (r // 2) + [0, 1]] = pairs[:, :, r]
    return out


class Products(Unit):
    """mma.sync m16n8k16."""

    def __call__(self, machine: Any, i: Instruction, mask: Array) -> None:
        if i.parts[3:] not in (("m16n8k16", "row", "col", "f32", k, k, "f32") for k in ("bf16", "f16")):
            raise NotImplementedError("not known to this machine")
        check_whole(mask)
        to, a, b, c = (o if isinstance(o, tuple) else (o,) for o in i.operands)
        kind = i.parts[7]
        left, pairs = _left(machine, a, kind), _pairs(machine, b, kind)
        right = np.zeros((len(pairs), 16, 8))
        for r in range(2):
            right[:, PAIR[:, None] + 8 * r + [0, 1], ROW[:, None]] = pairs[:, :, r]
        product = left @ right
        for r, (out, add) in enumerate(zip(to, c, strict=True)):
            part = product[:, ROW + 8 * (r // 2), PAIR + r % 2].reshape(-1)
            machine.write(out, (part + machine.read(add, "f32")).astype(np.float32))


Read = tuple[Array, int, Array]  # of shared memory: which of its lines, of how many bytes, what was there


class Under(NamedTuple):
    """A product under way: its results, float32 [threads, registers], and what it reads, to be looked at again."""

    results: Array
    reads: list[Read]
    registers: tuple[str, ...]  # of its left operand


class AsyncProducts(Unit):
    """wgmma: results are in no register until they are waited for; what is multiplied must stay until then."""

    def reset(self, machine: Any) -> None:
        self.machine = machine
        self.open: list[Under] = []
        self.groups: list[list[Under]] = []
        self.holds: dict[str, tuple[Under, int]] = {}  # registers of products under way, and moved ones
        self.dirty: set[str] = set()  # written since the last fence

    def check_read(self, register: str) -> None:
        if register in self.holds:
            raise Fault(f"{register} is read while its product is under way")

    def overwritten(self, register: str) -> None:
        if register in self.holds:
            raise Fault(f"{register} is written while its product is under way")
        if any(register in under.registers for group in (*self.groups, self.open) for under in group):
            raise Fault(f"{register} is written while it is multiplied")
        self.dirty.add(register)

    def moved(self, machine: Any, to: str, source: Operand, mask: Array) -> bool:
        """Compilers pass results on by moves that become nothing: allowed to stand before the wait."""
        if not isinstance(source, str) or source not in self.holds:
            return False
        if not mask.all():
            raise Fault(f"{source} is read by some threads while its product is under way")
        self.holds[to] = self.holds[source]
        return True

    def __call__(self, machine: Any, i: Instruction, mask: Array) -> None:
        if not mask.all():
            raise Fault("wgmma: threads apart")
        what = i.parts[1]
        if what == "fence":
            self.dirty.clear()
        elif what == "commit_group":
            self.groups.append(self.open)
            self.open = []
        elif what == "wait_group":
            keep = int(str(i.operands[0]), 0)
            done, self.groups = self.groups[: len(self.groups) - keep], self.groups[len(self.groups) - keep :]
            self.finish([under for group in done for under in group])
        else:
            self.multiply(i)

    def finish(self, done: list[Under]) -> None:
        for under in done:
            for at, size, held in under.reads:
                if not np.array_equal(self.machine.shared.lines(size).bytes[at], held):
                    raise Fault("wgmma: operands were overwritten while the product was under way")
                self.machine.shared.note_read(at, size, SEVERAL, "wgmma")
        finished = {id(under) for under in done}
        for register in [r for r, (under, _) in self.holds.items() if id(under) in finished]:
            under, n = self.holds.pop(register)
            self.machine.registers[register][:] = np.ascontiguousarray(under.results[:, n]).view(np.uint32)

    def multiply(self, i: Instruction) -> None:
        machine = self.machine
        shape, kind = i.parts[4], i.parts[6]
        rows, columns, depth = (int(n) for n in shape[1:].replace("n", " ").replace("k", " ").split())
        to, a, b = i.operands[:3]
        assert isinstance(to, tuple)
        assert (rows, depth, i.parts[5]) == (64, 16, "f32")
        flags = [int(str(o), 0) for o in i.operands[4:]]
        turned = flags[2:] if len(flags) == 4 else [0, *flags[2:]]
        if flags[:2] != [1, 1]:
            raise NotImplementedError("negated operands")
        registers = a if isinstance(a, tuple) else ()
        if self.dirty.intersection(to + registers):
            raise Fault("wgmma: registers were written and no fence followed")
        reads: list[Read] = []
        groups = machine.threads // 128
        if isinstance(a, tuple):
            left = _left(machine, a, kind).reshape(groups, 64, 16)
        else:
            left = np.stack([self.operand(a, g, 64, kind, reads, bool(turned[0])) for g in range(groups)])
        right = np.stack([self.operand(b, g, columns, kind, reads, bool(turned[1])) for g in range(groups)])
        product = left @ right.transpose(0, 2, 1)  # [groups, 64, columns]
        adds = machine.read(i.operands[3], "pred")
        lane, warp, n = machine.lanes[:, None], machine.warps[:, None], np.arange(len(to))
        row, column = 16 * (warp % 4) + lane // 4 + 8 * (n // 2 % 2), 8 * (n // 4) + 2 * (lane % 4) + n % 2
        before = np.stack([self.value(register) for register in to], 1)
        results = (product[warp // 4, row, column] + np.where(adds[:, None], before, 0)).astype(np.float32)
        under = Under(results, reads, registers)
        self.open.append(under)
        for n, register in enumerate(to):
            machine.registers[register].fill(0xFFFFFFFF)
            self.holds[register] = under, n

    def value(self, register: str) -> Array:
        """float32, of a result that may be under way: products add up without a wait between them."""
        if register in self.holds:
            under, n = self.holds[register]
            return under.results[:, n]
        return self.machine.registers[register].view(np.float32)

    def operand(
        self, name: Operand, group: int, rows: int, kind: str, reads: list[Read], turned: bool = False
    ) -> Array:
        """float64 [rows, 16], by a descriptor of a matrix in shared memory; its rows, or turned its columns of 16, lie
        in lines of 32, 64 or 128 bytes, eight lines together.
        """
        machine = self.machine
        bits = machine.read(name, "b64")[group * 128 : (group + 1) * 128]
        if (bits != bits[0]).any():
            raise Fault("wgmma: threads have different descriptors")
        at, size = _lines(int(bits[0]), rows, turned)
        if at.max() * size >= machine.shared_bytes:
            raise Fault("wgmma: outside shared memory")
        machine.shared.note_read(at, size, SEVERAL, "wgmma")
        held = machine.shared.lines(size).bytes[at]
        reads.append((at, size, held))
        return _floats(held.view(np.uint16).reshape(rows, 16), kind)


@functools.cache
def _lines(descriptor: int, rows: int, turned: bool) -> tuple[Array, int]:
    """Where in shared memory the elements of a matrix [rows, 16] are: which lines of how many bytes."""
    start, leading, stride = ((descriptor >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    swizzle = {1: 128, 2: 64, 3: 32}.get(descriptor >> 62)
    if swizzle is None or descriptor >> 49 & 7:
        raise NotImplementedError("a layout without swizzle, or with an offset")
    row, column = np.arange(rows)[:, None], np.arange(16)[None]
    if turned:
        per_line = swizzle // 2
        at = row // per_line * leading + row % per_line * 2 + column // 8 * stride + column % 8 * swizzle
        size = 2
    else:  # a swizzle leaves 16 bytes together
        at = row // 8 * stride + row % 8 * swizzle + column[:, ::8] * 2
        size = 16
    return swizzled((start + at).reshape(-1), swizzle) // size, size


def units() -> dict[str, Unit]:
    """By the first part of an opcode."""
    engine = CopyEngine()
    return {
        "cp": Copies(engine), "mbarrier": engine, "elect": Election(),
        "ldmatrix": Matrices(), "stmatrix": Matrices(), "mma": Products(), "wgmma": AsyncProducts(),
        "shfl": Shuffle(), "redux": Reduction(), "vote": Vote(), "atom": Atomic(),
    }  # fmt: skip

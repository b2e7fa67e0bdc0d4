"""Hopper's copy engine: tiles of a matrix into shared memory, counted there by barriers of memory."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ptx.memory import POISON, Array, Fault
from ptx.text import Instruction
from ptx.warp import Unit

CHUNK = 16  # bytes that a swizzle leaves together


def swizzled(at: Array, line: int) -> Array:
    """Where in shared memory the bytes of lines of 32, 64 or 128 go that would otherwise be at ``at``."""
    return at ^ (at >> 7 & line // CHUNK - 1) << 4


class TileMap(NamedTuple):
    """What a launch passes as a tensor map.

    Attributes:
        base: address of a matrix of ``rows`` and ``columns`` of ``item`` bytes, rows ``stride`` bytes apart.
        tile: rows and columns that one copy brings. line: bytes of one of its rows, which are swizzled.
    """

    base: int
    rows: int
    columns: int
    stride: int
    item: int
    tile: tuple[int, int]
    line: int


@dataclass
class Barrier:
    """Of memory: a phase is over when all have arrived and all the bytes that they announced are there.

    Attributes:
        left: arrivals that this phase lacks. bytes: announced, less those asked for. copies: where to and what.
    """

    count: int
    left: int
    phase: int = 0
    bytes: int = 0
    copies: list[tuple[Array, Array]] = field(default_factory=list)


class CopyEngine(Unit):
    """What was asked for is nowhere until all threads have waited for it, and where it goes holds nothing."""

    def reset(self, machine: Any) -> None:
        self.barriers: dict[int, Barrier] = {}

    def __call__(self, machine: Any, i: Instruction, mask: Array) -> None:
        what = i.parts[1] if i.parts[0] == "mbarrier" else "copy"
        if what == "copy":
            self.copy(machine, i, mask)
        elif what == "try_wait":
            self.wait(machine, i, mask)
        else:
            operand = i.operands[1 if what == "arrive" else 0]
            for at in machine.addresses(operand, mask).tolist():
                number = int(str(i.operands[-1]), 0) if what != "inval" else 0
                self.change(what, at, number, i)

    def change(self, what: str, at: int, number: int, i: Instruction) -> None:
        if what == "init":
            if at in self.barriers:
                raise Fault("a barrier that there is already")
            self.barriers[at] = Barrier(number, number)
        elif what == "inval":
            if self.at(at).copies:
                raise Fault("a barrier ends while copies are under way")
            del self.barriers[at]
        elif i.parts[2] == "expect_tx":
            barrier = self.at(at)
            barrier.left, barrier.bytes = barrier.left - 1, barrier.bytes + number
            if barrier.left < 0:
                raise Fault("more arrivals than the barrier counts")
        else:
            raise NotImplementedError("not known to this machine")

    def at(self, address: int) -> Barrier:
        if address not in self.barriers:
            raise Fault("no barrier there")
        return self.barriers[address]

    def copy(self, machine: Any, i: Instruction, mask: Array) -> None:
        if i.parts[3:5] != ("tensor", "2d") or "multicast" in i.text:
            raise NotImplementedError("not known to this machine")
        parts = re.fullmatch(r"\[(%\w+),\{(%\w+),(%\w+)\}\]", str(i.operands[1]))
        assert parts is not None, i.operands[1]
        threads = np.flatnonzero(mask)
        to, barriers = (machine.addresses(i.operands[n], mask).tolist() for n in (0, 2))
        maps = machine.read(parts[1], "b64")[mask].tolist()
        columns, rows = (machine.read(parts[n], "s32")[mask].tolist() for n in (2, 3))
        for thread, place, address, which, column, row in zip(threads, to, barriers, maps, columns, rows, strict=True):
            source, barrier = machine.maps[which], self.at(address)
            if place % 128:
                raise Fault("a tile goes to an address that is no multiple of 128")
            values = self.tile(machine, source, row, column, int(machine.warps[thread]))
            at = swizzled(place + np.arange(values.size // CHUNK) * CHUNK, source.line)
            warps = np.full(len(at), machine.warps[thread], np.int32)
            machine.shared.put(at, np.full((len(at), CHUNK), POISON, np.uint8), warps, "a tile goes")
            barrier.copies.append((at, values.reshape(-1, CHUNK)))
            barrier.bytes -= values.size

    @staticmethod
    def tile(machine: Any, source: TileMap, row: int, column: int, warp: int) -> Array:
        """uint8 [rows, line]; what is outside the matrix is 0."""
        rows, columns = (at + np.arange(n) for at, n in zip((row, column), source.tile, strict=True))
        there = ((rows >= 0) & (rows < source.rows))[:, None] & ((columns >= 0) & (columns < source.columns))
        address = source.base + rows[:, None].astype(np.int64) * source.stride + columns * source.item
        values = np.zeros((*there.shape, source.item), np.uint8)
        warps = np.full(int(there.sum()), warp, np.int32)
        values[there] = machine.memory.get(address[there], source.item, warps, "a tile from")
        return values.reshape(len(rows), -1)

    def wait(self, machine: Any, i: Instruction, mask: Array) -> None:
        if not mask.all():
            raise Fault("threads apart")
        address, parity = (
            np.unique(x) for x in (machine.addresses(i.operands[1], mask), machine.read(i.operands[2], "u32"))
        )
        if len(address) > 1 or len(parity) > 1:
            raise Fault("threads wait for different barriers or phases")
        barrier = self.at(int(address[0]))
        if barrier.phase % 2 == parity[0]:
            if barrier.left:
                raise Fault("waits for what nobody has asked for")
            if barrier.bytes:
                raise Fault(f"announced are {barrier.bytes} bytes more than were asked for")
            lines = machine.shared.lines(CHUNK)
            for at, values in barrier.copies:
                if (lines.bytes[at // CHUNK] != POISON).any():
                    raise Fault("written to while a tile was under way there")
                lines.bytes[at // CHUNK] = values
                lines.written[at // CHUNK] = 0  # by none of the warps: whoever has waited may read
            barrier.left, barrier.copies = barrier.count, []
            barrier.phase += 1
        machine.write(i.operands[0], np.ones(machine.threads, bool))

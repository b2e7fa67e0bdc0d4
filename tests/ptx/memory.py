"""Memory of the machine that runs PTX: what may not be touched, and who touched what without waiting."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
POISON = 0xFF  # NaN in every float, -1 in every integer


class Fault(AssertionError):
    """What a program may not do on a GPU."""


class Memory:
    """The bytes from an address on; reads and writes of many threads at once.

    Threads of one warp are taken to be in step. Those of different warps are ordered by barriers alone: a byte that one
    wrote, and another reads or writes before the next, is a fault, unless the same is written.
    """

    def __init__(self, raw: Array, base: int) -> None:
        self.base, self.bytes = base, raw
        # who wrote and read a byte last, and in which epoch: two barriers enclose one. Zeros take no memory until used.
        self.writer, self.written, self.reader, self.read = (np.zeros(len(raw), np.int32) for _ in range(4))
        self.epoch = 1

    def holds(self, address: Array) -> Array:
        return (address >= self.base) & (address < self.base + len(self.bytes))

    def places(self, address: Array, size: int, what: str) -> Array:
        """Where the ``size`` bytes from each address on lie, [threads, size]."""
        at = address - self.base
        if (address % size).any():
            raise Fault(f"{what}: {size} bytes at an address that is no multiple of it")
        if at.min(initial=0) < 0 or at.max(initial=0) + size > len(self.bytes):
            raise Fault(f"{what}: outside memory")
        return at[:, None] + np.arange(size)

    def get(self, address: Array, size: int, warps: Array, what: str) -> Array:
        """uint8 [threads, size]."""
        at = self.places(address, size, what)
        self.note_read(at, warps[:, None], what)
        return self.bytes[at]

    def put(self, address: Array, values: Array, warps: Array, what: str) -> None:
        """values: uint8 [threads, size]. Of threads that write to one place the last wins."""
        at = self.places(address, values.shape[1], what)
        self.note_write(at, warps[:, None], values, what)
        self.bytes[at] = values

    def note_read(self, at: Array, warps: Array, what: str) -> None:
        if ((self.written[at] == self.epoch) & (self.writer[at] != warps)).any():
            raise Fault(f"{what}: reads what another warp wrote, with no barrier between them")
        again = (self.read[at] == self.epoch) & (self.reader[at] != warps)
        self.read[at], self.reader[at] = self.epoch, np.where(again, -1, warps)  # -1: several

    def note_write(self, at: Array, warps: Array, values: Array, what: str) -> None:
        changed = self.bytes[at] != values
        if (changed & (self.written[at] == self.epoch) & (self.writer[at] != warps)).any():
            raise Fault(f"{what}: writes where another warp wrote something else, with no barrier between them")
        if (changed & (self.read[at] == self.epoch) & (self.reader[at] != warps)).any():
            raise Fault(f"{what}: writes what another warp read, with no barrier between them")
        self.written[at], self.writer[at] = self.epoch, warps


class Global:
    """The arrays of a launch, where they are; nothing between them may be touched."""

    def __init__(self, arrays: Iterable[Array]) -> None:
        """arrays: uint8, contiguous."""
        self.parts = [Memory(raw, raw.ctypes.data) for raw in arrays]

    def barrier(self) -> None:
        for part in self.parts:
            part.epoch += 1

    def get(self, address: Array, size: int, warps: Array, what: str) -> Array:
        found = np.zeros((len(address), size), np.uint8)
        for part, mine in self._parts(address, what):
            found[mine] = part.get(address[mine], size, warps[mine], what)
        return found

    def put(self, address: Array, values: Array, warps: Array, what: str) -> None:
        for part, mine in self._parts(address, what):
            part.put(address[mine], values[mine], warps[mine], what)

    def check(self, address: Array, what: str) -> None:
        """That each address is one of an array."""
        self._parts(address, what)

    def _parts(self, address: Array, what: str) -> list[tuple[Memory, Array]]:
        found = [(part, mine) for part in self.parts if (mine := part.holds(address)).any()]
        if sum(mine.sum() for _, mine in found) < len(address):
            raise Fault(f"{what}: outside every array")
        return found

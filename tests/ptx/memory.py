"""Memory of the machine that runs PTX: what may not be touched, and who touched what without waiting."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]
POISON = 0xFF  # NaN in every float, -1 in every integer


class Fault(AssertionError):
    """What a program may not do on a GPU."""


SEVERAL = 255  # as the number of a warp


class Lines(NamedTuple):
    """Views [.., size]: aligned places of so many bytes, their ``bytes`` and stamps."""

    bytes: Array
    written: Array
    read: Array


class Memory:
    """The bytes from an address on; reads and writes of many threads at once.

    Threads of one warp are taken to be in step. Those of different warps are ordered by barriers alone: a byte that one
    wrote, and another reads or writes before the next, is a fault, unless the same is written.
    """

    def __init__(self, raw: Array, base: int) -> None:
        self.base, self.bytes = base, raw
        # Who wrote and read a byte last and in which epoch (two barriers enclose one): 256 epoch + warp. Zeros take no
        # memory until used.
        self.written, self.read = (np.zeros(len(raw), np.int32) for _ in range(2))
        self.epoch = 1
        self.last_write = 0  # its epoch
        self._lines: dict[int, Lines] = {}

    def holds(self, address: Array) -> Array:
        return (address >= self.base) & (address < self.base + len(self.bytes))

    def barrier(self) -> None:
        self.epoch += 1

    def lines(self, size: int) -> Lines:
        if size not in self._lines:
            skew = -self.base % size
            fields = (self.bytes, self.written, self.read)
            parts = (x[skew : skew + max(0, len(x) - skew) // size * size].reshape(-1, size) for x in fields)
            self._lines[size] = Lines(*parts)
        return self._lines[size]

    def places(self, address: Array, size: int, what: str) -> Array:
        """Which of `lines` the ``size`` bytes from each address on are, [threads]."""
        at = address - self.base
        if (address % size).any():
            raise Fault(f"{what}: {size} bytes at an address that is no multiple of it")
        if at.min(initial=0) < 0 or at.max(initial=0) + size > len(self.bytes):
            raise Fault(f"{what}: outside memory")
        return at // size

    def get(self, address: Array, size: int, warps: Array, what: str) -> Array:
        """uint8 [threads, size]."""
        at = self.places(address, size, what)
        self.note_read(at, size, warps, what)
        return self.lines(size).bytes[at]

    def put(self, address: Array, values: Array, warps: Array, what: str) -> None:
        """values: uint8 [threads, size]. Of threads that write to one place the last wins."""
        size = values.shape[1]
        at = self.places(address, size, what)
        lines, stamp = self.lines(size), self._stamp(warps)
        for stamps, did in ((lines.written[at], "wrote something else"), (lines.read[at], "read")):
            by = self._others(stamps, stamp)
            if by is not None and (by & (lines.bytes[at] != values)).any():
                raise Fault(f"{what}: writes where another warp {did}, with no barrier between them")
        lines.written[at] = stamp
        lines.bytes[at] = values
        self.last_write = self.epoch

    def note_read(self, at: Array, size: int, warps: Array | int, what: str) -> None:
        lines, stamp = self.lines(size), self._stamp(warps)
        fresh = self.last_write == self.epoch
        if fresh and (by := self._others(lines.written[at], stamp)) is not None and by.any():
            raise Fault(f"{what}: reads what another warp wrote, with no barrier between them")
        again = self._others(lines.read[at], stamp)
        lines.read[at] = stamp if again is None else np.where(again, self._stamp(SEVERAL), stamp)

    def _stamp(self, warps: Array | int) -> Array:
        """int32 [threads, 1] or []."""
        stamp = np.asarray(self.epoch << 8 | warps, np.int32)
        return stamp[:, None] if stamp.ndim else stamp

    def _others(self, stamps: Array, mine: Array) -> Array | None:
        """Which of ``stamps`` another warp left in this epoch; None for none, as nearly always."""
        now = self.epoch << 8
        return (stamps >= now) & (stamps != mine) if stamps.max(initial=0) >= now else None


class Global:
    """The arrays of a launch, where they are; nothing between them may be touched."""

    def __init__(self, arrays: Iterable[Array]) -> None:
        """arrays: uint8, contiguous."""
        self.parts = [Memory(raw, raw.ctypes.data) for raw in arrays]

    def barrier(self) -> None:
        for part in self.parts:
            part.barrier()

    def get(self, address: Array, size: int, warps: Array, what: str) -> Array:
        if part := self._whole(address):
            return part.get(address, size, warps, what)
        found = np.zeros((len(address), size), np.uint8)
        for part, mine in self._parts(address, what):
            found[mine] = part.get(address[mine], size, warps[mine], what)
        return found

    def put(self, address: Array, values: Array, warps: Array, what: str) -> None:
        if part := self._whole(address):
            return part.put(address, values, warps, what)
        for part, mine in self._parts(address, what):
            part.put(address[mine], values[mine], warps[mine], what)

    def check(self, address: Array, what: str) -> None:
        """That each address is one of an array."""
        self._parts(address, what)

    def _whole(self, address: Array) -> Memory | None:
        """The array that all addresses are in, if there is one."""
        if not len(address):
            return None
        least, most = address.min(), address.max()
        holding = (part for part in self.parts if part.base <= least and most < part.base + len(part.bytes))
        return next(holding, None)

    def _parts(self, address: Array, what: str) -> list[tuple[Memory, Array]]:
        found = [(part, mine) for part in self.parts if (mine := part.holds(address)).any()]
        if sum(mine.sum() for _, mine in found) < len(address):
            raise Fault(f"{what}: outside every array")
        return found


def memory_of(tensors: Iterable[Tensor]) -> Global:
    """The storages that they are views of."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
    return Global(torch.empty(0, dtype=torch.uint8).set_(s).numpy() for s in storages.values() if s.nbytes())

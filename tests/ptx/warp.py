"""What goes on between threads: shuffles, reductions and votes of a warp, and atomic counters."""

from __future__ import annotations

from typing import Any

import numpy as np

from ptx.memory import Array, Fault
from ptx.text import Instruction

WARP = 32
REDUCE = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or}


class Unit:
    """Called with machine, instruction and mask of threads; begins anew with each block."""

    def reset(self, machine: Any) -> None:
        pass

    def __call__(self, machine: Any, i: Instruction, mask: Array) -> None:
        raise NotImplementedError


def check_whole(mask: Array) -> None:
    """Instructions of a warp need all of its threads."""
    by_warp = mask.reshape(-1, WARP)
    if not (by_warp.all(1) | ~by_warp.any(1)).all():
        raise Fault("part of a warp only")


class Shuffle(Unit):
    def __call__(self, machine: Any, i: Instruction, mask: Array) -> None:
        check_whole(mask)
        to, *more = i.operands
        there_too = more.pop(0) if len(more) == 5 else None
        value, lanes = machine.read(more[0], "b32"), machine.lanes
        by, limits = (machine.read(o, "s32").astype(np.int64) for o in more[1:3])
        segment, clamp = limits >> 8 & 31, limits & 31
        least, most = lanes & segment, (lanes & segment) | (clamp & ~segment)
        sources = {"bfly": lanes ^ by, "down": lanes + by, "up": lanes - by, "idx": least | (by & ~segment)}
        source = sources[i.parts[2]]
        there = source >= most if i.parts[2] == "up" else source <= most
        machine.write(to, value[machine.warps * WARP + np.where(there, source, lanes)])
        if there_too is not None:
            machine.write(there_too, there)


class Election(Unit):
    """elect.sync: one thread of each warp, and it may be any."""

    def __call__(self, machine: Any, i: Instruction, mask: Array) -> None:
        check_whole(mask)
        leader = WARP - 1
        machine.write(i.operands[0], np.full(machine.threads, leader, np.uint32))
        machine.write(i.operands[1], machine.lanes == leader)


class Reduction(Unit):
    """redux.sync"""

    def __call__(self, machine: Any, i: Instruction, mask: Array) -> None:
        check_whole(mask)
        values = machine.read(i.operands[1], i.parts[-1]).reshape(-1, WARP)
        machine.write(i.operands[0], REDUCE[i.parts[2]].reduce(values, 1, dtype=values.dtype)[machine.warps])


class Vote(Unit):
    def __call__(self, machine: Any, i: Instruction, mask: Array) -> None:
        check_whole(mask)
        votes = machine.predicate(i.operands[1]).reshape(-1, WARP)
        if i.parts[2] == "ballot":
            bits = (votes.astype(np.uint64) << np.arange(WARP, dtype=np.uint64)).sum(1).astype(np.uint32)
            machine.write(i.operands[0], bits[machine.warps])
        else:
            machine.write(i.operands[0], {"any": votes.any(1), "all": votes.all(1)}[i.parts[2]][machine.warps])


class Atomic(Unit):
    """atom.global.inc: a counter that begins anew behind a limit."""

    def __call__(self, machine: Any, i: Instruction, mask: Array) -> None:
        if i.parts[1:4] != ("global", "inc", "u32"):
            raise NotImplementedError("not known to this machine")
        limit, before = machine.read(i.operands[2], "u32"), np.zeros(machine.threads, np.uint32)
        for t, address in zip(np.flatnonzero(mask), machine.addresses(i.operands[1], mask), strict=True):
            (part,) = (p for p in machine.memory.parts if p.holds(address))
            counter = part.bytes[address - part.base :][:4].view(np.uint32)
            before[t] = counter[0]
            counter[0] = 0 if before[t] >= limit[t] else before[t] + 1
        machine.write(i.operands[0], before)

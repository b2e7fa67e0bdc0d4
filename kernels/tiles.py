"""Tile sizes of the decode step's scoring kernel."""

from __future__ import annotations

from dataclasses import dataclass

import triton


@dataclass(frozen=True)
class Config:
    """Tile sizes of the scoring kernel."""

    rows: int
    ids: int
    depth: int
    warps: int
    stages: int


# By number of rows, up to and including the key; None: more. Few rows wait for memory: two programs a multiprocessor.
# Many rows compute: the larger the tile, the less comes through L2. None spills registers
# (tests/test_triton_compiles.py). The first table has the fastest on an H200 and needs the 227 KB of shared memory of
# sm_90 and sm_100; the second has been measured on no card.
WIDE: dict[int | None, Config] = {
    16: Config(16, 64, 128, 8, 4),
    32: Config(32, 128, 128, 4, 3),
    64: Config(64, 128, 64, 4, 4),
    None: Config(128, 256, 64, 8, 3),
}
NARROW: dict[int | None, Config] = {
    16: Config(16, 128, 64, 4, 4),
    32: Config(32, 256, 64, 8, 3),
    64: Config(64, 128, 64, 8, 4),
    None: Config(128, 64, 64, 8, 3),
}
BUSY: dict[int | None, Config] = {16: Config(16, 64, 64, 4, 4), None: Config(32, 64, 64, 8, 4)}  # noise or probes
PRECISE = Config(32, 64, 32, 8, 2)  # float32 products, which no tensor core makes
PRECISE_BUSY = Config(16, 64, 32, 8, 2)  # the same with noise or probes


def candidates(count: int) -> list[Config]:
    """What may be the fastest for so many rows, without those that need more shared memory than any device has."""
    configs = [
        Config(rows, ids, depth, warps, stages)
        for rows in ((64, 128) if count > 64 else (max(16, triton.next_power_of_2(count)),))
        for ids in (64, 128, 256)
        for depth in (64, 128)
        for warps in (4, 8)
        for stages in (3, 4, 5)
    ]
    return [c for c in configs if (c.stages - 1) * (c.rows + c.ids) * c.depth * 2 <= 227 * 1024]

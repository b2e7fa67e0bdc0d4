"""Attention of one block's queries to a cache, in Triton: two launches where few programs would not fill the device.

A captured CUDA graph serves every length up to the buffer: launches depend on shapes alone, and each program reads on
the device which keys it has. Runs on CUDA devices, and on CPUs under ``TRITON_INTERPRET=1``.

The keys of a sequence are cut into segments that begin at fixed distances from its first key (`_edge`). Each is added
up by itself, tile after tile, and the segments are merged from the first to the last: by one program in its registers,
or through memory by the second launch. So a result depends on that sequence's queries, keys and values alone. Other
sequences, padding, the length of the buffer, the number of programs and of multiprocessors change no bit of it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dllm_engine.kernel_limits import DTYPES, HEAD_DIMS, MAX_WIDTH, check_device, interpreted
from dllm_engine.kernels.early import begin, launch_early

NEG_INF = tl.constexpr(float("-inf"))
SEGMENT = tl.constexpr(128)  # keys of the shortest segments
OCTAVE = tl.constexpr(4)  # segments until their length doubles, a power of two
MOST = tl.constexpr(64)  # segments: 2^24 keys
MERGE_ROWS = 4
FULL = 132  # programs that keep a large device busy; a constant, as the choice it makes is one of speed alone


class Config(NamedTuple):
    """Tile sizes. A function of dtype and shape of the queries alone: results depend on them."""

    rows: int
    keys: int
    warps: int
    stages: int


def config_for(dtype: torch.dtype, dim: int, rows: int) -> Config:
    """For ``rows`` queries to each head of keys. None spills on sm_80 or sm_90 (tests/test_triton_compiles.py)."""
    if dtype == torch.float32:  # products that no tensor core makes
        return Config(16, 16, 8, 2)
    padded = max(16, triton.next_power_of_2(rows))
    if dim > 128:
        return Config(min(padded, 32), 32, 8, 2)
    # more rows than a tile: the next tile runs beside it and finds the keys in L2. Four warps are faster (32 rows: by a
    # tenth to a third on an H200), but other tiles would spill with them.
    return Config(min(padded, 64), 64, 4 if padded == 32 else 8, 3)


def segments(length: int) -> int:
    """How many segments hold ``length`` keys: the least i with ``_edge(i) >= length``."""
    octave = max(0, math.ceil(length / (SEGMENT.value * OCTAVE.value)) - 1).bit_length()
    size = SEGMENT.value << max(octave - 1, 0)
    return octave * OCTAVE.value + math.ceil(length / size) - (OCTAVE.value if octave else 0)


@triton.jit
def _edge(i):
    """First key of segment i: 0, 128, … 896, then 4 segments of 256, 4 of 512, and so on.

    Many segments where there are few keys to share out, and yet their number grows as the logarithm of the length.
    """
    octave = i // OCTAVE
    doublings = tl.maximum(octave - 1, 0)
    return ((i - (octave - tl.minimum(octave, 1)) * OCTAVE) << doublings) * SEGMENT


@triton.jit
def _fold(top, total, sums, top2, total2, sums2):
    """Merge two parts (m, Σ2^(x−m), Σv·2^(x−m)) of the softmax; an empty part has m = −inf and sums 0.

    Every rounding is spelled out: in registers and through memory it must be the same.
    """
    m = tl.maximum(top, top2)
    shift = tl.where(m == NEG_INF, 0.0, m)
    scale, scale2 = tl.exp2(top - shift), tl.exp2(top2 - shift)
    wide = tl.broadcast_to(scale[:, None], sums.shape)
    return m, tl.fma(total, scale, total2 * scale2), tl.fma(sums, wide, sums2 * scale2[:, None])


@triton.jit
def _bounds(first, end, b, length):
    """First key of sequence b, the number of its keys, within the buffer, and of its segments.

    The latter is known before the loops: Triton 3.2 has no tensor cores of Hopper inside a `while`.
    """
    low = tl.minimum(tl.maximum(tl.load(first + b), 0), length).to(tl.int32)
    count = tl.minimum(tl.maximum(tl.load(end + b), 0), length).to(tl.int32) - low
    return low, count, tl.sum((_edge(tl.arange(0, MOST)) < count).to(tl.int32), 0)


@triton.jit
def _attend(
    q, keys, values, first, end, out, parts, scale, packed, width, group, key_heads, length, segments,
    q_batch, q_head, q_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    out_batch, out_head, out_row,
    DIRECT: tl.constexpr, UPCAST: tl.constexpr, EARLY: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    DIM: tl.constexpr,
):  # fmt: skip
    """A tile of one key head's ``packed`` rows (of its query heads, one after the other) over every n-th segment.

    DIRECT: this program has all segments and writes the result; else each segment's part is written.
    """
    begin(EARLY)
    tiles = tl.cdiv(packed, ROWS)
    tile, pair = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, head = (pair // key_heads).to(tl.int64), (pair % key_heads).to(tl.int64)
    low, count, own_segments = _bounds(first, end, b, length)
    if not DIRECT:  # noqa: SIM102  (a constant, which Triton does not combine with a tensor)
        if tl.program_id(1) >= own_segments:
            return
    r = tile * ROWS + tl.arange(0, ROWS)
    live = r < packed
    d = tl.arange(0, DIM)
    query_head, row = head * group + r // width, (r % width).to(tl.int64)
    at = q + b * q_batch + query_head * q_head + row * q_row
    query = tl.load(at[:, None] + d[None, :], mask=live[:, None], other=0.0)
    if UPCAST:
        query = query.to(tl.float32)
    keys += b * key_batch + head * key_head + low.to(tl.int64) * key_row
    values += b * value_batch + head * value_head + low.to(tl.int64) * value_row

    none = tl.full([ROWS], NEG_INF, tl.float32)
    nothing, zeros = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, DIM], tl.float32)
    all_top, all_total, all_sums = none, nothing, zeros
    # one stage: Triton 3.2 would ask for the next segment's first keys while products still read where they go
    for segment in tl.range(tl.program_id(1), own_segments, tl.num_programs(1), num_stages=1):
        stop = tl.minimum(_edge(segment + 1), count)
        top, total, sums = none, nothing, zeros
        for start in range(_edge(segment), stop, KEYS):
            column = start + tl.arange(0, KEYS)
            seen = column < stop
            column = column.to(tl.int64)[:, None]
            # what is not seen may be anything, or lie behind the buffer: it is not read, for 0 times NaN is NaN
            k = tl.load(keys + column * key_row + d[None, :], mask=seen[:, None], other=0.0)
            v = tl.load(values + column * value_row + d[None, :], mask=seen[:, None], other=0.0)
            if UPCAST:
                k, v = k.to(tl.float32), v.to(tl.float32)
            x = tl.dot(query, tl.trans(k), input_precision="ieee") * scale  # scores in powers of two
            x = tl.where(seen[None, :], x, NEG_INF)
            m = tl.maximum(top, tl.max(x, 1))  # finite: each tile has a key that is seen
            p = tl.exp2(x - m[:, None])
            rescale = tl.exp2(top - m)
            total = tl.fma(total, rescale, tl.sum(p, 1))
            sums = tl.dot(p.to(v.dtype), v, sums * rescale[:, None], input_precision="ieee")
            top = m
        if DIRECT:
            all_top, all_total, all_sums = _fold(all_top, all_total, all_sums, top, total, sums)
        else:
            size = tl.num_programs(0).to(tl.int64) // tiles * segments * packed
            place = (pair.to(tl.int64) * segments + segment) * packed + r
            tl.store(parts + place[:, None] * DIM + d[None, :], sums, mask=live[:, None])
            tl.store(parts + size * DIM + place, top, mask=live)
            tl.store(parts + size * (DIM + 1) + place, total, mask=live)
    if DIRECT:
        sums = all_sums / tl.where(all_total == 0, 1.0, all_total)[:, None]  # without keys: 0
        at = out + b * out_batch + query_head * out_head + row * out_row
        tl.store(at[:, None] + d[None, :], sums.to(out.dtype.element_ty), mask=live[:, None])


@triton.jit
def _load_part(parts, size, place, live, packed, segment, own_segments, d, DIM: tl.constexpr):
    """A segment's part of some rows, whose first segment is at ``place``; an empty one if there is no such segment."""
    there = live & (segment + tl.zeros_like(place) < own_segments)
    place += segment * packed
    top = tl.load(parts + size * DIM + place, mask=there, other=NEG_INF)
    total = tl.load(parts + size * (DIM + 1) + place, mask=there, other=0.0)
    return top, total, tl.load(parts + place[:, None] * DIM + d[None, :], mask=there[:, None], other=0.0)


@triton.jit
def _merge(
    parts, first, end, out, packed, width, group, key_heads, length, segments, out_batch, out_head, out_row,
    EARLY: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Merge the parts of some rows, from the first segment to the last."""
    begin(EARLY)
    tiles = tl.cdiv(packed, ROWS)
    tile, pair = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, head = (pair // key_heads).to(tl.int64), (pair % key_heads).to(tl.int64)
    _, _, own_segments = _bounds(first, end, b, length)
    r = tile * ROWS + tl.arange(0, ROWS)
    live = r < packed
    d = tl.arange(0, DIM)
    size = tl.num_programs(0).to(tl.int64) // tiles * segments * packed
    top = tl.full([ROWS], NEG_INF, tl.float32)
    total, sums = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, DIM], tl.float32)
    place = pair.to(tl.int64) * segments * packed + r
    for segment in range(0, own_segments, 4):
        # four at a time: reads do not wait for each other. A segment that does not exist changes nothing.
        top0, total0, sums0 = _load_part(parts, size, place, live, packed, segment, own_segments, d, DIM)
        top1, total1, sums1 = _load_part(parts, size, place, live, packed, segment + 1, own_segments, d, DIM)
        top2, total2, sums2 = _load_part(parts, size, place, live, packed, segment + 2, own_segments, d, DIM)
        top3, total3, sums3 = _load_part(parts, size, place, live, packed, segment + 3, own_segments, d, DIM)
        top, total, sums = _fold(top, total, sums, top0, total0, sums0)
        top, total, sums = _fold(top, total, sums, top1, total1, sums1)
        top, total, sums = _fold(top, total, sums, top2, total2, sums2)
        top, total, sums = _fold(top, total, sums, top3, total3, sums3)
    sums = sums / tl.where(total == 0, 1.0, total)[:, None]
    at = out + b * out_batch + (head * group + r // width) * out_head + (r % width).to(tl.int64) * out_row
    tl.store(at[:, None] + d[None, :], sums.to(out.dtype.element_ty), mask=live[:, None])


def default_splits(batch: int, key_heads: int, tiles: int, length: int) -> int:
    """One where sequences and heads make `FULL` programs or more: nothing but the result is then written. Else enough
    for twice as many, as far as there are segments.
    """
    programs = max(1, batch * key_heads * tiles)
    return 1 if programs >= FULL else max(1, min(segments(length), math.ceil(2 * FULL / programs)))


def block_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    first: Tensor,
    end: Tensor,
    *,
    splits: int | None = None,
    early: bool = False,
) -> Tensor:
    """softmax(q · keysᵀ / √Dh) · values over the keys of each sequence; every query sees all of them.

    Sums, maxima and the softmax are float32 whatever the inputs; float32 inputs are multiplied in full precision.

    Args:
        q: [B, H, S, Dh], bfloat16, float16 or float32. S is 1 to 128, Dh a power of two from 16 to 256; any strides,
            but the last is 1 (in all of ``q``, ``keys`` and ``values``).
        keys, values: [B, H_kv, L, Dh] in q's dtype, H a multiple of H_kv: query head h reads head h · H_kv // H.
        first, end: int32 or int64 [B] on q's device: sequence b sees columns first[b] to end[b] − 1, as far as there
            are such; what the others hold is never read.
        splits: programs that share the keys of a head; changes the speed, not the result. See `default_splits`.
        early: see `dllm_engine.kernels.early`.

    Returns:
        [B, H, S, Dh], a view of a contiguous [B, S, H, Dh]. 0 for a sequence without keys.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not fit.
    """
    _check(q, keys, values, first, end, splits)
    batch, heads, width, dim = q.shape
    key_heads, length = keys.shape[1:3]
    out = torch.empty(batch, width, heads, dim, dtype=q.dtype, device=q.device).transpose(1, 2)
    if batch == 0:
        return out
    group = heads // key_heads
    rows = group * width
    config = config_for(q.dtype, dim, rows)
    tiles = triton.cdiv(rows, config.rows)
    splits = splits or default_splits(batch, key_heads, tiles, length)
    direct, count = splits == 1, segments(length)
    parts = q  # not used, or a part of every segment
    if not direct:
        parts = torch.empty(batch * heads * width * count * (dim + 2), dtype=torch.float32, device=q.device)
    shape = (rows, width, group, key_heads, length, count)
    _attend[(batch * key_heads * tiles, splits)](
        q, keys, values, first, end, out, parts, math.log2(math.e) / math.sqrt(dim), *shape,
        *q.stride()[:3], *keys.stride()[:3], *values.stride()[:3], *out.stride()[:3],
        DIRECT=direct,
        UPCAST=interpreted() and q.dtype == torch.bfloat16,  # whose bits the interpreter multiplies as integers
        EARLY=early, ROWS=config.rows, KEYS=config.keys, DIM=dim, num_warps=config.warps, num_stages=config.stages,
        enable_fp_fusion=True,  # Triton's default changes
        **launch_early(early),
    )  # fmt: skip
    if not direct:
        _merge[(batch * key_heads * triton.cdiv(rows, MERGE_ROWS),)](
            parts,
            first,
            end,
            out,
            *shape,
            *out.stride()[:3],
            EARLY=early,
            ROWS=MERGE_ROWS,
            DIM=dim,
            num_warps=4,
            enable_fp_fusion=True,
            **launch_early(early),
        )
    return out


def _check(q: Tensor, keys: Tensor, values: Tensor, first: Tensor, end: Tensor, splits: int | None) -> None:
    if q.ndim != 4 or keys.ndim != 4 or keys.shape != values.shape:
        shapes = f"{[*q.shape]}, {[*keys.shape]} and {[*values.shape]}"
        raise ValueError(f"q, keys, values: [B, H, S, Dh] and twice [B, H_kv, L, Dh] expected, {shapes} given")
    (batch, heads, width, dim), key_heads = q.shape, keys.shape[1]
    if keys.shape[0] != batch or keys.shape[3] != dim:
        raise ValueError(f"q and keys: batch and Dh must agree, {[*q.shape]} and {[*keys.shape]} given")
    if not key_heads or not heads or heads % key_heads:
        raise ValueError(f"q and keys: H must be a multiple of H_kv, {heads} and {key_heads} given")
    if keys.shape[2] > 2**24:
        raise ValueError(f"keys: L is {keys.shape[2]}; at most 2^24 allowed")
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"q: S is {width}; 1 to {MAX_WIDTH} allowed")
    if dim not in HEAD_DIMS:
        raise ValueError(f"q: Dh is {dim}; powers of two from {HEAD_DIMS[0]} to {HEAD_DIMS[-1]} allowed")
    if q.dtype not in DTYPES or keys.dtype != q.dtype or values.dtype != q.dtype:
        given = f"{q.dtype}, {keys.dtype} and {values.dtype}"
        raise ValueError(f"q, keys, values: one of bfloat16, float16 and float32 for all, {given} given")
    for name, bound in (("first", first), ("end", end)):
        if bound.shape != (batch,) or bound.dtype not in (torch.int32, torch.int64) or not bound.is_contiguous():
            raise ValueError(f"{name}: contiguous int32 or int64 [{batch}] expected, {bound.dtype} {[*bound.shape]}")
    if splits is not None and splits < 1:
        raise ValueError(f"splits: {splits} given, at least 1 expected")
    for name, tensor in (("keys", keys), ("values", values), ("first", first), ("end", end)):
        if tensor.device != q.device:
            raise ValueError(f"{name}: on {tensor.device}, q is on {q.device}")
    for name, tensor in (("q", q), ("keys", keys), ("values", values)):
        if tensor.stride(3) != 1:
            raise ValueError(f"{name}: the last stride must be 1, it is {tensor.stride(3)}")
    check_device("q", q)

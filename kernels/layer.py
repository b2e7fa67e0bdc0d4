"""What lies between a layer's matrix products and its attention, in Triton: three kernels, four launches a layer.

At 32 rows none of it takes longer than its launch, so their number counts. Torch launches about as many kernels for one
norm as there are here for a layer. Every result is rounded where eager torch rounds it (`dllm_engine.model`): products
and sums are not contracted, so rotations and sums have the same bits; norms and SiLU may differ in the last one, by the
order of a sum and by exp. Runs on CUDA devices, and on CPUs under ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dllm_engine.kernel_limits import DTYPES, HEAD_DIMS, check_device
from dllm_engine.kernels.early import begin, launch_early
from dllm_engine.kernels.products import Parts, load_product, silu, taken_apart

MAX_SIZE = 2**14  # of a row that is normed: one program holds it in its registers
HALVES = 512  # elements of left halves that a program rotates: with two warps 16 bytes a thread and access in bfloat16
BLOCK = 1024  # columns that a program of SiLU takes: the same with four warps


@triton.jit
def _add_norm(
    x, delta, weight, total, out, size, x_row, delta_row, delta_part, eps,
    ADD: tl.constexpr, PARTS: tl.constexpr, EARLY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row."""
    begin(EARLY)
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    live = d < size
    value = tl.load(x + row * x_row + d, mask=live, other=0.0).to(tl.float32)
    if ADD:
        value += load_product(delta, row * delta_row + d, live, delta_part, PARTS, total)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row * size + d, rounded, mask=live)
        value = rounded.to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, 0) / size + eps)
    value = value.to(out.dtype.element_ty).to(tl.float32)  # before the weight is applied, as LLaDA was trained
    value *= tl.load(weight + d, mask=live, other=0.0).to(tl.float32)
    tl.store(out + row * size + d, value.to(out.dtype.element_ty), mask=live)


@triton.jit
def _put(at, left, right, live, HALF: tl.constexpr):
    """Store heads [HEADS, 2 HALF] whose first elements are at ``at`` [HEADS]."""
    at = at[:, None] + tl.arange(0, HALF)[None, :]
    tl.store(at, left, mask=live[:, None])
    tl.store(at + HALF, right, mask=live[:, None])


@triton.jit
def _rope_write(
    qkv, cos, sin, keys, values, columns, out, width, heads, key_heads,
    qkv_batch, qkv_row, qkv_part, table_batch, table_row, cache_batch, cache_head, cache_row,
    PARTS: tl.constexpr, EARLY: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Some heads of one row, of queries, keys and values as they come: rotated but for the values, and put away."""
    begin(EARLY)
    b, s = (tl.program_id(0) // width).to(tl.int64), (tl.program_id(0) % width).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    first_value = heads + key_heads
    d = tl.arange(0, HALF)[None, :]
    live = (head < first_value + key_heads)[:, None]
    at = b * qkv_batch + s * qkv_row + head[:, None] * (2 * HALF) + d
    left = load_product(qkv, at, live, qkv_part, PARTS, out)
    right = load_product(qkv, at + HALF, live, qkv_part, PARTS, out)
    # each thread reads the angles of its own elements: one row of them would be handed round through shared memory
    table = b * table_batch + s * table_row + tl.broadcast_to(d, [HEADS, HALF])
    c, sine = tl.load(cos + table), tl.load(sin + table)
    turned = (head < first_value)[:, None]
    # not turned they keep their bits: what was widened is what it was when it is narrowed
    left, right = tl.where(turned, left * c - right * sine, left), tl.where(turned, right * c + left * sine, right)
    left, right = left.to(out.dtype.element_ty), right.to(out.dtype.element_ty)

    _put(out + ((b * heads + head) * width + s) * (2 * HALF), left, right, head < heads, HALF)
    column = tl.load(columns + tl.program_id(0)).to(tl.int64)
    place = b * cache_batch + column * cache_row
    key, value = (head - heads).to(tl.int64), (head - first_value).to(tl.int64)
    _put(keys + place + key * cache_head, left, right, (key >= 0) & (value < 0), HALF)
    _put(values + place + value * cache_head, left, right, (value >= 0) & (value < key_heads), HALF)


@triton.jit
def _silu_mul(
    gate_up, out, size, row_stride, part_stride, PARTS: tl.constexpr, EARLY: tl.constexpr, BLOCK: tl.constexpr
):
    """Some columns of one row."""
    begin(EARLY)
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = f < size
    at = row * row_stride + f
    gate = load_product(gate_up, at, live, part_stride, PARTS, out)
    up = load_product(gate_up, at + size, live, part_stride, PARTS, out)
    tl.store(out + row * size + f, (silu(gate, out) * up).to(out.dtype.element_ty), mask=live)


def norm_tile(size: int) -> tuple[int, int]:
    """Columns and warps of a program that norms rows of ``size``: 16 bytes a thread in bfloat16, as far as there are
    threads.
    """
    block = triton.next_power_of_2(size)
    return block, min(max(block // 256, 1), 16 if block <= 8192 else 32)  # with 16 the widest rows spill


def add_norm(
    x: Tensor, delta: Tensor | Parts | None, weight: Tensor, eps: float, *, early: bool = False
) -> tuple[Tensor, Tensor]:
    """x + delta, and its `dllm_engine.model.RMSNorm`.

    Args:
        x: [..., D], bfloat16, float16 or float32; D is at most 16,384. Rows lie at equal distances, their elements one
            behind the other: so in all arguments of this module.
        delta: the same shape and dtype, maybe in parts, or None: x alone is normed.
        weight: [D], same dtype, contiguous.
        early: see `dllm_engine.kernels.early`: so in all functions of this module.

    Returns:
        The sum (without ``delta`` x itself) and the normed rows, both [..., D].

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not fit.
    """
    size = x.shape[-1]
    _same("x", x, delta=delta, weight=weight)
    if delta is not None and delta.shape != x.shape:
        raise ValueError(f"delta: {[*x.shape]} expected, {[*delta.shape]} given")
    if weight.shape != (size,) or not 1 <= size <= MAX_SIZE:
        raise ValueError(f"weight: [D] as in x expected, 1 to {MAX_SIZE}; x {[*x.shape]}, weight {[*weight.shape]}")
    if not weight.is_contiguous():
        raise ValueError("weight: contiguous expected")
    rows, add = _rows("x", x), delta is not None
    delta, apart, parts = taken_apart(x if delta is None else delta)
    added = _rows("delta", delta)
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device) if add else x
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if len(rows):
        block, warps = norm_tile(size)
        _add_norm[(len(rows),)](
            rows, added, weight, total, out, size, rows.stride(0), added.stride(0), apart, eps,
            ADD=add, PARTS=parts, EARLY=early, BLOCK=block, num_warps=warps, enable_fp_fusion=False,
            **launch_early(early),
        )  # fmt: skip
    return total, out


def rope_write(
    qkv: Tensor | Parts, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, columns: Tensor, *, heads: int,
    early: bool = False,
) -> Tensor:  # fmt: skip
    """Rotate queries and keys as `dllm_engine.model.apply_rope`; keys and values go into the cache.

    Args:
        qkv: [B, S, (H + 2 H_kv) Dh], bfloat16, float16 or float32, maybe in parts: the heads of queries, keys and
            values. Dh is a power of two from 16 to 256.
        cos, sin: float32 [B, 1, S, Dh], the second half of each row like the first, as `LLaDA.rope_tables` makes them.
        keys, values: [≥ B, H_kv, L, Dh] in qkv's dtype and with the same strides, the last 1; sequence b is row b.
            Nothing but the columns named is written.
        columns: int64 [B, S], 0 to L − 1, contiguous. Of rows with the same column any may win.
        heads: H.

    Returns:
        The queries, [B, H, S, Dh].

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not fit.
    """
    _same("qkv", qkv, keys=keys, values=values)
    _, key_heads, _, dim = keys.shape
    batch, width, wide = qkv.shape
    if dim not in HEAD_DIMS:
        raise ValueError(f"keys: Dh is {dim}; powers of two from {HEAD_DIMS[0]} to {HEAD_DIMS[-1]} allowed")
    if wide != (heads + 2 * key_heads) * dim:
        raise ValueError(f"qkv: rows of ({heads} + 2 · {key_heads}) · {dim} expected, of {wide} given")
    if values.shape != keys.shape or values.stride() != keys.stride() or keys.stride(3) != 1 or len(keys) < batch:
        given = f"{[*keys.shape]} by {keys.stride()} and {[*values.shape]} by {values.stride()}"
        raise ValueError(f"keys, values: at least {batch} rows, equal shapes and strides, the last 1; {given} given")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape != (batch, 1, width, dim) or table.dtype != torch.float32 or table.device != qkv.device:
            expected = f"float32 {[batch, 1, width, dim]} on {qkv.device}"
            raise ValueError(f"{name}: {expected} expected, {table.dtype} {[*table.shape]} on {table.device} given")
    if cos.stride() != sin.stride() or cos.stride(3) != 1:
        raise ValueError("cos, sin: equal strides expected, the last 1")
    if columns.shape != (batch, width) or columns.dtype != torch.int64 or not columns.is_contiguous():
        raise ValueError(f"columns: contiguous int64 {[batch, width]} expected, {columns.dtype} {[*columns.shape]}")
    if columns.device != qkv.device:
        raise ValueError(f"columns: on {columns.device}, qkv is on {qkv.device}")
    out = torch.empty(batch, heads, width, dim, dtype=qkv.dtype, device=qkv.device)
    qkv, apart, parts = taken_apart(qkv)
    if qkv.stride(2) != 1:
        raise ValueError(f"qkv: the last stride must be 1, it is {qkv.stride(2)}")
    if out.numel():
        count = heads + 2 * key_heads
        tile = min(HALVES // (dim // 2), triton.next_power_of_2(count))
        _rope_write[(batch * width, triton.cdiv(count, tile))](
            qkv, cos, sin, keys, values, columns, out, width, heads, key_heads,
            *qkv.stride()[:2], apart, cos.stride(0), cos.stride(2), *keys.stride()[:3],
            PARTS=parts, EARLY=early, HEADS=tile, HALF=dim // 2, num_warps=2, enable_fp_fusion=False,
            **launch_early(early),
        )  # fmt: skip
    return out


def silu_mul(gate_up: Tensor | Parts, *, early: bool = False) -> Tensor:
    """silu(gate) · up.

    Args:
        gate_up: [..., 2 F], bfloat16, float16 or float32, maybe in parts.

    Returns:
        [..., F].

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not fit.
    """
    _same("gate_up", gate_up)
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up: [..., 2 F] expected, {[*gate_up.shape]} given")
    size = gate_up.shape[-1] // 2
    out = torch.empty(*gate_up.shape[:-1], size, dtype=gate_up.dtype, device=gate_up.device)
    gate_up, apart, parts = taken_apart(gate_up)
    rows = _rows("gate_up", gate_up)
    if out.numel():
        _silu_mul[(len(rows), triton.cdiv(size, BLOCK))](
            rows, out, size, rows.stride(0), apart, PARTS=parts, EARLY=early, BLOCK=BLOCK,
            num_warps=4, enable_fp_fusion=False, **launch_early(early),
        )  # fmt: skip
    return out


def _rows(name: str, x: Tensor) -> Tensor:
    """x [..., D] as [N, D], without a copy."""
    if x.stride(-1) != 1:
        raise ValueError(f"{name}: the last stride must be 1, it is {x.stride(-1)}")
    try:
        return x.view(-1, x.shape[-1])
    except RuntimeError:
        raise ValueError(f"{name}: rows at equal distances expected, {[*x.shape]} by {x.stride()} given") from None


def _same(name: str, x: Tensor | Parts, **others: Tensor | Parts | None) -> None:
    """Dtype and device."""
    if x.dtype not in DTYPES:
        raise ValueError(f"{name}: bfloat16, float16 or float32 expected, {x.dtype} given")
    for other, tensor in others.items():
        if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
            raise ValueError(f"{other}: {x.dtype} on {x.device} expected, {tensor.dtype} on {tensor.device} given")
    check_device(name, x)

"""Products of a layer's matrices with few rows, in Triton.

With the 32 rows of a block a product takes as long as reading its matrix, if enough of it is on its way all the time.
So every matrix is read by some hundred programs: where there are fewer tiles of features, programs share the depth. The
shares are not added up here, which would be a launch, but by the kernel of `layer` that reads the product next.
Runs on CUDA devices, and on CPUs under ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dllm_engine.kernel_limits import check_device, interpreted
from dllm_engine.kernels.early import gdc_launch_dependents, gdc_wait, launch_early

DTYPES = (torch.bfloat16, torch.float16)
MAX_ROWS = 32  # with more, cuBLAS's products are as fast or faster
PROGRAMS = 256  # wanted, all at once on a large device; a constant, as the sums depend on it


class Config(NamedTuple):
    """Tile sizes."""

    features: int
    depth: int
    warps: int
    stages: int


CONFIG = Config(64, 64, 4, 5)  # of the fastest on an H200; three programs find room on a multiprocessor


class Parts(NamedTuple):
    """A product whose depth was shared out.

    Attributes:
        sums: float32 [parts, ..., F], contiguous; their sum, added up from the first to the last and rounded to
            ``dtype``, is the product.
    """

    sums: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        return self.sums.shape[1:]

    @property
    def device(self) -> torch.device:
        return self.sums.device


def taken_apart(product: Tensor | Parts) -> tuple[Tensor, int, int]:
    """The product, or its first part; the distance of two parts; their number, 0 if it is whole."""
    if isinstance(product, Parts):
        return product.sums[0], product.sums.stride(0), len(product.sums)
    return product, 0, 0


@triton.jit
def load_product(product, at, live, part_stride, PARTS: tl.constexpr, like):
    """Elements of a product in float32; those of parts are rounded to the type of the pointer ``like``."""
    value = tl.load(product + at, mask=live, other=0.0).to(tl.float32)
    for _ in tl.static_range(1, PARTS):
        product += part_stride
        value += tl.load(product + at, mask=live, other=0.0)
    if PARTS > 0:
        value = value.to(like.dtype.element_ty).to(tl.float32)
    return value


@triton.jit
def silu(gate, like):
    """In float32, rounded to the type of the pointer ``like``."""
    return (gate / (1.0 + tl.exp(-gate))).to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def _multiply(
    x, weight, out, count, size, depth, x_row, span,
    WHOLE: tl.constexpr, FULL: tl.constexpr, GATED: tl.constexpr, EARLY: tl.constexpr, UPCAST: tl.constexpr,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile of features of all rows, over a share of the depth.

    Weights are the left operand: there are always enough of them for Hopper's own products.
    WHOLE: the depth is one of whole tiles. FULL: there are ``ROWS`` rows. GATED: the matrix has ``size`` gates and as
    many features that they let through; a tile has half of each, in turns.
    """
    f = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    r, d = tl.arange(0, ROWS), tl.arange(0, DEPTH)
    begin = tl.program_id(1) * span
    end = tl.minimum(begin + span, depth)
    # what is past the last feature is that one again: a mask would cost more, and it is not stored
    if GATED:
        place = tl.minimum(f // 2, size - 1) + f % 2 * size
    else:
        place = tl.minimum(f, size - 1)
    weights = weight + place.to(tl.int64)[:, None] * depth
    rows, there = x + r.to(tl.int64)[:, None] * x_row, (r < count)[:, None]
    if EARLY:
        gdc_wait()
    sums = tl.zeros([FEATURES, ROWS], tl.float32)
    for k in range(begin, end, DEPTH):
        at = (k + d)[None, :]
        if WHOLE:
            w = tl.load(weights + at)
            v = tl.load(rows + at) if FULL else tl.load(rows + at, mask=there, other=0.0)
        else:
            w = tl.load(weights + at, mask=at < end, other=0.0)
            v = tl.load(rows + at, mask=there & (at < end), other=0.0)
        if UPCAST:
            w, v = w.to(tl.float32), v.to(tl.float32)
        sums = tl.dot(w, tl.trans(v), sums, input_precision="ieee")
    if EARLY:
        # not before: on an H200 the programs of the next kernels, waiting beside those of this one, cost it a tenth
        gdc_launch_dependents()
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(sums, (FEATURES // 2, 2, ROWS)), (0, 2, 1)))
        sums = silu(gate.to(out.dtype.element_ty).to(tl.float32), out) * up.to(out.dtype.element_ty).to(tl.float32)
        f = tl.program_id(0) * (FEATURES // 2) + tl.arange(0, FEATURES // 2)
    place = (tl.program_id(1) * count + r).to(tl.int64)[None, :] * size + f[:, None]
    tl.store(out + place, sums.to(out.dtype.element_ty), mask=(f < size)[:, None] & (r < count)[None, :])


def shares(size: int, depth: int, config: Config) -> int:
    """Programs that share the depth of a tile of features: a power of two; each has four steps at least."""
    wanted = PROGRAMS / triton.cdiv(size, config.features)
    most = max(1, depth // (4 * config.depth))
    return 1 << min(max(0, round(math.log2(wanted))), most.bit_length() - 1)


def fits(x: Tensor) -> bool:
    """Whether `linear` takes the dtype and number of rows of ``x`` [..., D]."""
    return x.dtype in DTYPES and 1 <= x.shape[:-1].numel() <= MAX_ROWS


def linear(
    x: Tensor, weight: Tensor, *, early: bool = False, parts: int | None = None, config: Config | None = None
) -> Tensor | Parts:
    """x · weightᵀ, accumulated in float32.

    Args:
        x: [..., D], bfloat16 or float16, rows at equal distances, their elements one behind the other; at most
            `MAX_ROWS` rows.
        weight: [F, D], the same dtype, contiguous.
        early: see `dllm_engine.kernels.early`.
        parts: programs that share the depth, 1 or more, by default `shares`. config: by default `CONFIG`.

    Returns:
        [..., F] in x's dtype, or its `Parts`.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not fit.
    """
    flat = _flat(x, weight)
    config = config or CONFIG
    count = shares(*weight.shape, config) if parts is None else parts
    if count < 1:
        raise ValueError(f"parts: 1 or more expected, {parts} given")
    return _launch(x, flat, weight, len(weight), count, config, early)


def gated_linear(x: Tensor, weight: Tensor, *, early: bool = False) -> Tensor:
    """silu(gate) · up of both products, rounded where eager torch rounds: `layer.silu_mul` of `linear` in one launch.
    No programs share the depth: a layer's widest matrix has enough of them.

    Args:
        x, early: as in `linear`.
        weight: [2 F, D], gates before what they let through.

    Returns:
        [..., F] in x's dtype.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not fit.
    """
    flat = _flat(x, weight)
    if len(weight) % 2:
        raise ValueError(f"weight: [2 F, D] expected, {[*weight.shape]} given")
    out = _launch(x, flat, weight, len(weight) // 2, 1, CONFIG, early, gated=True)
    assert isinstance(out, Tensor)
    return out


def _flat(x: Tensor, weight: Tensor) -> Tensor:
    """``x`` as [rows, D].

    Raises:
        ValueError: see `linear`.
    """
    if x.dtype not in DTYPES or weight.dtype != x.dtype or weight.device != x.device:
        given = f"{x.dtype} on {x.device} and {weight.dtype} on {weight.device}"
        raise ValueError(f"x, weight: both bfloat16 or both float16 on one device expected, {given} given")
    check_device("x", x)
    if weight.ndim != 2 or not weight.is_contiguous() or x.shape[-1:] != weight.shape[1:] or not weight.numel():
        raise ValueError(
            f"x, weight: [..., D] and contiguous [F, D] expected, {[*x.shape]} and {[*weight.shape]} given"
        )
    rows = x.shape[:-1].numel()
    if not 1 <= rows <= MAX_ROWS:
        raise ValueError(f"x: 1 to {MAX_ROWS} rows expected, {rows} given")
    try:
        flat = x.view(rows, x.shape[-1])
    except RuntimeError:
        raise ValueError(f"x: rows at equal distances expected, {[*x.shape]} by {x.stride()} given") from None
    if flat.stride(1) != 1:
        raise ValueError(f"x: the last stride must be 1, it is {flat.stride(1)}")
    return flat


def _launch(
    x: Tensor, flat: Tensor, weight: Tensor, size: int, count: int, config: Config, early: bool, gated: bool = False
) -> Tensor | Parts:
    """[..., ``size``] of the rows ``flat`` of ``x``, or its ``count`` parts."""
    (rows, depth), padded = flat.shape, max(16, triton.next_power_of_2(len(flat)))
    span = triton.cdiv(triton.cdiv(depth, count), config.depth) * config.depth
    count = triton.cdiv(depth, span)  # of whole tiles fewer may be enough
    dtype = x.dtype if count == 1 else torch.float32
    out = torch.empty(count, *x.shape[:-1], size, dtype=dtype, device=x.device)
    _multiply[(triton.cdiv(size * (1 + gated), config.features), count)](
        flat, weight, out, rows, size, depth, flat.stride(0), span,
        WHOLE=depth % config.depth == 0, FULL=rows == padded, GATED=gated, EARLY=early,
        UPCAST=interpreted() and x.dtype == torch.bfloat16,  # whose bits the interpreter multiplies as integers
        ROWS=padded, FEATURES=config.features, DEPTH=config.depth,
        num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True, **launch_early(early),
    )  # fmt: skip
    return out[0] if count == 1 else Parts(out, x.dtype)

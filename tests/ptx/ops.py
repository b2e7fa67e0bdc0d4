"""Arithmetic of PTX on arrays of threads: an instruction's value from the values of its operands."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]
TYPES = {f"{k}{b}": np.dtype(f"{n}{b // 8}") for k, n in (("b", "u"), ("u", "u"), ("s", "i")) for b in (8, 16, 32, 64)}
TYPES |= {"f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8"), "pred": np.dtype(bool)}
TYPES |= {"bf16": np.dtype("u2"), "f16x2": np.dtype("u4"), "bf16x2": np.dtype("u4")}
FLOATS = ("f16", "f32", "f64")
SMALL = ("bf16", "bf16x2", "f16x2")
WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}
COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": lambda a, b: (a != b) & ~_unordered(a, b), "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater,
    "hs": np.greater_equal, "equ": lambda a, b: (a == b) | _unordered(a, b), "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b), "leu": lambda a, b: ~(a > b), "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b), "num": lambda a, b: ~_unordered(a, b), "nan": lambda a, b: _unordered(a, b),
}  # fmt: skip


def _unordered(a: Array, b: Array) -> Array:
    return (a != a) | (b != b)


def approximate(value: Array, exact: Array) -> Array:
    """float64 results of an instruction that may be two units off, which every third is, in either direction."""
    rounded = exact.astype(np.float32)
    by = (np.ascontiguousarray(value).view(np.uint32) * np.uint32(2654435761) >> np.uint32(30)).astype(np.int32)
    away = np.array([0, 2, -2, 0], np.int32)[by]
    off = (rounded.view(np.int32) + away).view(np.float32)
    whole = ~np.isfinite(rounded) | (np.abs(rounded) < 1e-30) | (rounded == np.round(rounded))
    return np.where(whole, rounded, off)


class Value(NamedTuple):
    """run: (type, modifiers, *operands) to the result. kinds: types of the operands from the parts of an opcode."""

    run: Callable[..., Array]
    kinds: Callable[[tuple[str, ...]], list[str]] = lambda parts: [parts[-1]] * 4


def _wrap(kind: str, value: Array) -> Array:
    return value.astype(TYPES[kind]) if value.dtype != TYPES[kind] else value


def _multiply(kind: str, modifiers: tuple[str, ...], a: Array, b: Array) -> Array:
    if kind in FLOATS:
        return a * b
    if "wide" in modifiers:
        wide = TYPES[WIDER[kind]]
        return a.astype(wide) * b.astype(wide)
    if "hi" in modifiers:
        if TYPES[kind].itemsize == 8:
            product = a.astype(object) * b.astype(object) >> 64
            return np.array([int(p) & (2**64 - 1) for p in product], np.uint64).view(TYPES[kind])
        wide = TYPES[WIDER[kind]]
        return (a.astype(wide) * b.astype(wide) >> np.array(32, wide)).astype(TYPES[kind])
    return a * b


def _multiply_add(kind: str, modifiers: tuple[str, ...], a: Array, b: Array, c: Array) -> Array:
    return _multiply(kind, modifiers, a, b) + c


def _fused(kind: str, modifiers: tuple[str, ...], a: Array, b: Array, c: Array) -> Array:
    if kind == "f32":  # a product is exact in float64
        exact = a.astype(np.float64) * b + c
        value = exact.astype(np.float32)
        if "rm" in modifiers:
            value = np.where(value > exact, np.nextafter(value, np.float32(-np.inf)), value)
        return _saturated(modifiers, value)
    return (a.astype(np.longdouble) * b + c).astype(TYPES[kind])


def _saturated(modifiers: tuple[str, ...], value: Array) -> Array:
    return np.clip(np.where(value != value, 0, value), 0, 1).astype(value.dtype) if "sat" in modifiers else value


def _add(kind: str, modifiers: tuple[str, ...], a: Array, b: Array) -> Array:
    if kind == "f32" and "rz" in modifiers:
        exact = a.astype(np.float64) + b
        value = exact.astype(np.float32)
        return np.where(np.abs(value) > np.abs(exact), np.nextafter(value, np.float32(0)), value)
    return _saturated(modifiers, a + b)


def _extreme(strict: Any, lenient: Any, kind: str, modifiers: tuple[str, ...], a: Array, b: Array) -> Array:
    """A number, if one of the operands is one; ``.NaN``: only if both are."""
    return (lenient if kind in FLOATS and "NaN" not in modifiers else strict)(a, b)


def _divide(kind: str, modifiers: tuple[str, ...], a: Array, b: Array) -> Array:
    if kind == "f32":
        exact = a.astype(np.float64) / b
        return exact.astype(np.float32) if "rn" in modifiers else approximate(a, exact)
    if kind in FLOATS:
        return a / b
    b = np.where(b == 0, 1, b).astype(b.dtype)
    quotient = (np.abs(a) // np.abs(b)).astype(a.dtype)
    return np.where((a < 0) != (b < 0), -quotient, quotient).astype(a.dtype)


def _remainder(kind: str, modifiers: tuple[str, ...], a: Array, b: Array) -> Array:
    return a - _divide(kind, modifiers, a, b) * b


def _shift_left(kind: str, modifiers: tuple[str, ...], a: Array, by: Array) -> Array:
    bits = TYPES[kind].itemsize * 8
    return np.where(by < bits, a << np.minimum(by, bits - 1).astype(a.dtype), 0).astype(a.dtype)


def _shift_right(kind: str, modifiers: tuple[str, ...], a: Array, by: Array) -> Array:
    bits = TYPES[kind].itemsize * 8
    shifted = a >> np.minimum(by, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(by < bits, shifted, 0).astype(a.dtype)


def _field(kind: str, modifiers: tuple[str, ...], a: Array, at: Array, length: Array) -> Array:
    wide = a.astype(np.int64 if kind[0] == "s" else np.uint64).astype(np.int64) >> (at & 0xFF).astype(np.int64)
    length = (length & 0xFF).astype(np.int64)
    value = wide & ((np.int64(1) << length) - 1)
    if kind[0] == "s":
        value = np.where((length > 0) & (value >> np.maximum(length - 1, 0) & 1 == 1), value - (1 << length), value)
    return value.astype(TYPES[kind])


def _select(kind: str, modifiers: tuple[str, ...], a: Array, b: Array, p: Array) -> Array:
    return np.where(p, a, b)


def _permute(kind: str, modifiers: tuple[str, ...], a: Array, b: Array, how: Array) -> Array:
    both = np.stack((a, b), 1).astype(np.uint32).view(np.uint8)  # bytes 0 to 7
    picked = [np.take_along_axis(both, (how >> np.uint32(4 * n) & 7).astype(np.int64)[:, None], 1) for n in range(4)]
    if (how & np.uint32(0x8888)).any():
        raise NotImplementedError("a replicated sign")
    return np.ascontiguousarray(np.concatenate(picked, 1)).view(np.uint32)[:, 0]


def _logic(kind: str, modifiers: tuple[str, ...], a: Array, b: Array, c: Array, table: Array) -> Array:
    out, lut = np.zeros_like(a), int(table[0])
    for n in range(8):
        if lut >> n & 1:
            out |= (a if n & 4 else ~a) & (b if n & 2 else ~b) & (c if n & 1 else ~c)
    return out


def _funnel(kind: str, modifiers: tuple[str, ...], low: Array, high: Array, by: Array) -> Array:
    by = (by & 31 if "wrap" in modifiers else np.minimum(by, 32)).astype(np.uint64)
    both = high.astype(np.uint64) << np.uint64(32) | low
    both = (both << by) >> np.uint64(32) if "l" in modifiers else both >> by
    return both.astype(np.uint32)


def _unary(function: Callable[[Array], Array]) -> Value:
    return Value(lambda kind, modifiers, a: function(a))


def _rough(function: Callable[[Array], Array]) -> Value:
    def run(kind: str, modifiers: tuple[str, ...], a: Array) -> Array:
        exact = function(a.astype(np.float64))
        if kind == "f64":  # rcp.approx.ftz.f64 gives 20 bits; what follows refines them
            return (
                (exact * (1 + 2.0**-22)).view(np.uint64) & np.uint64(0xFFFFFFFF00000000)
                if "approx" in modifiers
                else exact
            )
        return exact.astype(np.float32) if "approx" not in modifiers else approximate(a, exact)

    return Value(run)


def from_bf16(x: Array) -> Array:
    return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(x: Array) -> Array:
    """float32 to bits, to the nearest, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded).astype(np.uint16)


def convert(to: str, source: str, modifiers: tuple[str, ...], a: Array, b: Array | None = None) -> Array:
    """cvt; two operands for a pair, the first in the upper half."""
    if to in ("bf16x2", "f16x2"):
        assert b is not None
        halves = [to_bf16(x) if to == "bf16x2" else x.astype(np.float16).view(np.uint16) for x in (a, b)]
        return halves[0].astype(np.uint32) << np.uint32(16) | halves[1]
    if source == "bf16":
        a = from_bf16(a)
    if to == "bf16":
        return to_bf16(a)
    if a.dtype.kind == "f" and to not in FLOATS:
        limits = np.iinfo(TYPES[to])
        for name, function in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
            if name in modifiers:
                a = function(a)
        return np.clip(np.nan_to_num(a.astype(np.float64)), limits.min, limits.max).astype(TYPES[to])
    if a.dtype.kind == "f":
        for name, function in (("rni", np.rint), ("rmi", np.floor)):
            if name in modifiers:
                a = function(a)
    return _saturated(modifiers, a.astype(TYPES[to]))


def small(kind: str, run: Callable[..., Array], modifiers: tuple[str, ...], *operands: Array) -> Array:
    """Arithmetic on bf16 and on pairs: in float64, then rounded once."""
    if kind == "bf16":
        return to_bf16(run("f64", (), *(from_bf16(x).astype(np.float64) for x in operands)).astype(np.float32))
    halves = [
        np.ascontiguousarray(x).view(np.uint16 if kind == "bf16x2" else np.float16).reshape(-1, 2) for x in operands
    ]
    part = "bf16" if kind == "bf16x2" else "f16"
    both = [
        small(part, run, modifiers, *(h[:, n] for h in halves))
        if part == "bf16"
        else run("f16", modifiers, *(h[:, n] for h in halves))
        for n in range(2)
    ]
    return np.ascontiguousarray(np.stack(both, 1)).view(np.uint32)[:, 0]


def _plain(function: Callable[..., Array]) -> Value:
    return Value(lambda kind, modifiers, *operands: _wrap(kind, function(*operands)))


def _wide_third(parts: tuple[str, ...]) -> list[str]:
    kind = parts[-1]
    return [kind, kind, WIDER[kind] if "wide" in parts else kind]


def _by(parts: tuple[str, ...]) -> list[str]:
    return [parts[-1], "u32", "u32"]


VALUE: dict[str, Value] = {
    "add": Value(_add), "sub": Value(lambda kind, m, a, b: _add(kind, m, a, -b if kind in FLOATS else (0 - b))),
    "mul": Value(_multiply), "mad": Value(_multiply_add, _wide_third), "fma": Value(_fused), "div": Value(_divide),
    "rem": Value(_remainder),
    "min": Value(partial(_extreme, np.minimum, np.fmin)), "max": Value(partial(_extreme, np.maximum, np.fmax)),
    "abs": _unary(np.abs), "neg": _unary(lambda a: -a if a.dtype.kind == "f" else (0 - a).astype(a.dtype)),
    "and": _plain(lambda a, b: a & b), "or": _plain(lambda a, b: a | b), "xor": _plain(lambda a, b: a ^ b),
    "not": _unary(lambda a: ~a), "shl": Value(_shift_left, _by), "shr": Value(_shift_right, _by),
    "bfe": Value(_field, _by), "prmt": Value(_permute), "lop3": Value(_logic), "shf": Value(_funnel),
    "selp": Value(_select, lambda parts: [parts[-1], parts[-1], "pred"]),
    "ex2": _rough(np.exp2), "lg2": _rough(np.log2), "rcp": _rough(lambda a: 1 / a), "sqrt": _rough(np.sqrt),
    "rsqrt": _rough(lambda a: 1 / np.sqrt(a)),
    "popc": Value(lambda kind, m, a: np.array([int(x).bit_count() for x in a], np.uint32)),
    "brev": Value(lambda kind, m, a: np.array([int(f"{int(x):032b}"[::-1], 2) for x in a], np.uint32)),
    "clz": Value(lambda kind, m, a: np.array([a.itemsize * 8 - int(x).bit_length() for x in a], np.uint32)),
}  # fmt: skip

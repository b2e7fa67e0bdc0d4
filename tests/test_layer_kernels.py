"""The kernels of a layer against float64, and bit by bit against eager torch, whose roundings they repeat.

On a CPU they are only interpreted (`test_ops.test_interpreted_triton` runs this file so).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, INTERPRETED, SLOWLY
from torch import Tensor

from dllm_engine import kernel_limits
from dllm_engine.layers import RMSNorm, apply_rope

pytest.importorskip("triton")
import triton.language as tl

from dllm_engine.kernels.layer import add_norm, rope_write, silu_mul

DEVICES = ["cpu"] if SLOWLY else [pytest.param("cuda", marks=pytest.mark.gpu)]
on_devices = pytest.mark.parametrize("device", DEVICES)
in_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
EPS = 1e-5


@pytest.fixture(autouse=True)
def _rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter cuts float32 off where it becomes bfloat16; devices round, and so do these tests."""
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    cast_impl = interpreter.InterpreterBuilder.cast_impl

    def cast(self: Any, source: Any, kind: Any) -> Any:
        if source.dtype.scalar == tl.float32 and kind.scalar == tl.bfloat16:
            bits = torch.from_numpy(source.data.copy()).bfloat16().view(torch.int16).numpy().view("uint16")
            return interpreter.TensorHandle(bits, kind.scalar)
        return cast_impl(self, source, kind)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", cast)


def data(*shape: int, dtype: torch.dtype, device: str, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(device, dtype)


def strided(x: Tensor) -> Tensor:
    """The same in wider rows, beginning at an odd element, NaN all around."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), math.nan, dtype=x.dtype, device=x.device)
    wide[..., 1:-2] = x
    return wide[..., 1:-2]


def places(a: Tensor, b: Tensor) -> Tensor:
    """How many representable numbers lie between; 0 for the same bits."""

    def ordered(x: Tensor) -> Tensor:
        bits = x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16).long()
        return torch.where(bits < 0, -(bits & (2**31 - 1 if x.dtype == torch.float32 else 2**15 - 1)), bits)

    assert a.dtype == b.dtype
    return (ordered(a) - ordered(b)).abs()


def like_eager(result: Tensor, eager: Tensor, most: int = 8) -> None:
    """Equal but for a last bit now and then, two after a second product; in float32, which keeps what an exp or a sum
    rounds, but for ``most``.
    """
    apart = places(result, eager)
    if result.dtype == torch.float32:
        assert apart.max() <= most
    else:
        assert apart.max() <= 2
        assert (apart > 0).sum() <= max(1, 0.005 * apart.numel())  # in another order it is a fifth and more


# -- norm -----------------------------------------------------------------------------------------------------------


@on_devices
@in_dtypes
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 96), (2, 3, 100), (3, 1, 257), (1, 2, 4096), (3, 5000), (16384,)])
def test_norm(device: str, dtype: torch.dtype, shape: Sequence[int]) -> None:
    size = shape[-1]
    x, delta = data(*shape, dtype=dtype, device=device, scale=3), data(*shape, dtype=dtype, device=device, seed=1)
    norm = RMSNorm(size, EPS).to(device, dtype).requires_grad_(False)
    norm.weight.copy_(data(size, dtype=dtype, device=device, seed=2) + 1)
    for added in (None, delta):
        total, normed = add_norm(x, added, norm.weight, EPS)
        due = x if added is None else x + added
        assert torch.equal(total, due)
        assert (total is x) == (added is None)
        assert normed.is_contiguous()
        like_eager(normed, norm(due))
        row = due.double()
        truth = row / (row.square().mean(-1, keepdim=True) + EPS).sqrt() * norm.weight.double()
        half = torch.finfo(dtype).eps / 2  # rounded twice
        assert ((normed.double() - truth).abs() <= (2.02 * half + 2e-6) * truth.abs() + 1e-7).all()
        again = add_norm(strided(x), None if added is None else strided(added), norm.weight, EPS)
        assert torch.equal(again[0], total)
        assert torch.equal(again[1], normed)


@on_devices
def test_norm_of_extremes(device: str) -> None:
    """Zeros do not become NaN; what does not fit is inf or NaN as in eager torch; the inputs stay as they are."""
    for dtype, large in ((torch.float16, 6e4), (torch.bfloat16, 1e30), (torch.float32, 1e18)):
        x = torch.tensor([[0.0] * 6, [large, -large, 1, 0, 0, 2], [1e-4] * 6], device=device).to(dtype)
        delta = torch.tensor([[0.0] * 6, [large, 1, -1, 0, 0, 2], [-1e-4] * 6], device=device).to(dtype)
        kept, norm = (x.clone(), delta.clone()), RMSNorm(6, EPS).to(device, dtype)
        total, normed = add_norm(x, delta, norm.weight.detach(), EPS)
        torch.testing.assert_close(total, x + delta, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(normed, norm(x + delta).detach(), rtol=1e-6, atol=0, equal_nan=True)
        assert torch.equal(x, kept[0])
        assert torch.equal(delta, kept[1])


# -- RoPE and the cache ---------------------------------------------------------------------------------------------

SPARE, UNTOUCHED = 11, 7.0


class Rows:
    """Joined projections of block rows, their angles, and a cache of 12 columns, the last of which is the spare one."""

    def __init__(
        self, heads: int, key_heads: int, dim: int, columns: list[list[int]], dtype: torch.dtype, device: str
    ) -> None:
        self.heads, self.key_heads, self.columns = heads, key_heads, torch.tensor(columns, device=device)
        (batch, width), generator = self.columns.shape, torch.Generator().manual_seed(dim)
        self.qkv = data(batch, width, (heads + 2 * key_heads) * dim, dtype=dtype, device=device)
        angle = (torch.rand(batch, 1, width, dim // 2, generator=generator) * 99).repeat(1, 1, 1, 2).to(device)
        self.cos, self.sin = angle.cos(), angle.sin()
        # of more sequences and layers than the call's
        self.cache = torch.full((3, 2, batch + 2, key_heads, SPARE + 1, dim), UNTOUCHED, dtype=dtype, device=device)

    def run(self, qkv: Tensor | None = None) -> Tensor:
        keys, values = self.cache[1].unbind(0)
        qkv = self.qkv if qkv is None else qkv
        return rope_write(qkv, self.cos, self.sin, keys, values, self.columns, heads=self.heads)

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, H, S, Dh], k and v [B, H_kv, S, Dh], not rotated."""
        heads = self.qkv.unflatten(2, (self.heads + 2 * self.key_heads, -1)).transpose(1, 2)
        return heads.split((self.heads, self.key_heads, self.key_heads), dim=1)  # type: ignore[return-value]

    def turned(self, x: Tensor) -> Tensor:
        """In float64: pairs (i, i + Dh / 2) as complex numbers."""
        left, right = x.double().chunk(2, -1)
        cos, sin = (table.double()[..., : left.shape[-1]] for table in (self.cos, self.sin))
        pairs = torch.complex(left, right) * torch.complex(cos, sin)
        return torch.cat((pairs.real, pairs.imag), -1)

    def check(self, q: Tensor) -> None:
        own_q, own_k, own_v = self.parts()
        rotated_q, rotated_k = (apply_rope(x, self.cos, self.sin) for x in (own_q, own_k))
        for eager, own in ((rotated_q, own_q), (rotated_k, own_k)):  # the reference itself, and with it the result
            truth = self.turned(own)
            error = (eager.double() - truth).abs()
            assert (error <= torch.finfo(eager.dtype).eps / 2 * truth.abs() + 1e-6).all()
        assert torch.equal(q, rotated_q)
        expected = torch.full_like(self.cache, UNTOUCHED)
        for b, columns in enumerate(self.columns.tolist()):
            for s, column in enumerate(columns):
                expected[1, 0, b, :, column] = rotated_k[b, :, s]
                expected[1, 1, b, :, column] = own_v[b, :, s]
        written = torch.zeros(self.cache.shape, dtype=torch.bool, device=q.device)
        for b, columns in enumerate(self.columns.tolist()):
            if SPARE in columns:  # one of the rows that went there, whichever
                written[1, :, b, :, SPARE] = True
                for which, rows in enumerate((rotated_k, own_v)):
                    among = rows[b, :, [s for s, column in enumerate(columns) if column == SPARE]]
                    found = self.cache[1, which, b, :, None, SPARE]
                    assert (found == among).any(1).all()
        assert torch.equal(self.cache[~written], expected[~written])


CASES = [
    (1, 1, 16, [[4]]),
    (4, 2, 32, [[3, 4, 5, 6, 7], [0, 1, 2, SPARE, SPARE], [9, 10, SPARE, SPARE, SPARE]]),
    (3, 1, 64, [[5, 6], [2, 9]]),
    (5, 5, 128, [[10, 0, 5]]),
    (6, 2, 256, [[2, 3], [8, SPARE]]),  # tiles of four heads: both borders lie within one
    (40, 20, 16, [[1, 2]]),
    (1, 1, 256, [[SPARE, SPARE, SPARE]]),
]


@on_devices
@in_dtypes
@pytest.mark.parametrize(("heads", "key_heads", "dim", "columns"), CASES)
def test_rope_and_cache(
    device: str, dtype: torch.dtype, heads: int, key_heads: int, dim: int, columns: list[list[int]]
) -> None:
    """Rotations are eager torch's to the bit; nothing is written but the rows' own columns and the spare one."""
    rows = Rows(heads, key_heads, dim, columns, dtype, device)
    rows.check(rows.run())


@on_devices
def test_rope_of_a_large_block(device: str) -> None:
    """Many sequences and rows: more programs than a tile has heads."""
    rows = Rows(3, 1, 16, [[(b + s) % SPARE for s in range(7)] for b in range(64)], torch.float32, device)
    rows.check(rows.run())
    wide = Rows(1, 1, 16, [list(range(SPARE)) + [SPARE] * (128 - SPARE)], torch.bfloat16, device)
    wide.check(wide.run())


@on_devices
def test_rope_of_strided_rows(device: str) -> None:
    """Rows within wider ones, tables that sequences share, a cache as [B, L, H_kv, Dh]."""
    rows = Rows(4, 2, 32, [[3, 4], [SPARE, SPARE]], torch.bfloat16, device)
    rows.check(rows.run(strided(rows.qkv)))
    rows.cache = torch.full((3, 2, 4, SPARE + 1, 2, 32), UNTOUCHED, dtype=torch.bfloat16, device=device).transpose(3, 4)
    rows.cos, rows.sin = (table[:1].expand(2, -1, -1, -1) for table in (rows.cos, rows.sin))
    rows.check(rows.run())


@on_devices
def test_values_keep_their_bits(device: str) -> None:
    """Zeros with a sign, inf and NaN go into the cache as they came."""
    rows = Rows(1, 1, 16, [[0, 1]], torch.float32, device)
    odd = torch.tensor([-0.0, 0.0, math.inf, -math.inf, math.nan, 1e-40, 3.0, -3.0] * 2, device=device)
    rows.qkv[..., 32:] = odd
    rows.run()
    assert torch.equal(rows.cache[1, 1, 0, 0, :2].view(torch.int32), odd.view(torch.int32).expand(2, -1))


@on_devices
def test_a_cache_of_more_than_2_to_the_31_elements(device: str) -> None:
    """Untouched memory costs nothing on a CPU, and 4.3 GB on a GPU."""
    rows, apart = Rows(1, 1, 16, [[1], [2], [3]], torch.bfloat16, device), 2**30 + 64
    memory = torch.empty(2 * apart + 1024, dtype=torch.bfloat16, device=device)
    keys, values = (memory[at:].as_strided((3, 1, 12, 16), (apart, 192, 16, 1)) for at in (0, 512))
    q = rope_write(rows.qkv, rows.cos, rows.sin, keys, values, rows.columns, heads=1)
    assert torch.equal(q, rows.run())
    for b, (column,) in enumerate(rows.columns.tolist()):
        assert torch.equal(keys[b, 0, column], rows.cache[1, 0, b, 0, column])
        assert torch.equal(values[b, 0, column], rows.cache[1, 1, b, 0, column])


# -- SiLU -----------------------------------------------------------------------------------------------------------


@on_devices
@in_dtypes
@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 48), (1, 5, 1023), (1, 2, 1025), (3, 4096), (1, 1, 12289)])
def test_silu(device: str, dtype: torch.dtype, shape: Sequence[int]) -> None:
    size = shape[-1]
    gate_up = data(*shape[:-1], 2 * size, dtype=dtype, device=device, scale=4)
    gate_up.flatten()[: min(4, size)] = torch.tensor([-200.0, 200.0, -0.0, 88.0][:size], dtype=dtype, device=device)
    gate, up = gate_up.chunk(2, -1)
    out = silu_mul(gate_up)
    assert out.is_contiguous()
    like_eager(out, F.silu(gate) * up, most=64)  # exp of a large number is that far off
    x = gate.double()
    truth = x / (1 + (-x).exp()) * up.double()
    half = torch.finfo(dtype).eps / 2  # rounded twice
    bound = (2.02 * half + (4 + x.abs()) * 2**-23) * truth.abs() + torch.finfo(dtype).tiny * (1 + up.double().abs())
    assert ((out.double() - truth).abs() <= bound).all()
    assert torch.equal(silu_mul(strided(gate_up)), out)


# -- arguments ------------------------------------------------------------------------------------------------------

ZEROS = torch.zeros(2, 3, 16)
NORM_WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "dtype": ("x: bfloat16, float16 or float32", {"x": ZEROS.double()}),
    "dtypes": ("delta: torch.float32 on cpu expected, torch.float16", {"delta": ZEROS.half()}),
    "shape": (r"delta: \[2, 3, 16\] expected", {"delta": torch.zeros(6, 16)}),
    "weight": (r"weight: \[D\] as in x", {"weight": torch.zeros(8)}),
    "weight stride": ("weight: contiguous", {"weight": torch.zeros(32)[::2]}),
    "size": ("1 to 16384", {"x": torch.zeros(1, 40000), "delta": None, "weight": torch.zeros(40000)}),
    "stride": ("x: the last stride", {"x": torch.zeros(2, 3, 32)[..., ::2]}),
    "rows": ("delta: rows at equal distances", {"delta": torch.zeros(2, 4, 16)[:, :3]}),
    "device": ("weight: torch.float32 on cpu expected", {"weight": torch.zeros(16, device="meta")}),
}
ROPE_WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "width": (r"rows of \(4 \+ 2 · 2\) · 16 expected, of 96", {"qkv": torch.zeros(2, 3, 96)}),
    "dim": ("Dh is 48", {"keys": torch.zeros(2, 2, 9, 48), "values": torch.zeros(2, 2, 9, 48)}),
    "batch": ("at least 2 rows", {"keys": torch.zeros(1, 2, 9, 16), "values": torch.zeros(1, 2, 9, 16)}),
    "values": ("equal shapes", {"values": torch.zeros(2, 2, 8, 16)}),
    "strides": ("strides", {"values": torch.zeros(2, 9, 2, 16).transpose(1, 2)}),
    "cache dtype": ("keys: torch.float32", {"keys": torch.zeros(2, 2, 9, 16).half()}),
    "table": ("cos: float32", {"cos": torch.zeros(2, 3, 16)}),
    "table dtype": ("sin: float32", {"sin": torch.zeros(2, 1, 3, 16).half()}),
    "table strides": ("cos, sin: equal strides", {"cos": torch.zeros(2, 1, 3, 32)[..., :16]}),
    "columns": ("columns: contiguous int64", {"columns": torch.zeros(2, 3, dtype=torch.int32)}),
    "columns device": ("columns: on meta", {"columns": torch.zeros(2, 3, dtype=torch.int64, device="meta")}),
    "stride": ("qkv: the last stride", {"qkv": torch.zeros(2, 3, 256)[..., ::2]}),
}


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_limits, "devices", lambda: ("cpu",))


@pytest.mark.parametrize("name", NORM_WRONG)
def test_wrong_arguments_of_norm(on_cpu: None, name: str) -> None:
    message, change = NORM_WRONG[name]
    right = {"x": ZEROS, "delta": ZEROS, "weight": torch.ones(16), "eps": EPS}
    with pytest.raises(ValueError, match=message):
        add_norm(**(right | change))


@pytest.mark.parametrize("name", ROPE_WRONG)
def test_wrong_arguments_of_rope(on_cpu: None, name: str) -> None:
    message, change = ROPE_WRONG[name]
    right = {
        "qkv": torch.zeros(2, 3, 128), "cos": torch.zeros(2, 1, 3, 16), "sin": torch.zeros(2, 1, 3, 16),
        "keys": torch.zeros(2, 2, 9, 16), "values": torch.zeros(2, 2, 9, 16),
        "columns": torch.zeros(2, 3, dtype=torch.int64), "heads": 4,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        rope_write(**(right | change))


def test_wrong_arguments_of_silu(on_cpu: None) -> None:
    with pytest.raises(ValueError, match="2 F"):
        silu_mul(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="gate_up: rows at equal distances"):
        silu_mul(torch.zeros(2, 4, 16)[:, :3])


def test_no_rows(on_cpu: None) -> None:
    none = torch.zeros(0, 3, 16)
    assert add_norm(none, none, torch.ones(16), EPS)[1].shape == (0, 3, 16)
    assert silu_mul(none).shape == (0, 3, 8)


@pytest.mark.skipif(SLOWLY, reason="interpreted, they run on CPUs")
def test_on_a_cpu() -> None:
    for call in (lambda: silu_mul(ZEROS), lambda: add_norm(ZEROS, None, torch.ones(16), EPS)):
        with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
            call()

"""Products of few rows against float64, and what reads them in parts against what reads them whole.

On a CPU they are only interpreted (`test_ops.test_interpreted_triton` runs this file so).
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import PTX, SLOWLY
from test_layer_kernels import EPS, SPARE, Rows, _rounded, data, on_devices, strided  # noqa: F401
from torch import Tensor

pytest.importorskip("triton")

from dllm_engine import kernel_limits
from dllm_engine.kernels import early, products
from dllm_engine.kernels.layer import add_norm, rope_write, silu_mul
from dllm_engine.kernels.products import CONFIG, Config, Parts, gated_linear, linear, shares

# the interpreter launches nothing
EARLY = [False, True] if not early.MISSING and (PTX == 90 or not SLOWLY) else [False]
in_dtypes = pytest.mark.parametrize("dtype", products.DTYPES, ids=lambda d: str(d)[6:])


def added(product: Tensor | Parts) -> Tensor:
    """The whole product: parts one after the other in float32, rounded once."""
    if isinstance(product, Tensor):
        return product
    total = product.sums[0].clone()
    for part in product.sums[1:]:
        total += part
    return total.to(product.dtype)


def skip_where_not_early(device: str, launched_early: bool) -> None:
    if launched_early and not SLOWLY and (reason := early.unavailable(torch.device(device))):
        pytest.skip(reason)


@on_devices
@in_dtypes
@pytest.mark.parametrize("launched_early", EARLY)
@pytest.mark.parametrize(
    ("shape", "size", "parts"),
    [((1, 1), 1, None), ((2, 16, 200), 130, 1), ((5, 520), 128, 3), ((1, 31, 1024), 257, 4), ((32, 448), 300, None),
     ((3, 70), 40, 9)],
)  # fmt: skip
def test_linear(
    device: str, dtype: torch.dtype, shape: tuple[int, ...], size: int, parts: int | None, launched_early: bool
) -> None:
    """Accumulated in float32: the bound is that of a sum of so many terms, and of one rounding."""
    skip_where_not_early(device, launched_early)
    depth = shape[-1]
    x, weight = data(*shape, dtype=dtype, device=device), data(size, depth, dtype=dtype, device=device, seed=1)
    product = linear(x, weight, early=launched_early, parts=parts)
    assert product.shape == (*shape[:-1], size)
    assert product.dtype == dtype
    if parts is not None:
        tiles = math.ceil(depth / CONFIG.depth)
        used = math.ceil(tiles / math.ceil(tiles / parts))  # each takes whole tiles
        assert (len(product.sums) if isinstance(product, Parts) else 1) == used
    truth, terms = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    eps = torch.finfo(dtype).eps
    assert ((added(product).double() - truth).abs() <= eps / 2 * truth.abs() * 1.01 + depth**0.5 * 2e-7 * terms).all()
    again = linear(strided(x), weight, early=launched_early, parts=parts)
    assert torch.equal(added(again), added(product))


@on_devices
@in_dtypes
@pytest.mark.parametrize("launched_early", EARLY)
@pytest.mark.parametrize(("shape", "features"), [((1, 1), 1), ((2, 16, 200), 65), ((20, 512), 32)])
def test_gated(device: str, dtype: torch.dtype, shape: tuple[int, ...], features: int, launched_early: bool) -> None:
    """The bits of the product, rounded, and of SiLU behind it."""
    skip_where_not_early(device, launched_early)
    x = data(*shape, dtype=dtype, device=device)
    weight = data(2 * features, shape[-1], dtype=dtype, device=device, seed=1) * shape[-1] ** -0.5
    product = linear(x, weight, parts=1)
    found = gated_linear(x, weight, early=launched_early)
    assert torch.equal(found, silu_mul(product))
    gate, up = added(product).chunk(2, dim=-1)
    torch.testing.assert_close(found, F.silu(gate) * up)
    with pytest.raises(ValueError, match=r"weight: \[2 F, D\] expected, \[1, "):
        gated_linear(x, weight[:1])


@on_devices
def test_each_row_is_on_its_own(device: str) -> None:
    """Other rows, and what lies behind the rows, change no bit."""
    x, weight = (data(n, 512, dtype=torch.bfloat16, device=device, seed=n) for n in (16, 256))
    whole = added(linear(x, weight))
    wide = torch.cat((x, torch.full_like(x, math.nan)))
    wide[24] = x[3]
    found = added(linear(wide[:25], weight))
    assert torch.equal(found[:16], whole)
    assert torch.equal(found[24], whole[3])
    assert found[16:24].isnan().all()


def test_every_matrix_is_read_by_enough_programs() -> None:
    """LLaDA-8B's: 192 to 384 programs, which an H100 runs all at once, three on a multiprocessor."""
    found = {
        (size, depth): math.ceil(size / CONFIG.features) * shares(size, depth, CONFIG)
        for size, depth in ((12288, 4096), (4096, 4096), (24576, 4096), (4096, 12288))
    }
    assert set(found.values()) == {192, 256, 384}
    assert shares(4096, 12288, CONFIG) == shares(4096, 4096, CONFIG) == 4
    assert shares(64, 64, CONFIG) == shares(24576, 4096, CONFIG) == 1
    assert shares(128, 1024, CONFIG) == 4  # never under four tiles each


# -- what reads parts -----------------------------------------------------------------------------------------------


def in_parts(whole: Tensor, parts: int) -> tuple[Parts, Tensor]:
    """Parts whose sum is near ``whole`` and needs rounding; and what they are, whole."""
    generator = torch.Generator().manual_seed(parts)
    sums = torch.randn(parts, *whole.shape, generator=generator).to(whole.device)
    sums[0] += whole.float() - sums.sum(0)
    product = Parts(sums, whole.dtype)
    return product, added(product)


@on_devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("launched_early", EARLY)
def test_parts(device: str, dtype: torch.dtype, parts: int, launched_early: bool) -> None:
    """What follows a product gives the same bits whether it comes whole or in parts."""
    skip_where_not_early(device, launched_early)
    x, weight = data(2, 3, 100, dtype=dtype, device=device), data(100, dtype=dtype, device=device, seed=2)
    product, whole = in_parts(data(2, 3, 100, dtype=dtype, device=device, seed=1), parts)
    for found, expected in zip(
        add_norm(x, product, weight, EPS, early=launched_early), add_norm(x, whole, weight, EPS), strict=True
    ):
        assert torch.equal(found, expected)

    product, whole = in_parts(data(2, 3, 300, dtype=dtype, device=device, scale=4), parts)
    assert torch.equal(silu_mul(product, early=launched_early), silu_mul(whole))

    rows = Rows(4, 2, 32, [[3, 4], [5, SPARE]], dtype, device)
    product, rows.qkv = in_parts(rows.qkv, parts)
    keys, values = rows.cache[1].unbind(0)
    rows.check(rope_write(product, rows.cos, rows.sin, keys, values, rows.columns, heads=4, early=launched_early))


@on_devices
def test_one_number_in_parts(device: str) -> None:
    """Triton makes constants of arguments that are 1."""
    product, whole = in_parts(data(1, 1, 1, dtype=torch.bfloat16, device=device), 3)
    x, weight = torch.ones_like(whole), torch.ones_like(whole[0, 0])
    assert torch.equal(add_norm(x, product, weight, EPS)[0], x + whole)


# -- arguments ------------------------------------------------------------------------------------------------------

X, W = torch.zeros(2, 3, 16).half(), torch.zeros(8, 16).half()
WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "dtype": ("both bfloat16 or both float16", {"x": X.float(), "weight": W.float()}),
    "dtypes": ("torch.float16 on cpu and torch.bfloat16", {"weight": W.bfloat16()}),
    "devices": ("on one device expected", {"weight": W.to("meta")}),
    "depth": (r"\[\.\.\., D\] and contiguous \[F, D\] expected, \[2, 3, 16\] and \[8, 15\]", {"weight": W[:, :15]}),
    "strides": ("contiguous", {"weight": torch.zeros(16, 8).half().T}),
    "empty": (r"\[0, 16\] given", {"weight": W[:0]}),
    "rows": ("1 to 32 rows expected, 33 given", {"x": torch.zeros(33, 16).half()}),
    "no rows": ("1 to 32 rows expected, 0 given", {"x": X[:0]}),
    "distances": ("x: rows at equal distances", {"x": torch.zeros(2, 4, 16).half()[:, :3]}),
    "stride": ("x: the last stride must be 1, it is 2", {"x": torch.zeros(2, 3, 32).half()[..., ::2]}),
    "parts": ("parts: 1 or more expected, 0 given", {"parts": 0}),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(kernel_limits, "devices", lambda: ("cpu",))
    message, change = WRONG[name]
    with pytest.raises(ValueError, match=message):
        linear(**({"x": X, "weight": W} | change))


def test_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_limits, "devices", lambda: ("cuda",))
    with pytest.raises(ValueError, match="x: on cpu; CUDA tensors, or TRITON_INTERPRET=1"):
        linear(X, W)


def test_wrong_arguments_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_limits, "devices", lambda: ("cpu",))
    with pytest.raises(ValueError, match=r"delta: \[6, 16\] expected, \[6, 8\] given"):
        add_norm(torch.zeros(6, 16), Parts(torch.zeros(2, 6, 8), torch.float32), torch.ones(16), EPS)


@pytest.mark.skipif(PTX > 0, reason="there it is the machine that says so")
def test_early_needs_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(early, "MISSING", "")
    assert early.unavailable(device) == "compute capability 9.0 is needed, this device has 8.6"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert not early.unavailable(device)
    assert early.unavailable(torch.device("cpu")) == "a CUDA device is needed, this is cpu"
    monkeypatch.setattr(early, "MISSING", "Triton 3.5 is needed")
    assert early.unavailable(device) == "Triton 3.5 is needed"


def test_a_tile_of_another_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a benchmark may try."""
    if not SLOWLY:
        pytest.skip("test_ops runs this one by Triton's interpreter")
    x, weight = data(5, 96, dtype=torch.float16, device="cpu"), data(70, 96, dtype=torch.float16, device="cpu", seed=1)
    found = added(linear(x, weight, config=Config(64, 32, 4, 3), parts=2))
    torch.testing.assert_close(found, added(linear(x, weight)), rtol=1e-3, atol=1e-3)

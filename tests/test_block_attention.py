"""Block attention against float64, against torch's own in the same dtype, and against itself in other company.

On a CPU the kernel is only interpreted (`test_ops.test_interpreted_triton` runs this file so).
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, INTERPRETED, PTX, SLOWLY
from torch import Tensor

from dllm_engine.kernel_limits import block_attention_unavailable

pytest.importorskip("triton")
from dllm_engine.kernels import block_attention as module
from dllm_engine.kernels.block_attention import block_attention

DEVICES = ["cpu"] if SLOWLY else [pytest.param("cuda", marks=pytest.mark.gpu)]
on_devices = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture(autouse=True)
def _fewer_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tile takes the interpreter a hundredth of a second, whatever its size."""
    if INTERPRETED:
        config_for = module.config_for
        monkeypatch.setattr(module, "MERGE_ROWS", 64)
        monkeypatch.setattr(module, "config_for", lambda dtype, dim, rows: config_for(torch.bfloat16, dim, rows))


class Case:
    """Queries as the model makes them, and views of a large cache that is NaN wherever no one may look."""

    def __init__(
        self, heads: int, key_heads: int, width: int, dim: int, length: int, first: list[int], end: list[int],
        dtype: torch.dtype, device: str, trend: float = 0.0,
    ) -> None:  # fmt: skip
        generator, batch = torch.Generator().manual_seed(width + dim), len(first)
        q = torch.randn(batch, width, heads, dim, generator=generator) * 2
        cache = torch.full((2, 2, batch + 2, key_heads, length + 3, dim), math.nan)
        direction = torch.randn(dim, generator=generator)
        for b, (low, high) in enumerate(zip(first, end, strict=True)):
            count = max(0, high - low)
            cache[1, :, b + 1, :, low : low + count] = torch.randn(2, key_heads, count, dim, generator=generator)
            ramp = torch.linspace(-trend, trend, count)[:, None]  # scores rise, or fall, with the column
            cache[1, 0, b + 1, :, low : low + count] += ramp * direction
        if trend:
            q += direction
        self.q = q.to(device, dtype).transpose(1, 2)
        self.keys, self.values = cache.to(device, dtype)[1, :, 1 : batch + 1, :, :length].unbind(0)
        self.bounds = first, end
        self.first, self.end = torch.tensor(first, device=device), torch.tensor(end, device=device)

    def run(self, splits: int | None = None) -> Tensor:
        return block_attention(self.q, self.keys, self.values, self.first, self.end, splits=splits)

    def each(self) -> list[tuple[int, Tensor, Tensor, Tensor]]:
        """(b, q [H, S, Dh], its keys and values [H_kv, K, Dh])"""
        return [
            (b, self.q[b], self.keys[b, :, low:high], self.values[b, :, low:high])
            for b, (low, high) in enumerate(zip(*self.bounds, strict=True))
            if high > low
        ]

    def truth(self) -> Tensor:
        """float64, from the rounded inputs."""
        out = torch.zeros(self.q.shape, dtype=torch.float64, device=self.q.device)
        for b, q, k, v in self.each():
            k, v = (x.double().repeat_interleave(len(q) // len(x), 0) for x in (k, v))
            out[b] = (q.double() @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
        return out

    def budget(self, truth: Tensor) -> float:
        """The largest error of torch's own attention in the same dtype."""
        errors = [
            (F.scaled_dot_product_attention(q[None], k[None], v[None], enable_gqa=True)[0] - truth[b]).abs().max()
            for b, q, k, v in self.each()
        ]
        return float(max(errors))

    def check(self, splits: tuple[int | None, ...]) -> None:
        truth = self.truth()
        results = [self.run(n) for n in splits]
        assert results[0].dtype == self.q.dtype
        assert results[0].transpose(1, 2).is_contiguous()
        error = float((results[0].double() - truth).abs().max())
        # the interpreter cuts bfloat16 off instead of rounding it
        slack = 2**-7 if INTERPRETED and self.q.dtype == torch.bfloat16 else 1e-6
        assert error <= 3 * self.budget(truth) + slack * float(truth.abs().max())
        for result in results[1:]:
            assert torch.equal(result, results[0])


@on_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("width", [1, 5, 32, 128])
@pytest.mark.parametrize("group", [1, 4])
def test_against_float64(device: str, dtype: torch.dtype, width: int, group: int) -> None:
    """Three lengths, the shortest a single key, behind paddings; the number of programs changes no bit."""
    key_heads, length = (2 if width == 5 else 1), (300 if width < 128 else 200)
    case = Case(group * key_heads, key_heads, width, 32, length, [3, 0, 40], [length, 129, 41], dtype, device)
    case.check((1, 3, 8) if width < 128 else (1, 3))


@on_devices
@pytest.mark.parametrize("dim", [16, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_head_sizes(device: str, dim: int, dtype: torch.dtype) -> None:
    Case(2, 2, 32, dim, 200, [60], [200], dtype, device).check((1, 2))


@on_devices
@pytest.mark.parametrize("trend", [-6.0, 0.0, 6.0])
@pytest.mark.parametrize("length", [127, 128, 1100, 2100])
def test_long_sequences(device: str, length: int, trend: float) -> None:
    """Across segments of several lengths; the largest score is in the first, the last or any."""
    case = Case(2, 1, 7, 32, length, [0], [length], torch.float32, device, trend)
    if trend:
        at = (case.q[0, 0].double() @ case.keys[0, 0].double().T).argmax(-1) / length
        assert (at > 0.75).all() if trend > 0 else (at < 0.25).all()
    case.check((1, None, 5))


@on_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_a_batch_gives_each_what_it_gets_alone(device: str, dtype: torch.dtype) -> None:
    """To the bit: whatever the others' lengths, the padding and the length of the buffer."""
    first, end = [0, 30, 77, 5], [350, 350, 206, 6]
    case = Case(2, 1, 5, 32, 350, first, end, dtype, device)
    together = case.run()
    for b, (low, high) in enumerate(zip(first, end, strict=True)):
        one = slice(b, b + 1)
        where = torch.tensor([0], device=device), torch.tensor([high - low], device=device)
        # a buffer of its own, without padding and just long enough
        k, v = case.keys[one, :, low:high].contiguous(), case.values[one, :, low:high].contiguous()
        assert torch.equal(block_attention(case.q[one], k, v, *where), together[one])
        # the same buffer, among keys that it does not see
        for splits in (1, 2):
            alone = block_attention(
                case.q[one], case.keys[one], case.values[one], case.first[one], case.end[one], splits=splits
            )
            assert torch.equal(alone, together[one])


@on_devices
@pytest.mark.parametrize("splits", [1, 3])
def test_sequences_without_keys(device: str, splits: int) -> None:
    """end <= first, in a buffer full of NaN; the others are not disturbed."""
    case = Case(2, 2, 5, 16, 140, [0, 20, 9, 140], [0, 7, 140, 140], torch.float32, device)
    out = case.run(splits)
    assert (out[[0, 1, 3]] == 0).all()
    torch.testing.assert_close(out.double(), case.truth(), rtol=0, atol=1e-5)


@on_devices
@pytest.mark.parametrize("splits", [1, 3])
def test_bounds_are_clipped_to_the_buffer(device: str, splits: int) -> None:
    case = Case(2, 2, 5, 16, 140, [0, 0], [140, 140], torch.float32, device)
    expected = case.run(splits)
    case.first, case.end = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([-4, 0], [140, 10**6]))
    assert torch.equal(case.run(splits), expected)


@on_devices
def test_each_bound_counts(device: str) -> None:
    """One key more or less on either side is seen in the result."""
    case = Case(1, 1, 1, 16, 260, [0], [260], torch.float32, device)
    for low, high in ((0, 128), (1, 129), (0, 129), (1, 260), (0, 260)):
        case.bounds = [low], [high]
        case.first, case.end = (torch.tensor(x, device=device) for x in case.bounds)
        error = (case.run().double() - case.truth()).abs().max()
        assert error < 1e-5


@on_devices
@pytest.mark.parametrize(("splits", "length"), [(1, 200), (3, 200), (2, 128), (2, 129), (2, 1025), (2, 2100)])
def test_what_is_written(monkeypatch: pytest.MonkeyPatch, device: str, splits: int, length: int) -> None:
    """All of the result and of the workspace, which has as many segments as `segments` says, and nothing beside."""
    case, memory = Case(2, 1, 3, 16, length, [0], [length], torch.float32, device), []

    def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        memory.append(torch.full((math.prod(shape) + 128,), math.nan, dtype=dtype, device=device))
        return memory[-1][64:-64].view(shape)

    monkeypatch.setattr(module, "torch", SimpleNamespace(**vars(torch) | {"empty": empty}))  # of this module alone
    case.run(splits)
    assert len(memory) == (1 if splits == 1 else 2)
    for numbers in memory:
        assert numbers[:64].isnan().all()
        assert numbers[-64:].isnan().all()
        assert not numbers[64:-64].isnan().any()


@on_devices
@pytest.mark.parametrize("splits", [1, 3])
def test_any_strides(device: str, splits: int) -> None:
    """Keys as [B, L, H, Dh], queries as a slice of wider rows."""
    case = Case(4, 2, 5, 32, 200, [0, 50], [200, 180], torch.float32, device)
    expected = case.run(splits)
    case.keys, case.values = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (case.keys, case.values))
    wide = torch.cat((case.q, case.q), -1)
    case.q = wide[..., :32]
    assert torch.equal(case.run(splits), expected)


@pytest.mark.gpu
def test_one_graph_for_all_lengths() -> None:
    case = Case(8, 2, 32, 64, 900, [0, 0, 0], [900, 900, 900], torch.bfloat16, "cuda")
    case.run(8)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = case.run(8)
    for first, end in (([0, 0, 0], [900, 128, 1]), ([5, 300, 7], [6, 900, 7]), ([100, 0, 0], [612, 513, 900])):
        case.first.copy_(torch.tensor(first))
        case.end.copy_(torch.tensor(end))
        graph.replay()
        graphed = out.clone()
        assert torch.equal(graphed, case.run(1))


@pytest.mark.gpu
def test_no_host_synchronisation() -> None:
    case = Case(8, 2, 32, 64, 900, [0, 3], [900, 300], torch.bfloat16, "cuda")
    case.run(1), case.run(8)  # compile
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.run(1), case.run(8)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_segments() -> None:
    edges, size = [0], 128
    while edges[-1] < 20_000:
        edges += [edges[-1] + size * i for i in range(1, 5)]
        size *= 2 if len(edges) > 5 else 1
    assert edges[:14] == [0, 128, 256, 384, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048, 2560]
    for length in range(20_000):
        count = module.segments(length)
        assert edges[count] >= length
        assert count == 0 or edges[count - 1] < length


def test_default_splits() -> None:
    """Enough programs for a large device at batch 1, no more than there are segments, one where heads suffice."""
    assert module.default_splits(1, 32, 1, 4096) == 9
    assert module.default_splits(1, 32, 1, 200) == 2
    assert module.default_splits(1, 32, 1, 0) == 1
    assert module.default_splits(4, 32, 1, 4096) == 3
    assert module.default_splits(5, 32, 1, 4096) == 1
    assert module.default_splits(1, 1, 1, 8192) == module.segments(8192) == 20


WRONG: dict[str, tuple[str, Any]] = {
    "rank": ("q, keys, values", {"q": torch.zeros(2, 5, 32)}),
    "values": ("q, keys, values", {"values": torch.zeros(2, 2, 9, 32)}),
    "batch": ("batch and Dh", {"q": torch.zeros(3, 4, 5, 32)}),
    "dim": ("batch and Dh", {"q": torch.zeros(2, 4, 5, 64)}),
    "heads": ("H must be a multiple", {"q": torch.zeros(2, 3, 5, 32)}),
    "length": ("at most 2", {"keys": torch.zeros(1).expand(2, 2, 2**24 + 1, 32),
                             "values": torch.zeros(1).expand(2, 2, 2**24 + 1, 32)}),
    "no rows": ("S is 0", {"q": torch.zeros(2, 4, 0, 32)}),
    "rows": ("S is 129", {"q": torch.zeros(2, 4, 129, 32)}),
    "dim 48": ("Dh is 48", {"q": torch.zeros(2, 4, 5, 48), "keys": torch.zeros(2, 2, 10, 48),
                            "values": torch.zeros(2, 2, 10, 48)}),
    "dtypes": ("one of bfloat16", {"q": torch.zeros(2, 4, 5, 32, dtype=torch.float16)}),
    "first": ("first: contiguous", {"first": torch.zeros(3, dtype=torch.int64)}),
    "end": ("end: contiguous", {"end": torch.zeros(2)}),
    "splits": ("splits: 0 given", {"splits": 0}),
    "device": ("end: on meta", {"end": torch.zeros(2, dtype=torch.int64, device="meta")}),
    "stride": ("q: the last stride must be 1", {"q": torch.zeros(2, 4, 32, 5).transpose(2, 3)}),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    message, change = WRONG[name]
    right = {
        "q": torch.zeros(2, 4, 5, 32), "keys": torch.zeros(2, 2, 10, 32), "values": torch.zeros(2, 2, 10, 32),
        "first": torch.zeros(2, dtype=torch.int64), "end": torch.zeros(2, dtype=torch.int64),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        block_attention(**(right | change))


@pytest.mark.skipif(SLOWLY, reason="interpreted, it runs on CPUs")
def test_on_a_cpu() -> None:
    zeros, bounds = torch.zeros(1, 1, 1, 16), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        block_attention(zeros, zeros, zeros, bounds, bounds)


@pytest.mark.skipif(PTX > 0, reason="as compiled, it runs on CPUs")
def test_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "cuda tensors" in block_attention_unavailable(cpu, torch.bfloat16, 128)
    assert "float64" in block_attention_unavailable(cuda, torch.float64, 128)
    assert "not of 80" in block_attention_unavailable(cuda, torch.float16, 80)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert block_attention_unavailable(cuda, torch.float16, 64).startswith("no CUDA device")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "has 7.5" in block_attention_unavailable(cuda, torch.float16, 64)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    for dim in (8, 16, 256, 512):
        reason = block_attention_unavailable(cuda, torch.float16, dim)
        assert bool(reason) == (dim in (8, 512)), reason
    import triton

    monkeypatch.setattr(triton, "__version__", "3.1.0+git")
    assert "this is 3.1.0" in block_attention_unavailable(cuda, torch.float16, 64)
    monkeypatch.setattr(triton, "__version__", "3.2.0")
    assert not block_attention_unavailable(cuda, torch.float16, 64)
    monkeypatch.setattr(triton, "__version__", "3.10.0")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not block_attention_unavailable(cpu, torch.bfloat16, 128)

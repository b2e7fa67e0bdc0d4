"""A layer made of the kernels against the layer of torch's operators: results, launches, graphs.

On a CPU it is only interpreted (`test_ops.test_interpreted_triton` runs this file so).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from cases import INTERPRETED, PTX, SLOWLY
from conftest import tiny_model
from test_layer_kernels import _rounded, data, in_dtypes, on_devices  # noqa: F401
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dllm_engine import LLaDA
from dllm_engine.kv_cache import KVCache, LayerCache
from dllm_engine.layers import Kernels

pytest.importorskip("triton")

from dllm_engine.kernels import block_attention, early, layer, products


@torch.no_grad()
def joined_model(device: str, dtype: torch.dtype, **changes: Any) -> LLaDA:
    """Odd sizes, grouped heads, biases; weights as a loaded model has them."""
    sizes = {"d_model": 96, "n_heads": 6, "n_kv_heads": 2, "mlp_hidden_size": 50, "include_qkv_bias": True}
    torch.manual_seed(0)  # biases
    source = tiny_model(**(sizes | changes))
    for name, parameter in source.named_parameters():
        if parameter.ndim == 1:
            parameter += 0.3 * data(*parameter.shape, dtype=torch.float32, device="cpu", seed=len(name))
    model = LLaDA.uninitialised(source.config, torch.device(device), dtype)
    model.load_state_dict(source.state_dict())
    assert all(model.joined_weights())
    return model


def ways() -> list[Kernels]:
    """All, where kernels can be launched early."""
    here = PTX == 90 if SLOWLY else torch.cuda.is_available()
    here = here and not early.unavailable(torch.device("cuda"))
    return [kernels for kernels in Kernels if here or kernels < Kernels.EARLY]


WAYS = ways()


class BlockCall:
    """Two sequences inside a block, as `BlockCalls._call` gives them to the model: padding, a ragged end."""

    def __init__(self, model: LLaDA) -> None:
        config, device = model.config, model.device
        self.model, self.tokens = model, torch.tensor([[3, 59, 8, 59], [59, 7, 59, 59]], device=device)
        columns = torch.tensor([[4, 5, 6, 7], [8, 9, 10, 11]], device=device)
        self.bounds = torch.tensor([0, 3], device=device), torch.tensor([9, 10], device=device)
        self.written = torch.where(columns < self.bounds[1][:, None], columns, 12)
        self.rope = model.rope_tables((columns - self.bounds[0][:, None]).clamp_min(0))
        shape = KVCache.shape(config, 3, 12)
        self.before = data(*shape, dtype=torch.float32, device="cpu", seed=3).to(torch.bfloat16).to(device, model.dtype)
        self.kv = KVCache(self.before.clone())

    @torch.no_grad()
    def run(self, kernels: Kernels) -> Tensor:
        rows = torch.arange(2, device=self.model.device)[:, None]
        self.kv.data.copy_(self.before)
        caches = [LayerCache(k[:2], v[:2], self.written, rows, (k[:2], v[:2])) for k, v in self.kv.layers]
        joined = self.model.joined_weights()
        seen: Any = self.bounds
        if self.model.dtype == torch.float64:
            every = torch.arange(13, device=self.model.device)
            seen = ((every >= self.bounds[0][:, None]) & (every < self.bounds[1][:, None]))[:, None, None]
        return self.model.hidden_states(self.tokens, self.rope, seen, caches, joined, kernels)


@on_devices
@in_dtypes
@pytest.mark.parametrize("bias", [False, True])
def test_hidden_states(device: str, dtype: torch.dtype, bias: bool) -> None:
    """Of a whole model: as far from float64 as eager torch is; the cache too."""
    model = joined_model(device, dtype, include_qkv_bias=bias)
    exact = joined_model(device, torch.float64, include_qkv_bias=bias)
    exact.load_state_dict(model.state_dict())
    truth = BlockCall(exact)
    exact_result = truth.run(Kernels.NONE), truth.kv.data
    errors = []
    for way in WAYS:
        call = BlockCall(model)
        result = call.run(way), call.kv.data
        # of rows that go to the spare column, the last, any may win
        found, expected = ((hidden, kv[..., :-1, :]) for hidden, kv in (result, exact_result))
        errors.append([float((a.double() - b).abs().max()) for a, b in zip(found, expected, strict=True)])
        changed = (call.kv.data != call.before).any(-1).nonzero()
        assert {(int(b), int(column)) for _, _, b, _, column in changed} == {
            (b, int(column)) for b, row in enumerate(call.written.tolist()) for column in row
        }
    theirs, *others = errors
    for mine in others:
        assert all(error <= 2 * eager + 1e-6 for error, eager in zip(mine, theirs, strict=True)), errors


class Launch:
    """Instead of a kernel: counts."""

    def __init__(self, name: str, counts: Counter[str]) -> None:
        self.name, self.counts = name, counts

    def __getitem__(self, grid: Any) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            self.counts[self.name] += 1

        return launch


class Operations(TorchDispatchMode):
    """Counts what torch would launch: all operations but views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.removeprefix("aten::")
        views = any(a.alias_info is not None and not a.alias_info.is_write for a in function._schema.arguments)
        if not views and not name.startswith(("empty", "_unsafe_view", "detach")):
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif(not INTERPRETED, reason="counted once is enough")
def test_launches_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers: nothing but products, three or four launches of `layer` each, and attention. No copy, no cast."""
    call = BlockCall(joined_model("cpu", torch.bfloat16, n_layers=2, include_qkv_bias=False))
    kernels: Counter[str] = Counter()
    for module, names in (
        (layer, ("_add_norm", "_rope_write", "_silu_mul")),
        (block_attention, ("_attend", "_merge")),
        (products, ("_multiply",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, Launch(name, kernels))
    counted = {}
    for way in (Kernels.NONE, Kernels.BETWEEN, Kernels.PRODUCTS):
        kernels.clear()
        with Operations() as operations:
            call.run(way)
        counted[way] = operations.counts, kernels.copy()
    torch_operations, launched = counted[Kernels.BETWEEN]
    beside = {"copy_": 1, "arange": 1, "embedding": 1}  # the first two are the test's own
    assert torch_operations == {"mm": 8} | beside
    assert launched == {"_add_norm": 5, "_rope_write": 2, "_silu_mul": 2, "_attend": 2}  # the last norm is ln_f
    totals = [sum(c.total() for c in both) - sum(beside.values()) for both in counted.values()]
    assert totals == [2 * 34 + 8, 2 * 9 + 1, 2 * 8 + 1]  # the norm at the end is 8 operations, or 1
    del launched["_silu_mul"]  # part of a product
    assert counted[Kernels.PRODUCTS] == (Counter(beside), launched | {"_multiply": 8})


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS[1:])
def test_in_a_graph(way: Kernels) -> None:
    """Captured once, replayed with other tokens and columns; the host waits for nothing."""
    call, other = (BlockCall(joined_model("cuda", torch.bfloat16)) for _ in range(2))
    call.run(way)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call.run(way)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call.run(way)
    for shift in (0, 1):
        for one in (call, other):
            one.tokens.copy_((one.tokens + shift) % 60)
            one.written.copy_(torch.where(one.written < 12, (one.written - shift), 12))
        graph.replay()
        torch.testing.assert_close(out, other.run(way), rtol=0.02, atol=0.02)  # cuBLAS may choose another kernel
        # which of two rows wins the spare column is open
        torch.testing.assert_close(call.kv.data[..., :12, :], other.kv.data[..., :12, :], rtol=0.02, atol=0.02)

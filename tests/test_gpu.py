"""What only a CUDA device can show: goldens and decodes there, and a step inside a CUDA graph."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from cases import matrices
from conftest import GOLDEN, ending_model
from mixtures import random_model
from test_decode_step import STATE, fresh_state, rules_for

from dllm_engine import Engine, LLaDA, backends, decode, ops
from dllm_engine.graphs import BlockCalls
from dllm_engine.layers import Kernels
from dllm_engine.policies import Threshold, TopK

pytestmark = pytest.mark.gpu


def unavailable(backend: str) -> str:
    return backends.BACKENDS[backend].unavailable


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_decode_gives_the_tokens_of_the_cpu(backend: str) -> None:
    if unavailable(backend):
        pytest.skip(unavailable(backend))
    on_cpu, on_gpu = (LLaDA.from_pretrained(GOLDEN / "checkpoint", device=d, dtype="float32") for d in ("cpu", "cuda"))
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    for policy in ("topk", "threshold", "factor"):
        for cache in ("none", "dual"):
            options: dict[str, Any] = {"gen_length": 16, "block_length": 8, "policy": policy, "cache": cache, "seed": 0}
            expected = decode(on_cpu, [[4, 5, 6], [7, 8]], backend="cpu", **options)
            out = decode(on_gpu, [[4, 5, 6], [7, 8]], backend=backend, **options)
            assert out.sequences.cpu().tolist() == expected.sequences.tolist()
            assert out.forward_passes == expected.forward_passes
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("name", ["threshold", "learn2pd-one", "learn2pd-position"])
def test_a_step_in_a_cuda_graph(backend: str, name: str) -> None:
    """Captured once, replayed until the block is done: the state moves as it does in eager steps."""
    if unavailable(backend):
        pytest.skip(unavailable(backend))
    hidden, head = matrices(32, 64, 400, torch.bfloat16, peak=4.0, device="cuda")
    hidden = hidden.view(4, 8, 64)
    rule, sequences = rules_for(8, "cuda")[name], torch.arange(4, device="cuda")
    banned = ops.id_tensor([3], torch.device("cuda"))

    def step(state: Any) -> None:
        ops.decode_step_(hidden, head, state, sequences, rule, banned_ids=banned, backend=backend)

    graphed, expected = fresh_state(0, device="cuda"), fresh_state(0, device="cuda")
    start = {field: getattr(graphed, field).clone() for field in STATE}
    step(graphed)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(graphed)
    for field, value in start.items():
        getattr(graphed, field).copy_(value)
    for _ in range(2):
        graph.replay()
        step(expected)
        for field in STATE:
            assert torch.equal(getattr(graphed, field), getattr(expected, field)), field


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_rows_out_of_range_are_errors_not_faults(backend: str) -> None:
    if unavailable(backend):
        pytest.skip(unavailable(backend))
    hidden, head = matrices(4, 64, 300, torch.bfloat16, device="cuda")
    rows = torch.tensor([0, 99999, -1, 3], dtype=torch.int32, device="cuda")
    stats = ops.row_stats(hidden, head, rows, backend=backend)
    good = ops.row_stats(hidden, head, torch.tensor([0, 3], device="cuda"), backend=backend)
    assert stats.token[[1, 2]].tolist() == [-1, -1]
    assert stats.token[[0, 3]].tolist() == good.token.tolist()


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_no_host_synchronisation_in_a_step(backend: str) -> None:
    if unavailable(backend):
        pytest.skip(unavailable(backend))
    hidden, head = matrices(32, 64, 400, torch.bfloat16, device="cuda")
    state, rule = fresh_state(0, device="cuda"), rules_for(8, "cuda")["threshold"]
    sequences, banned = torch.arange(4, device="cuda"), ops.id_tensor([3], torch.device("cuda"))

    def step() -> None:
        ops.decode_step_(hidden.view(4, 8, 64), head, state, sequences, rule, banned_ids=banned, backend=backend)

    step()  # compiles, allocates
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_block_calls_in_graphs_give_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first decode runs kernel by kernel and captures, later ones replay, with other prompts and thresholds."""
    if unavailable("triton"):
        pytest.skip(unavailable("triton"))
    model = LLaDA.from_pretrained(GOLDEN / "checkpoint", device="cuda", dtype="float32")
    base: dict[str, Any] = {"gen_length": 32, "block_length": 8, "cache": "dual", "seed": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a failed capture warns
        for prompts in ([[4, 5, 6], [7, 8]], [[9, 3, 11], [12, 4]], [[4, 5, 6], [7, 8]]):
            for policy in (Threshold(0.5), Threshold(0.9), TopK()):
                with monkeypatch.context() as patch:
                    patch.setenv("DLLM_GRAPHS", "0")
                    patch.setattr(torch.cuda.CUDAGraph, "replay", None)  # which nobody calls
                    expected = decode(model, prompts, policy=policy, **base)
                out = decode(model, prompts, policy=policy, **base)
                assert torch.equal(out.sequences, expected.sequences)
                assert out.forward_passes == expected.forward_passes
    kept = Engine.kept(model)._buffers
    assert kept is not None
    assert any(kept.graphs.values()), "nothing was captured"


def test_graphs_are_captured_again_after_a_growth() -> None:
    """And those of another engine stay as they are."""
    if unavailable("triton"):
        pytest.skip(unavailable("triton"))
    models = [LLaDA.from_pretrained(GOLDEN / "checkpoint", device="cuda", dtype="float32") for _ in range(2)]
    settings: dict[str, Any] = {"gen_length": 16, "block_length": 8, "cache": "dual", "policy": TopK()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a failed capture warns
        first = [decode(model, [[4, 5, 6]], **settings).sequences for model in models]
        for length in (9, 30):
            for _ in range(2):
                decode(models[0], [list(range(2, 2 + length))], **settings)
            kept = Engine.kept(models[0])._buffers
            assert kept is not None
            assert any(kept.graphs.values()), "nothing was captured"
            again = [decode(model, [[4, 5, 6]], **settings).sequences for model in models[::-1]]
            assert all(torch.equal(sequences, first[0]) for sequences in (*first, *again))


def want_kernels(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``DLLM_LAYER_KERNELS``, or no test."""
    from dllm_engine.kernels import early

    if kernels == "3" and (reason := early.unavailable(torch.device("cuda"))):
        pytest.skip(reason)
    monkeypatch.setenv("DLLM_LAYER_KERNELS", kernels)


KINDS: list[dict[str, Any]] = [{}, {"shifted": True}, {"block_size": 4}, {"shifted": True, "block_size": 8}]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("kernels", ["1", "2", "3"])
def test_layer_kernels_give_the_same_tokens(
    kernels: str, kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch's layers, kernel by kernel, then captured, then replayed."""
    if unavailable("triton"):
        pytest.skip(unavailable("triton"))
    torch.manual_seed(0)  # biases
    source = ending_model(d_model=64, n_heads=2, n_kv_heads=2, include_qkv_bias="shifted" in kind, **kind)
    model = LLaDA.uninitialised(source.config, torch.device("cuda"), torch.float16)
    model.load_state_dict(source.state_dict())
    settings: dict[str, Any] = {"policy": Threshold(0.5), "gen_length": 16, "block_length": 4, "cache": "dual"}
    monkeypatch.setenv("DLLM_LAYER_KERNELS", "0")
    expected = decode(model, [[4, 5, 6], [7, 8]], **settings).sequences
    want_kernels(kernels, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a failed capture warns
        for _ in range(3):
            assert torch.equal(decode(model, [[4, 5, 6], [7, 8]], **settings).sequences, expected)
    kept = Engine.kept(model)._buffers
    assert kept is not None
    captured = {part for key, graph in kept.graphs.items() if graph for part in key if isinstance(part, Kernels)}
    assert Kernels(int(kernels)) in captured


def forbid_synchronisation(monkeypatch: pytest.MonkeyPatch) -> list[Kernels]:
    """In block calls; what each of them takes for its layers is added to the list."""
    call, kernels = BlockCalls.__call__, []

    def watched(self: BlockCalls, joining: list[int]) -> None:
        kernels.append(self.kernels)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call(self, joining)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(BlockCalls, "__call__", watched)
    return kernels


@pytest.mark.parametrize(("graphs", "kernels"), [("0", "1"), ("1", "1"), ("1", "2"), ("1", "3")])
def test_no_host_synchronisation_in_a_block_call(graphs: str, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if unavailable("triton"):
        pytest.skip(unavailable("triton"))
    monkeypatch.setenv("DLLM_GRAPHS", graphs)
    want_kernels(kernels, monkeypatch)
    model = LLaDA.from_pretrained(GOLDEN / "checkpoint", device="cuda", dtype="float16")
    settings: dict[str, Any] = {"gen_length": 32, "block_length": 8, "cache": "dual", "policy": TopK()}
    for _ in range(2):  # compiles, captures
        decode(model, [[4, 5, 6], [7, 8]], **settings)
    seen = forbid_synchronisation(monkeypatch)
    decode(model, [[4, 5, 6], [7, 8]], **settings)
    assert seen == [Kernels(int(kernels))] * 28


@pytest.mark.parametrize("graphs", ["0", "1"])
def test_a_mixture_of_experts(graphs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All experts at once, without asking the host, give the tokens of the CPU's expert by expert."""
    if unavailable("triton"):
        pytest.skip(unavailable("triton"))
    monkeypatch.setenv("DLLM_GRAPHS", graphs)
    model = random_model(num_attention_heads=2, num_key_value_heads=2)
    settings: dict[str, Any] = {"gen_length": 32, "block_length": 8, "policy": TopK(), "end_of_text": "off"}
    prompts = [[3, 4, 40, 12], [9, 22, 31, 2, 8, 50, 17]]
    expected = decode(model, prompts, **settings).sequences
    model.cuda()
    for _ in range(2):  # compiles, captures
        assert torch.equal(decode(model, prompts, **settings).sequences.cpu(), expected)
    seen = forbid_synchronisation(monkeypatch)
    assert torch.equal(decode(model, prompts, **settings).sequences.cpu(), expected)
    assert seen == [Kernels.NONE] * 28


@pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="torch 2.10 is needed")
def test_experts_of_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    mixture: Any = random_model().blocks[0].experts.cuda().bfloat16()
    x = torch.randn(2, 300, 32, device="cuda", dtype=torch.bfloat16, generator=torch.Generator("cuda").manual_seed(0))
    given: list[Any] = []
    grouped = mixture._grouped

    def noted(*arguments: Any) -> Any:
        given[:] = arguments
        return grouped(*arguments)

    monkeypatch.setattr(mixture, "_grouped", noted)
    mixture(x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = mixture(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # with the same experts: their router's logits have ties in bfloat16
    expected = mixture.cpu()._one_by_one(*(tensor.cpu() for tensor in given)).float()
    assert torch.allclose(out.cpu().float().flatten(0, 1), expected, atol=0.02 * float(expected.abs().max()))

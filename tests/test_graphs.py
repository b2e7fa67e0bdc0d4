"""Block calls of a fixed size, as CUDA graphs replay them: on the CPU, with a graph that calls what it captured."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ending_model

from dllm_engine import Engine, LearnedFilter, LLaDA, decode, graphs
from dllm_engine.buffers import Buffers
from dllm_engine.graphs import BlockCalls, Kept
from dllm_engine.layers import Kernels
from dllm_engine.policies import Factor, Learn2PD, Policy, Random, Threshold, TopK

GOLDEN = Path(__file__).parent / "golden"
PROMPTS = [[7, 3, 22, 41, 18, 30], [12], [5, 5, 59], [9, 8, 7, 6, 5, 4, 3, 2, 44], [11, 12]]
BASE: dict[str, Any] = {"gen_length": 32, "block_length": 8, "cache": "dual"}
LEARNED = LearnedFilter.from_pretrained(GOLDEN / "filter.safetensors", force=True)


@pytest.fixture(params=[False, True], ids=["", "shifted"])
def model(request: pytest.FixtureRequest) -> LLaDA:
    """Random, in float32, with end ids that come up now and then."""
    return ending_model(n_kv_heads=2, shifted=request.param)


@pytest.fixture(params=[{"block_size": 8}, {"block_size": 16, "shifted": True}], ids=str)
def block_causal(request: pytest.FixtureRequest) -> LLaDA:
    return ending_model(n_kv_heads=2, **request.param)


class Fake:
    """What a CUDA graph is to its user: a later replay runs the call with the tensors of the capture."""

    captures = 0

    def __init__(self, calls: BlockCalls, count: int) -> None:
        Fake.captures += 1
        self.calls, self.count, self.replays = calls, count, 0

    def replay(self) -> None:
        self.replays += 1
        self.calls._call(self.count)


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Block calls of this kind on the CPU; the sizes that were called."""
    sizes: list[int] = []
    call = BlockCalls._call

    def noted(self: BlockCalls, count: int) -> None:
        sizes.append(count)
        call(self, count)

    Fake.captures = 0
    monkeypatch.setattr(graphs, "supported", lambda forward, options: options.cache.name == "dual")
    monkeypatch.setattr(BlockCalls, "captures", True)
    monkeypatch.setattr(BlockCalls, "_capture", lambda self, count: Kept(Fake(self, count), []))
    monkeypatch.setattr(BlockCalls, "_call", noted)
    return sizes


def expected(model: LLaDA, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(graphs, "supported", lambda forward, options: False)
        return decode(model, prompts, **BASE, **settings)


RULES: dict[str, Policy] = {
    "topk": TopK(), "threshold": Threshold(0.5), "factor": Factor(1.5), "learn2pd": Learn2PD(LEARNED, 0.7)
}  # fmt: skip


@pytest.mark.parametrize("policy", RULES)
@pytest.mark.parametrize(
    "extra",
    [{}, {"temperature": 0.7}, {"end_of_text": "off"}, {"end_of_text": "predicted"}, {"cache": "dual/5"}],
    ids=str,
)
def test_tokens_and_passes_are_the_same(
    model: LLaDA, fixed: list[int], monkeypatch: pytest.MonkeyPatch, policy: str, extra: dict[str, Any]
) -> None:
    settings = BASE | {"policy": RULES[policy], "seed": 3} | extra
    with monkeypatch.context() as patch:
        patch.setattr(graphs, "supported", lambda forward, options: False)
        want = decode(model, PROMPTS, **settings)
    for _ in range(2):  # the second time everything is replayed
        fixed.clear()
        out = decode(model, PROMPTS, **settings)
        assert torch.equal(out.sequences, want.sequences)
        assert torch.equal(out.sequence_passes, want.sequence_passes)
        assert out.forward_passes == want.forward_passes
        assert fixed
        assert set(fixed) <= {1, 2, 4, 5}, "sizes are powers of two, or all"


@pytest.mark.parametrize("extra", [{}, {"temperature": 0.7}, {"end_of_text": "off"}], ids=str)
@pytest.mark.parametrize("policy", RULES)
def test_those_of_a_block_causal_model_are_the_same(
    block_causal: LLaDA, fixed: list[int], monkeypatch: pytest.MonkeyPatch, policy: str, extra: dict[str, Any]
) -> None:
    test_tokens_and_passes_are_the_same(block_causal, fixed, monkeypatch, policy, extra)


def test_rows_that_fill_up_a_call_write_into_no_other_slot(
    model: LLaDA, fixed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    filled, call = [], BlockCalls._call

    def noted(self: BlockCalls, count: int) -> None:
        assert self.forward.kv is not None
        others = self.forward.kv.data[:, :, len(self.joined) :, :, :-1]  # without the spare column
        before = others.clone()
        call(self, count)
        filled.append(count > len(self.joined))
        assert torch.equal(others, before)

    monkeypatch.setattr(BlockCalls, "_call", noted)
    decode(model, PROMPTS, policy=Threshold(0.5), **BASE)
    assert any(filled)


def test_later_decodes_replay_with_their_own_values(
    model: LLaDA, fixed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other prompts, thresholds, seeds and filters of the same shape go through the graphs of the first decode."""
    settings: dict[str, Any] = {"end_of_text": "off", "policy": "topk"}
    decode(model, PROMPTS, **BASE, **settings)
    decode(model, PROMPTS, **BASE, **settings)
    captures = Fake.captures
    assert captures == 1
    other = [[p % 50 + 1 for p in prompt] for prompt in PROMPTS]
    for policy in (TopK(), Threshold(0.4), Threshold(0.8), Factor(2.0)):
        want = expected(model, other, monkeypatch, end_of_text="off", policy=policy)
        out = decode(model, other, end_of_text="off", policy=policy, **BASE)
        assert torch.equal(out.sequences, want.sequences), policy
    one, two = (
        Learn2PD(LEARNED, 0.7),
        Learn2PD(LearnedFilter.from_pretrained(GOLDEN / "filter.safetensors", force=True)),
    )
    for linear in two.filter.modules():
        if isinstance(linear, torch.nn.Linear):
            with torch.no_grad():
                linear.weight.mul_(-1)
    two = Learn2PD(two.filter, 0.7)
    for learned in (one, one, two, one):
        want = expected(model, other, monkeypatch, end_of_text="off", policy=learned)
        assert torch.equal(decode(model, other, end_of_text="off", policy=learned, **BASE).sequences, want.sequences)
    shorter = [prompt[-1:] for prompt in PROMPTS]  # another shape: graphs of its own
    want = expected(model, shorter, monkeypatch, **settings)
    assert torch.equal(decode(model, shorter, **BASE, **settings).sequences, want.sequences)


def waiting() -> Policy:
    rule = TopK()
    rule.ends_wait = True
    return rule


@pytest.mark.parametrize("changes", [{"temperature": 0.7}, {"end_of_text": "off"}, {"policy": waiting()}], ids=str)
def test_what_is_fixed_in_a_graph_has_graphs_of_its_own(
    model: LLaDA, fixed: list[int], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    plain: dict[str, Any] = {"policy": TopK(), "steps": 16, "end_of_text": "committed", "seed": 3}
    found = []
    for given in (plain, plain | changes) * 3:
        found.append(decode(model, PROMPTS, **BASE, **given).sequences)
        assert torch.equal(found[-1], expected(model, PROMPTS, monkeypatch, **given).sequences)
    assert not torch.equal(found[0], found[1]), "both give the same: the test shows nothing"


def test_graphs_that_are_kept_let_their_model_go(fixed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    class Weak(Fake):
        def __init__(self, calls: BlockCalls, count: int) -> None:
            super().__init__(calls, count)
            self.calls = weakref.proxy(calls)

    monkeypatch.setattr(BlockCalls, "_capture", lambda self, count: Kept(Weak(self, count), self._tensors()))
    model = ending_model(n_kv_heads=2)
    decode(model, PROMPTS, policy="topk", end_of_text="off", **BASE)
    assert Fake.captures == 1
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("name", ["wte", "blocks.0", "blocks.1.ff_out", "ln_f"])
def test_graphs_from_before_a_hook_are_not_replayed(fixed: list[int], model: LLaDA, name: str) -> None:
    """They would not run it. (On a GPU a model with hooks is not captured at all; here captures are forced.)"""
    decode(model, PROMPTS, policy="topk", end_of_text="off", **BASE)
    decode(model, PROMPTS, policy="topk", end_of_text="off", **BASE)
    captured = Fake.captures
    handle = model.get_submodule(name).register_forward_hook(lambda *_: None)
    decode(model, PROMPTS, policy="topk", end_of_text="off", **BASE)
    assert Fake.captures == 2 * captured > 0
    handle.remove()
    decode(model, PROMPTS, policy="topk", end_of_text="off", **BASE)
    assert Fake.captures == 2 * captured


@pytest.mark.parametrize(("block_length", "by_kernel"), [(8, True), (128, True), (160, False)])
def test_blocks_too_wide_for_the_kernel_of_attention(
    fixed: list[int], monkeypatch: pytest.MonkeyPatch, block_length: int, by_kernel: bool
) -> None:
    call, seen = BlockCalls._call, []

    def noted(self: BlockCalls, count: int) -> None:
        seen.append(self.by_kernel)
        self.by_kernel, self.kernels = False, Kernels.NONE  # which are not here
        call(self, count)

    monkeypatch.setattr(graphs, "block_attention_unavailable", lambda *_: "")
    monkeypatch.setattr(BlockCalls, "_layer_kernels", lambda self: Kernels.NONE)
    monkeypatch.setattr(BlockCalls, "_call", noted)
    model = ending_model(max_sequence_length=400)
    decode(model, [[4, 5]], policy="threshold", gen_length=block_length, block_length=block_length, cache="dual")
    assert seen
    assert seen[0] is by_kernel


def test_moved_weights_and_grown_buffers_drop_graphs(
    model: LLaDA, fixed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"end_of_text": "off", "policy": Threshold(0.5)}
    for _ in range(3):
        decode(model, PROMPTS, **BASE, **settings)
    before, captures = decode(model, PROMPTS, **BASE, **settings).sequences, Fake.captures
    model.blocks[0].up_proj.weight = torch.nn.Parameter(-model.blocks[0].up_proj.weight, requires_grad=False)
    want = expected(model, PROMPTS, monkeypatch, **settings)
    after = decode(model, PROMPTS, **BASE, **settings).sequences
    assert torch.equal(after, want.sequences)
    assert not torch.equal(after, before)
    assert Fake.captures > captures, "a graph of weights that are gone was replayed"
    engine = Engine.kept(model)
    assert engine._buffers is not None
    assert engine._buffers.graphs
    engine._buffers.take("tokens", (6, 4096), torch.int64)
    assert not engine._buffers.graphs
    assert torch.equal(decode(model, PROMPTS, **BASE, **settings).sequences, want.sequences)


def test_biases_that_changed_in_place_are_read_by_graphs_of_before(
    fixed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)  # biases
    source = ending_model(include_qkv_bias=True)
    model = LLaDA.uninitialised(source.config, torch.device("cpu"), torch.float32)
    model.load_state_dict(source.state_dict())
    assert all(model.joined_weights())
    settings: dict[str, Any] = {"end_of_text": "off", "policy": Threshold(0.5)}
    before = [decode(model, PROMPTS, **BASE, **settings).sequences for _ in range(3)][-1]
    captures = Fake.captures
    model.blocks[0].v_proj.bias += 1.0
    want = expected(model, PROMPTS, monkeypatch, **settings)
    after = decode(model, PROMPTS, **BASE, **settings).sequences
    assert Fake.captures == captures > 0
    assert torch.equal(after, want.sequences)
    assert not torch.equal(after, before)


def test_another_config_has_graphs_of_its_own(model: LLaDA, fixed: list[int]) -> None:
    """Rotations lie where a graph reads them, and were made for the one before."""
    for rope_theta in (10000.0, 50.0):
        model.config = replace(model.config, rope_theta=rope_theta)
        before = Fake.captures
        for _ in range(2):
            decode(model, PROMPTS, **BASE, policy="topk")
        assert Fake.captures > before


def test_graphs_after_a_growth_get_memory_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool that its last graph left may not be captured into again; the stream is neither torch's nor another's."""
    pools = iter(range(9))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    one, other = (Buffers(torch.device("cpu")) for _ in range(2))
    one.take("tokens", (8,), torch.int64)
    first = one.graph_memory()
    one.graphs["a call"] = object()
    one.take("tokens", (6,), torch.int64)
    assert one.graph_memory() == first
    assert other.graph_memory()["pool"] != first["pool"]
    assert other.graph_memory()["stream"] is not first["stream"]
    one.take("tokens", (9,), torch.int64)
    assert one.graph_memory()["pool"] != first["pool"]
    assert one.graph_memory()["stream"] is first["stream"]
    assert not one.graphs


def test_memory_outlives_graphs_only_while_one_of_them_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    buffers = Buffers(torch.device("cpu"))
    buffers.graphs |= {"first": object(), "second": object(), "not captured": None}
    pool = buffers.graph_memory()["pool"]
    for keep, same in ((3, True), (2, True), (1, False)):
        buffers.drop_graphs(keep)
        assert len(buffers.graphs) == keep
        assert (buffers.graph_memory()["pool"] is pool) is same, keep


def test_without_graphs_nothing_is_replayed(model: LLaDA, fixed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even what an earlier decode captured."""
    settings: dict[str, Any] = {"policy": Threshold(0.5), "end_of_text": "off"}
    for _ in range(2):
        want = decode(model, PROMPTS, **BASE, **settings).sequences
    with monkeypatch.context() as patch:
        patch.setattr(BlockCalls, "captures", False)
        patch.setattr(Fake, "replay", None)
        assert torch.equal(decode(model, PROMPTS, **BASE, **settings).sequences, want)
    replays: list[Fake] = []
    monkeypatch.setattr(Fake, "replay", lambda self: replays.append(self) or self.calls._call(self.count))
    decode(model, PROMPTS, **BASE, **settings)
    assert replays, "nothing was captured: the test shows nothing"


def test_a_failed_capture_ends_on_the_stream_where_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch does not go back to it where the capture cannot be ended."""
    streams = ["current"]

    @contextmanager
    def capture(graph: Any, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        streams.append(stream)
        assert capture_error_mode == "thread_local"
        assert not gc.isenabled()
        yield
        raise AssertionError("not reached")

    for name, value in {
        "CUDAGraph": object, "graph": capture, "graph_pool_handle": object, "Stream": lambda device: "own",
        "current_stream": lambda: streams[-1], "set_stream": streams.append,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)

    def fails(self: BlockCalls, count: int) -> None:
        raise RuntimeError("operation not permitted")

    monkeypatch.setattr(BlockCalls, "_call", fails)
    calls = BlockCalls.__new__(BlockCalls)
    calls.buffers = Buffers(torch.device("cpu"))
    with pytest.warns(UserWarning, match="operation not permitted"):
        assert calls._capture(1) is None
    assert streams == ["current", "own", "current"]
    assert gc.isenabled()
    assert not calls.buffers.graphs_work


def test_only_the_graphs_used_last_are_kept(model: LLaDA, fixed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST", 3)
    hot = list(range(2, 10))
    for length in range(7, 1, -1):
        for prompt in (hot, hot[:length]):
            decode(model, [prompt], policy="topk", **BASE)
    buffers = Engine.kept(model)._buffers
    assert buffers is not None
    assert [key[2] for key in buffers.graphs] == [3, 8, 2]  # by the length of the prompt: (count, batch, length, …)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_a_stream_of_prompts(model: LLaDA, fixed: list[int], backend: str) -> None:
    """Rows that begin a block while others are inside one, and free rows: the idle row changes nothing."""
    generator = torch.Generator().manual_seed(1)
    prompts = [
        torch.randint(2, 55, (int(torch.randint(1, 9, (), generator=generator)),), generator=generator).tolist()
        for _ in range(24 if backend == "cpu" else 9)
    ]
    settings: dict[str, Any] = BASE | {"policy": Threshold(0.5), "backend": backend}
    with Engine(model, max_batch=6, max_length=48) as engine:
        many = {r.index: r for r in engine.generate_many(prompts, **settings)}
    assert {1, 2, 4, 6} >= set(fixed)
    for i, prompt in enumerate(prompts):
        alone = decode(model, [prompt], **settings)
        assert many[i].sequence.tolist() == alone.sequences[0].tolist()
        assert many[i].passes == alone.forward_passes


def test_what_has_no_fused_rule_or_is_guided_takes_the_other_way(model: LLaDA, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: Any) -> None:
        raise AssertionError("a block call of this kind")

    monkeypatch.setattr(BlockCalls, "__call__", never)
    supported = graphs.supported
    monkeypatch.setattr(graphs, "supported", lambda forward, options: options.cache.name == "dual")
    decode(model, PROMPTS, policy=Random(), **BASE)
    with pytest.raises(AssertionError, match="a block call"):
        decode(model, PROMPTS, policy="topk", **BASE)
    monkeypatch.setattr(graphs, "supported", supported)
    decode(model, PROMPTS, policy="topk", **BASE)  # on a CPU

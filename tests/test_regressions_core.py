"""What went wrong once and no test of a module would show: results that depend on what was decoded before."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ending_model, tiny_model
from torch import Tensor

from dllm_engine import Engine, LearnedFilter, LLaDA, decode, end_of_text, generate, graphs, likelihood, ops
from dllm_engine.graphs import BlockCalls
from dllm_engine.options import Options
from dllm_engine.policies import RULES, AdaBlock, Credit, FreeDave, Learn2PD, Policy, Prophet, Threshold, TokenEditing
from dllm_engine.state import BlockState
from dllm_engine.stats import RowStats

PROMPTS = [[7, 3, 22, 41], [12], [5, 5, 9], [3, 4, 5, 6, 7]]


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Block calls of a fixed size, kernel by kernel, as on a GPU without graphs."""
    monkeypatch.setattr(graphs, "supported", lambda forward, options: options.cache.name == "dual")
    monkeypatch.setattr(BlockCalls, "captures", False)


# -- cache slots ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fixed")
def test_a_planned_call_forgets_slots_that_moved() -> None:
    """Block calls move a sequence to another slot; a refresh planned before must not be made again as it was."""
    model = tiny_model()
    first, second = [7, 3, 22, 41], [9, 8, 7]
    settings: dict[str, Any] = {
        "gen_length": 16, "block_length": 16, "cache": "dual", "policy": "topk", "end_of_text": "off"
    }  # fmt: skip
    found = {}
    with torch.inference_mode(), Engine(model, max_batch=2, max_length=24) as engine:
        options = Options.resolve(model, longest_prompt=1, **settings)
        with engine.scheduler(options) as scheduler:
            running = scheduler.admit(0, first, 0)
            scheduler.step()
            scheduler.admit(1, second, 0)
            scheduler.step()
            scheduler.cancel(running)
            running = scheduler.admit(2, first, 0)
            for _ in range(3):
                scheduler.step()
            scheduler.cancel(running)
            scheduler.step()  # the second sequence alone: it takes the first slot
            assert scheduler.loop.forward.slots == [1, 0]
            scheduler.admit(3, first, 0)  # as long as before and in the same row
            while scheduler.running:
                found |= {result.index: result.sequence.tolist() for result in scheduler.step()}
    for name, prompt in ((1, second), (3, first)):
        assert found[name] == decode(model, [prompt], **settings).sequences[0].tolist(), name


@pytest.mark.usefixtures("fixed")
def test_refreshes_within_a_block_of_a_batch() -> None:
    model = ending_model(n_kv_heads=2)
    prompts = [[17, 31, 23], [11, 24, 31, 42, 42], [32, 50, 15]]
    settings: dict[str, Any] = {"gen_length": 32, "block_length": 32, "cache": "dual/2", "policy": "threshold=0.5"}
    out = decode(model, prompts, **settings)
    for prompt, row in zip(prompts, out.sequences, strict=True):
        alone = decode(model, [prompt], **settings).sequences[0]
        assert torch.equal(row[-len(alone) :], alone)


# -- results are the caller's -----------------------------------------------------------------------------------------


def test_results_are_ordinary_tensors() -> None:
    """Not of inference mode: they can be changed, and stand in a loss."""
    model = ending_model()
    told: list[Tensor] = []
    out = decode(model, [[4, 5]], gen_length=8, block_length=8, streamer=lambda index, tokens: told.append(tokens))
    made = generate(model, torch.tensor([[4, 5]]), steps=8, gen_length=8, block_length=8)
    with Engine(model, max_batch=1, max_length=16) as engine:
        (many,) = engine.generate_many([[4, 5]], gen_length=8, block_length=8)
    for tensor in (out.sequences, out.sequence_passes, out.generated_tokens, out.tokens_per_forward, made, *told):
        tensor[..., 0] = 5
    many.sequence[0] = 5
    model.requires_grad_(True)
    model(out.sequences).logsumexp(-1).sum().backward()
    assert model.wte.weight.grad is not None


# -- rules with a memory ----------------------------------------------------------------------------------------------

MAKE: dict[str, Any] = {
    "credit": lambda: Credit(0.5),
    "editing": lambda: TokenEditing(0.5, 0.3),
    "adablock": lambda: AdaBlock(0.4, 0.1, 0.5, 3, delimiters=[40, 17, 8, 23]),
    "freedave": lambda: FreeDave(4),
}


@pytest.mark.parametrize("name", MAKE)
def test_one_rule_in_two_decodes_at_once(name: str) -> None:
    model, other = ending_model(), ending_model()
    settings: dict[str, Any] = {"gen_length": 16, "block_length": 8}
    alone = [decode(model, [p], policy=MAKE[name](), **settings).sequences[0].tolist() for p in PROMPTS]
    rule = MAKE[name]()
    with Engine(model, max_batch=2, max_length=32) as engine:
        for result in engine.generate_many(PROMPTS, policy=rule, seed=0, **settings):
            assert result.sequence.tolist() == alone[result.index]
            decode(other, [[9] * 20, [9, 9, 9], [1, 2, 3]], policy=rule, **settings)


class Counting(Policy):
    """A user's rule that writes down what it did."""

    asked = 0

    def select(self, stats: RowStats, state: BlockState) -> Tensor:
        self.asked += 1
        return stats.confidence >= 0.5


def test_what_a_rule_notes_is_there_afterwards() -> None:
    rule, passes = Counting(), 0
    for _ in range(2):
        passes += decode(ending_model(), PROMPTS, policy=rule, gen_length=16, block_length=8).forward_passes
    assert rule.asked == passes


def test_one_rule_in_threads() -> None:
    settings: dict[str, Any] = {"gen_length": 32, "block_length": 8}
    models = [ending_model(), ending_model()]
    expected = [decode(models[0], [p], policy=Credit(0.5), **settings).sequences for p in PROMPTS]
    rule, failures = Credit(0.5), []

    def work(model: LLaDA) -> None:
        try:
            for _ in range(3):
                for prompt, tokens in zip(PROMPTS, expected, strict=True):
                    if not torch.equal(decode(model, [prompt], policy=rule, **settings).sequences, tokens):
                        failures.append(str(prompt))
        except Exception as error:
            failures.append(repr(error))

    threads = [threading.Thread(target=work, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# -- bans -------------------------------------------------------------------------------------------------------------


class Writes(Policy):
    """Writes an id of its own at the fourth position."""

    def __init__(self, token: int) -> None:
        self.token = token

    def tokens(self, stats: RowStats, state: BlockState) -> Tensor:
        return torch.where(state.positions == 3, self.token, stats.token)


@pytest.mark.parametrize("token", [59, 62, 999, -7])  # the mask, a row of padding, none at all
@pytest.mark.parametrize("draft", [False, True])
def test_a_rule_cannot_write_what_is_banned(token: int, draft: bool) -> None:
    model = tiny_model()
    rule: Policy = FreeDave(4, rule=Writes(token)) if draft else Writes(token)
    with pytest.raises(RuntimeError, match=r"sequence 0 at position 5: .* or .*Writes.* gave a NaN score or an id"):
        decode(model, [[4, 5]], policy=rule, gen_length=8, block_length=8)
    rule = FreeDave(4, rule=Writes(33)) if draft else Writes(33)
    assert decode(model, [[4, 5]], policy=rule, gen_length=8, block_length=8).sequences[0, 5] == 33


def test_a_failure_in_the_last_column_is_told() -> None:
    with pytest.raises(RuntimeError, match="sequence 0 at position 5: "):
        decode(tiny_model(), [[4, 5]], policy=Writes(59), gen_length=4, block_length=4)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_probes_of_ids_that_there_are_not(backend: str) -> None:
    class Probing(Policy):
        seen: Tensor

        def probes(self, state: BlockState) -> Tensor:
            return torch.tensor([-1, 5, 10**6]).expand(*state.columns.shape, 3)

        def select(self, stats: RowStats, state: BlockState) -> Tensor:
            Probing.seen = stats.probe_logits
            return super().select(stats, state)

    decode(tiny_model(), [[4, 5]], policy=Probing(), gen_length=8, block_length=8, backend=backend)
    assert Probing.seen[..., 0].eq(-torch.inf).all()
    assert Probing.seen[..., 1].isfinite().all()
    assert Probing.seen[..., 2].eq(-torch.inf).all()


def test_rows_are_not_wrapped() -> None:
    hidden, head = torch.randn(4, 8), torch.randn(20, 8)
    with pytest.raises(ValueError, match="rows"):
        ops.row_stats(hidden, head, torch.tensor([2**32 + 1]))


# -- what lies behind -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["dual/never", "dual/5", "dual"])
@pytest.mark.parametrize("extra", [{}, {"cfg_scale": 0.8}], ids=str)
def test_looking_ahead_leaves_no_keys(monkeypatch: pytest.MonkeyPatch, cache: str, extra: dict[str, Any]) -> None:
    """An end that is never predicted changes nothing, whatever the cache holds of the columns looked at."""
    model = ending_model()
    monkeypatch.setattr(end_of_text, "CONFIDENCE", 2.0)
    settings: dict[str, Any] = {"gen_length": 40, "block_length": 8, "cache": cache, "policy": "threshold=0.5"} | extra
    for prompts in (PROMPTS, PROMPTS[:1], PROMPTS[1:3]):
        committed, predicted = (decode(model, prompts, end_of_text=e, **settings) for e in ("committed", "predicted"))
        assert torch.equal(committed.sequences, predicted.sequences)


def test_nan_is_gone_after_an_iterator_that_was_closed() -> None:
    model = ending_model(4)
    model.wte.weight[50] = float("nan")
    settings: dict[str, Any] = {"gen_length": 8, "block_length": 8, "policy": "topk", "steps": 1, "end_of_text": "off"}
    with Engine(model, max_batch=2, max_length=40) as engine:
        iterator = engine.generate_many([[3, 4, 5], [50] * 32], **settings)
        assert next(iterator).index == 0  # the step in which the other prompt failed
        iterator.close()  # type: ignore[attr-defined]
        assert engine._buffers is not None
        assert not any(flat.isnan().any() for flat in engine._buffers._flat.values())
        prompts = [[3], [9] * 30, [4, 4], [7] * 20]
        for result in engine.generate_many(prompts, seed=0, **settings):
            alone = decode(model, [prompts[result.index]], seed=0, **settings).sequences[0]
            assert result.sequence.tolist() == alone.tolist()


def test_waiting_ends_of_the_rule_that_drafts() -> None:
    rule = FreeDave(4, rule=Threshold(0.5))
    rule.ends_wait = True
    assert rule.ends_wait
    assert rule.rule_.ends_wait


# -- what a program has set for all of torch --------------------------------------------------------------------------


@pytest.fixture(params=[torch.float64, torch.bfloat16], ids=str)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """Set by the test itself, when it has what float32 gives."""
    yield request.param
    torch.set_default_dtype(torch.float32)


def every_rule(filter_file: Path) -> dict[str, Policy]:
    named = {name: RULES[name]() for name in RULES if name not in ("learn2pd", "prophet", *MAKE)}
    made = {name: make() for name, make in MAKE.items()}
    return named | made | {"learn2pd": Learn2PD(str(filter_file)), "prophet": Prophet(2.3, 1.7, 1.1)}


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("kind", ["block", "position"])
def test_the_default_dtype_changes_nothing(default_dtype: torch.dtype, backend: str, kind: str, tmp_path: Path) -> None:
    """Buffers of that type were handed to C++ as float32: half as long, in bfloat16."""
    torch.manual_seed(0)
    LearnedFilter(8, kind=kind, threshold=0.5).save_pretrained(tmp_path)
    settings: dict[str, Any] = {"gen_length": 16, "block_length": 8, "seed": 3, "backend": backend}
    model = ending_model()

    def outputs() -> dict[str, Any]:
        return {
            name: decode(model, PROMPTS, policy=rule, temperature=0.0 if rule.greedy else 0.7, **settings)
            for name, rule in every_rule(tmp_path).items()
        }

    expected = outputs()
    torch.set_default_dtype(default_dtype)
    for name, out in outputs().items():
        assert torch.equal(out.sequences, expected[name].sequences), name
        assert torch.equal(out.tokens_per_forward, expected[name].tokens_per_forward), name


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_statistics_are_float32_under_any_default(default_dtype: torch.dtype, backend: str) -> None:
    hidden, head, rows = torch.randn(40, 16), torch.randn(200, 16), torch.arange(40, dtype=torch.int32)
    probes = torch.arange(160).view(40, 4)
    expected = ops.row_stats(hidden, head, rows, probe_ids=probes, backend=backend)
    torch.set_default_dtype(default_dtype)
    found = ops.row_stats(hidden, head, rows, probe_ids=probes, backend=backend)
    for before, after in zip(expected.fields(), found.fields(), strict=True):
        assert after.dtype == before.dtype
        assert torch.equal(after, before)


@pytest.mark.parametrize("policy", ["threshold=0.61", "factor=1.3", "entropy", "hierarchical=0.61/0.32"])
def test_the_default_device_is_not_the_models(policy: str) -> None:
    """A program on a GPU sets it and decodes on the CPU all the same; "meta" stands in for the GPU."""
    model, settings = ending_model(), {"gen_length": 16, "block_length": 8, "policy": policy}
    with torch.device("meta"):
        out = decode(model, PROMPTS, **settings)
        (found,) = likelihood.log_likelihood(model, [[4, 5]], [[3] * 20], samples=4)
    assert torch.equal(out.sequences, decode(model, PROMPTS, **settings).sequences)
    assert [found] == list(likelihood.log_likelihood(model, [[4, 5]], [[3] * 20], samples=4))


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_autocast_changes_nothing(backend: str, cache: str) -> None:
    """The model's type decides. Keys of autocast's did not fit the cache, and without a cache other tokens came."""
    model = ending_model()
    settings: dict[str, Any] = {"gen_length": 16, "block_length": 4, "cache": cache, "policy": "threshold=0.5"}
    target = [[4, 5, 6]], [[3, 9, 12]]
    expected = decode(model, PROMPTS, **settings).sequences
    (likely,) = likelihood.log_likelihood(model, *target)
    with torch.autocast("cpu", dtype=torch.bfloat16), Engine(model, max_batch=2, max_length=24) as engine:
        assert torch.equal(decode(model, PROMPTS, backend=backend, **settings).sequences, expected)
        for result in engine.generate_many(PROMPTS, backend=backend, **settings):
            assert torch.is_autocast_enabled("cpu")
            assert result.sequence.tolist() == expected[result.index, -len(result.sequence) :].tolist()
        (found,) = likelihood.log_likelihood(model, *target, backend=backend)
        assert found.value == pytest.approx(likely.value)

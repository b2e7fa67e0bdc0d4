"""Many prompts: they come and go in a running batch, and no answer changes."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ending_model, tiny_model
from test_engine import SHORT, some_prompts
from torch import Tensor

from dllm_engine import Engine, Generated, LearnedFilter, LLaDA, decode
from dllm_engine.policies import Factor, Learn2PD, Policy, Random, Threshold
from dllm_engine.state import BlockState
from dllm_engine.stats import RowStats

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def model() -> LLaDA:
    """Random, in float32, with end ids that come up now and then."""
    return ending_model()


def same(one: Generated, model: LLaDA, prompt: list[int], seed: int, **settings: Any) -> None:
    """One result equals the decode of its prompt alone."""
    alone = decode(model, [prompt], seed=seed + one.index, **settings)
    assert one.sequence.tolist() == alone.sequences[0].tolist(), f"prompt {one.index}"
    assert (one.prompt_length, one.seed) == (len(prompt), seed + one.index)
    assert one.passes == alone.sequence_passes[0]
    assert one.generated_tokens == alone.generated_tokens[0]
    assert one.tokens_per_forward == pytest.approx(float(alone.tokens_per_forward[0]))
    assert one.generated.tolist() == alone.sequences[0, len(prompt) :].tolist()


def drain(results: Iterator[Generated], done: list[Generated]) -> None:
    """Keep every result until the iterator raises."""
    while (one := next(results, None)) is not None:
        done.append(one)


def _learned() -> Policy:
    return Learn2PD(LearnedFilter.from_pretrained(GOLDEN / "filter.safetensors", force=True), 0.7)


def _position() -> Policy:
    """Decides by what was predicted the step before, too."""
    learned = LearnedFilter(kind="position", hidden=8)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in learned.parameters():
            parameter.normal_(std=1.5, generator=generator)
    return Learn2PD(learned, 0.5)


class Stable(Policy):
    """Commits what the step before predicted, too."""

    name = "stable"

    def select(self, stats: RowStats, state: BlockState) -> Tensor:
        return stats.token == state.predicted


MIXES: dict[str, dict[str, Any]] = {
    "threshold": {"policy": Threshold(0.5)},
    "prefix": {"policy": Threshold(0.5), "cache": "prefix"},
    "none": {"policy": Factor(1.5), "cache": "none"},
    "learn2pd": {"policy": _learned()},
    "position": {"policy": _position()},
    "stable": {"policy": Stable()},
    "drawn": {"policy": Random(), "temperature": 0.8, "cache": "dual"},
    "static": {"policy": "topk", "steps": 12, "temperature": 0.7},
    "guided": {"policy": Threshold(0.5), "cfg_scale": 0.8},
    "guided prefix": {"policy": "topk", "cfg_scale": 0.8, "cache": "prefix"},
    "predicted": {"policy": Threshold(0.5), "end_of_text": "predicted"},
    "everything": {"policy": Factor(1.0), "end_of_text": "off"},
}


@pytest.mark.parametrize("mix", MIXES)
def test_every_answer_equals_the_decode_alone(model: LLaDA, mix: str) -> None:
    settings = {"gen_length": 24, "block_length": 8} | MIXES[mix]
    prompts = some_prompts(23, seed=len(mix))
    with Engine(model, max_batch=3, max_length=40) as engine:
        results = list(engine.generate_many(prompts, seed=70, **settings))
    assert sorted(one.index for one in results) == list(range(23))
    for one in results:
        same(one, model, prompts[one.index], 70, **settings)
    ended = sum(one.generated_tokens < 24 for one in results)
    assert ended > 0 or mix.startswith("guided"), "no end of text came up: the test would prove less"


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_prompts_that_take_one_pass_each(model: LLaDA, cache: str) -> None:
    """The same row, block and call as the prompt before, but not the same padding."""
    prompts = some_prompts(8)
    settings: dict[str, Any] = {"gen_length": 8, "block_length": 8, "policy": Threshold(0.0), "cache": cache}
    with Engine(model, max_batch=1, max_length=24) as engine:
        for one in engine.generate_many(prompts, seed=0, **settings):
            assert one.passes == 1
            same(one, model, prompts[one.index], 0, **settings)


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_equally_long_prompts_that_end_at_different_places(model: LLaDA, cache: str) -> None:
    """Without padding to hide, keys behind the end of one text must still be hidden from it."""
    prompts = torch.randint(2, 59, (24, 4), generator=torch.Generator().manual_seed(2))
    settings: dict[str, Any] = {"gen_length": 32, "block_length": 8, "policy": Threshold(0.5), "cache": cache}
    out = decode(model, prompts, **settings)
    for i, prompt in enumerate(prompts):
        assert torch.equal(decode(model, prompt[None], **settings).sequences[0], out.sequences[i]), f"sequence {i}"
    assert len(set(out.generated_tokens.tolist())) > 1


def test_nothing_is_left_of_the_decode_before(model: LLaDA) -> None:
    """A rule that asks for the last prediction would take the decode before for its own."""
    with Engine(model, max_batch=2, max_length=24) as engine:
        first, second = (engine.decode([[4, 5], [6]], policy=Stable(), **SHORT) for _ in range(2))
        many = list(engine.generate_many([[4, 5]] * 4, policy=Stable(), **SHORT))
    assert first.sequence_passes.tolist() == second.sequence_passes.tolist()
    assert torch.equal(first.sequences, second.sequences)
    assert {one.passes for one in many} == {int(first.sequence_passes[0])}


def test_more_rows_than_prompts_and_prompts_of_every_kind(model: LLaDA) -> None:
    prompts = some_prompts(5)
    given = [
        torch.tensor(prompts[0]),
        tuple(prompts[1]),
        prompts[2],
        torch.tensor(prompts[3], dtype=torch.int32),
        prompts[4],
    ]
    with Engine(model, max_batch=8, max_length=40) as engine:
        results = list(engine.generate_many(iter(given), seed=4, **SHORT))
        assert list(engine.generate_many([], **SHORT)) == []
        drawn = next(engine.generate_many(prompts[:1], temperature=1.0, **SHORT))
        same(drawn, model, prompts[0], drawn.seed, temperature=1.0, **SHORT)
    assert len(results) == 5
    for one in results:
        same(one, model, prompts[one.index], 4, **SHORT)


def test_seeds_of_their_own(model: LLaDA) -> None:
    prompts, seeds = some_prompts(7), [90, 3, 3, 41, 0, 12, 7]
    with Engine(model, max_batch=3, max_length=40) as engine:
        for one in engine.generate_many(prompts, seed=seeds, temperature=1.0, **SHORT):
            assert one.seed == seeds[one.index]
            same(one, model, prompts[one.index], one.seed - one.index, temperature=1.0, **SHORT)
        done: list[Generated] = []
        with pytest.raises(ValueError, match="seed: 2 seeds given; prompt 2 has none"):
            drain(engine.generate_many(prompts, seed=seeds[:2], **SHORT), done)
        assert {one.index for one in done} == {0, 1}
        for wrong in (-1, [1, -1], [1.5]):
            with pytest.raises((ValueError, TypeError), match="seed"):
                engine.generate_many(prompts, seed=wrong, **SHORT)  # type: ignore[arg-type]


def test_rows_stay_busy_and_prompts_are_read_as_late_as_possible(model: LLaDA) -> None:
    """An answer comes as soon as it is finished, and its row goes to the next prompt: no wait for the whole batch."""
    prompts, taken, ahead = some_prompts(30), 0, []

    def source() -> Iterator[list[int]]:
        nonlocal taken
        for prompt in prompts:
            taken += 1
            yield prompt

    with Engine(model, max_batch=3, max_length=40) as engine:
        results = []
        for one in engine.generate_many(source(), policy=Threshold(0.6), **SHORT):
            results.append(one)
            ahead.append(taken - len(results))
    assert max(ahead) <= 3
    assert [one.index for one in results] != list(range(30)), "completion was in order: the test would prove less"
    calls = sum(one.passes for one in results)
    assert calls > 30


def test_rows_join_calls_together(model: LLaDA, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    forward = model.hidden_states

    def counted(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return forward(*arguments)

    monkeypatch.setattr(model, "hidden_states", counted)
    with Engine(model, max_batch=4, max_length=40) as engine:
        results = list(engine.generate_many(some_prompts(24), policy="topk", **SHORT))
    assert calls < 0.5 * sum(one.passes for one in results)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ([5] * 25, ValueError, "prompts: prompt 4 has 25 tokens; 24 fit the engine's max_length"),
        ([], ValueError, "prompts: prompt 4 is empty"),
        ([3, True], TypeError, "prompts: prompt 4 holds something other than ints"),
        (["a"], TypeError, "prompts: prompt 4 holds something other than ints"),
        ("text", TypeError, "prompts: prompt 4 is a str"),
        (None, TypeError, "prompts: prompt 4 is a NoneType"),
        ([64], ValueError, "prompts: prompt 4: id 64 given; the model has ids 0 to 63"),
        ([-1], ValueError, "prompts: prompt 4: id -1 given"),
        (torch.zeros(1, 3, dtype=torch.int64), ValueError, r"prompts: prompt 4 has shape \[1, 3\]"),
        (torch.zeros(3), ValueError, r"prompts: prompt 4 has shape \[3\] and torch.float32"),
    ],
    ids=str,
)
def test_a_bad_prompt_is_named_after_all_before_it_are_done(
    model: LLaDA, bad: Any, error: type[Exception], message: str
) -> None:
    prompts = some_prompts(7)
    given = [*prompts[:4], bad, *prompts[4:]]
    done: list[Generated] = []
    with Engine(model, max_batch=3, max_length=40) as engine:
        with pytest.raises(error, match=message):
            drain(engine.generate_many(given, seed=0, **SHORT), done)
        assert sorted(one.index for one in done) == [0, 1, 2, 3]
        for one in (*done, *engine.generate_many(prompts, seed=0, **SHORT)):
            same(one, model, prompts[one.index], 0, **SHORT)


def test_prompts_that_raise_and_interruptions(model: LLaDA, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = some_prompts(9)

    def source(error: BaseException) -> Iterator[list[int]]:
        yield from prompts[:6]
        raise error

    engine = Engine(model, max_batch=2, max_length=40)
    done: list[Generated] = []
    with pytest.raises(OSError, match="the disk is gone"):
        drain(engine.generate_many(source(OSError("the disk is gone")), **SHORT), done)
    assert sorted(one.index for one in done) == list(range(6))

    done.clear()
    with pytest.raises(KeyboardInterrupt):  # at once: nothing that has begun is finished first
        drain(engine.generate_many(source(KeyboardInterrupt()), **SHORT), done)
    assert done

    forward, calls = model.hidden_states, 0

    def interrupted(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise KeyboardInterrupt
        return forward(*arguments)

    done.clear()
    monkeypatch.setattr(model, "hidden_states", interrupted)
    with pytest.raises(KeyboardInterrupt):
        drain(engine.generate_many(prompts, seed=0, policy="topk", **SHORT), done)
    assert done
    for one in (*done, *engine.generate_many(prompts, seed=0, policy="topk", **SHORT)):
        same(one, model, prompts[one.index], 0, policy="topk", **SHORT)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_nan_is_named_and_leaves_nothing_behind(cache: str) -> None:
    """A masked key with NaN would still make its row NaN, so what a failed call left must not be read."""
    model = tiny_model(seed=5)
    clean = tiny_model(seed=5)
    model.lm_head[33] = clean.lm_head[33] = 0.0  # not to be generated
    model.wte.weight[33] = float("nan")
    prompts = [[4, 5, 6], [7], [8, 33, 9, 10], [11, 12]]
    engine = Engine(model, max_batch=4, max_length=24, cache=cache)
    with pytest.raises(RuntimeError, match=r"no valid token for prompt 2 at position 4:"):
        list(engine.generate_many(prompts, **SHORT))
    with pytest.raises(RuntimeError, match=r"no valid token for sequence 2 at position 4:"):
        engine.decode(prompts, **SHORT)
    with pytest.raises(RuntimeError, match=r"no valid token for prompt 0 at position 8:"):
        list(engine.generate_many([[33] * 8] * 4, **SHORT))
    # short prompts first: when a long one comes, its mates have columns that only the failed call wrote
    good = [[4], [5], [6, 7], [3], *some_prompts(12, longest=8)]
    good = [[4 if token == 33 else token for token in prompt] for prompt in good]
    settings: dict[str, Any] = {"policy": Threshold(0.5), "cache": cache, **SHORT}
    for one in engine.generate_many(good, seed=0, **settings):
        same(one, clean, good[one.index], 0, **settings)


def test_memory_stays_bounded(model: LLaDA) -> None:
    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    counts, sizes = [], []
    with Engine(model, max_batch=3, max_length=40) as engine:
        for i, one in enumerate(engine.generate_many(some_prompts(60), policy=Threshold(0.5), **SHORT)):
            del one
            if i % 10 == 9:
                counts.append(tensors())
                sizes.append(engine.nbytes)
    assert max(counts[1:]) <= counts[0] + 8  # a plan's masks may or may not be needed at the time
    assert len(set(sizes)) == 1


def test_progress_bar(model: LLaDA, capsys: pytest.CaptureFixture[str]) -> None:
    with Engine(model, max_batch=3, max_length=40) as engine:
        assert len(list(engine.generate_many(some_prompts(5), progress=True, **SHORT))) == 5
        assert "5/5" in capsys.readouterr().err
        assert len(list(engine.generate_many(iter(some_prompts(4)), progress=True, **SHORT))) == 4
        assert "4prompt" in capsys.readouterr().err
        list(engine.generate_many(some_prompts(5), **SHORT))
        assert not capsys.readouterr().err


@pytest.mark.slow
def test_ten_thousand_prompts() -> None:
    model = ending_model()
    prompts = some_prompts(10_000, longest=20, seed=9)
    settings: dict[str, Any] = {"gen_length": 16, "block_length": 8, "policy": Threshold(0.5)}

    def resident() -> int:
        text = Path("/proc/self/status").read_text() if Path("/proc/self/status").exists() else "VmRSS: 0"
        return int(text.split("VmRSS:")[1].split()[0])

    sample = set(torch.randperm(10_000, generator=torch.Generator().manual_seed(0))[:200].tolist())
    seen: set[int] = set()
    kept: list[Generated] = []
    memory: list[int] = []
    with Engine(model, max_batch=32, max_length=36) as engine:
        for i, one in enumerate(engine.generate_many(iter(prompts), seed=3, **settings)):
            seen.add(one.index)
            if one.index in sample:
                kept.append(one)
            if i % 1000 == 999:
                memory.append(resident())
    assert seen == set(range(10_000))
    assert memory[-1] - memory[1] < 10_000, f"KiB resident after every 1,000 prompts: {memory}"
    for one in kept:
        same(one, model, prompts[one.index], 3, **settings)

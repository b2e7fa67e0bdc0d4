"""The engine: buffers used again, calls that queue, prompts that come and go without changing an answer."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ending_model, tiny_model
from torch import Tensor

from dllm_engine import Engine, Generated, LearnedFilter, LLaDA, buffers, decode
from dllm_engine.policies import Factor, Learn2PD, Oracle, Policy, Random, Threshold
from dllm_engine.state import BlockState
from dllm_engine.stats import RowStats
from dllm_engine.tokenizer import encode_prompt

GOLDEN = Path(__file__).parent / "golden"
SHORT: dict[str, Any] = {"gen_length": 16, "block_length": 8}


@pytest.fixture(scope="module")
def model() -> LLaDA:
    """Random, in float32, with end ids that come up now and then."""
    return ending_model()


def some_prompts(count: int, longest: int = 12, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(2, 59, (length,), generator=generator).tolist() for length in lengths]


def addresses(engine: Engine) -> dict[str, int]:
    assert engine._buffers is not None
    return {name: flat.data_ptr() for name, flat in engine._buffers._flat.items()}


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


# -- buffers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_calls_share_buffers_and_give_what_fresh_ones_give(model: LLaDA, cache: str) -> None:
    prompts = some_prompts(3)
    with Engine(model, max_batch=3, max_length=28, cache=cache) as engine:
        engine.decode(prompts, **SHORT)
        before, size = addresses(engine), engine.nbytes
        for batch, settings in (
            (prompts, SHORT),
            (prompts[:1], {"gen_length": 8, "block_length": 4}),
            (prompts, SHORT),
        ):
            out = engine.decode(batch, seed=0, **settings)
            fresh = Engine(model, max_batch=3, max_length=28, cache=cache).decode(batch, seed=0, **settings)
            assert torch.equal(out.sequences, fresh.sequences)
        assert sorted(e.index for e in engine.generate_many(prompts, **SHORT)) == [0, 1, 2]
        assert addresses(engine) == before
        assert engine.nbytes == size
        assert ("KV cache" in before) == (cache != "none")
        assert out.settings["cache"] == cache


def test_prefix_and_dual_are_views_of_the_same_bytes(model: LLaDA) -> None:
    engine = Engine(model, max_batch=1, max_length=20)
    before = addresses(engine)["KV cache"]
    config = model.config
    cells = config.n_layers * 2 * config.n_kv_heads * 21 * config.head_dim
    assert engine.nbytes == 4 * cells + 2 * (20 * (8 + 1 + 8) + 8 * 8)  # and the canvas, with an idle row
    for cache in ("prefix", "dual"):
        engine.decode([[4, 5]], cache=cache, **SHORT)
        assert addresses(engine)["KV cache"] == before


def test_the_engine_of_decode_grows_and_is_kept() -> None:
    model = tiny_model(seed=5)
    decode(model, [[4, 5]], **SHORT)
    engine = Engine.kept(model)
    small = engine.nbytes
    decode(model, some_prompts(4), **SHORT)
    grown, at = engine.nbytes, addresses(engine)
    assert small < grown
    decode(model, [[4, 5]], **SHORT)
    decode(model, [list(range(2, 40))], **SHORT)  # longer, but fewer: the same bytes in another shape
    assert Engine.kept(model) is engine
    assert addresses(engine) == at
    decode(model, some_prompts(4), cfg_scale=0.5, **SHORT)
    assert engine.nbytes > grown


def test_a_model_with_an_engine_can_be_copied_and_dies_with_its_last_name() -> None:
    model = tiny_model(seed=5)
    decode(model, [[4, 5]], **SHORT)
    other = copy.deepcopy(model)
    assert Engine.kept(other).nbytes < Engine.kept(model).nbytes  # it did not come along
    gc.disable()
    try:
        gone = weakref.ref(model)
        del model
        assert gone() is None
    finally:
        gc.enable()
    assert decode(other, [[4, 5]], **SHORT).sequences.shape == (1, 18)


def test_results_alias_no_buffer(model: LLaDA) -> None:
    told: list[Tensor] = []
    with Engine(model, max_batch=2, max_length=28) as engine:
        first = engine.decode([[4, 5], [6]], streamer=lambda i, tokens: told.append(tokens), **SHORT)
        many = list(engine.generate_many([[4, 5], [6]], **SHORT))
        kept = [t.clone() for t in (first.sequences, first.sequence_passes, first.generated_tokens)]
        kept += [t.clone() for t in (*told, *(one.sequence for one in many))]
        engine.decode(some_prompts(2, seed=3), policy="topk", temperature=1.0, **SHORT)
        with torch.inference_mode():
            engine._buffers.zero()  # type: ignore[union-attr]
        now = [first.sequences, first.sequence_passes, first.generated_tokens, *told]
        assert all(torch.equal(a, b) for a, b in zip(kept, now + [one.sequence for one in many], strict=True))


def test_memory_is_checked_before_it_is_taken(model: LLaDA, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "available_bytes", lambda device: 100_000)
    config = model.config
    needed = config.n_layers * 2 * 64 * config.n_kv_heads * 1001 * config.head_dim * 4
    with pytest.raises(MemoryError, match=f"KV cache: {needed:,} bytes needed, 100,000 available on cpu"):
        Engine(model, max_batch=64, max_length=1000)
    with pytest.raises(MemoryError, match="KV cache: .* bytes needed"):
        decode(tiny_model(), some_prompts(64), gen_length=128)
    engine = Engine(model, max_batch=2, max_length=28)
    monkeypatch.setattr(buffers, "available_bytes", lambda device: 100)
    with pytest.raises(MemoryError, match="KV cache"):
        engine.decode([[4], [5]], cfg_scale=1.0, **SHORT)
    monkeypatch.setattr(buffers, "available_bytes", lambda device: None)  # a system that does not tell
    assert engine.decode([[4], [5]], **SHORT).sequences.shape == (2, 17)


def test_available_bytes() -> None:
    available = buffers.available_bytes(torch.device("cpu"))
    if Path("/proc/meminfo").exists():
        assert available is not None
        assert 2**20 < available < 2**50
    assert buffers.available_bytes(torch.device("meta")) is None


# -- one user at a time ---------------------------------------------------------------------------------------------


def test_calls_from_threads_queue() -> None:
    model = tiny_model(seed=5)
    prompts = some_prompts(8, seed=1)
    expected = [decode(model, [p], policy="topk", **SHORT).sequences for p in prompts]
    model = tiny_model(seed=5)  # its engine is made by whichever thread comes first
    found: dict[int, list[Tensor]] = {i: [] for i in range(len(prompts))}
    barrier = threading.Barrier(len(prompts))

    def work(i: int) -> None:
        barrier.wait()
        for _ in range(3):
            found[i].append(decode(model, [prompts[i]], policy="topk", **SHORT).sequences)

    threads = [threading.Thread(target=work, args=(i,)) for i in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, sequences in found.items():
        assert len(sequences) == 3
        assert all(torch.equal(s, expected[i]) for s in sequences)


def test_a_closed_engine_raises(model: LLaDA) -> None:
    with Engine(model, max_batch=1, max_length=20) as engine:
        engine.decode([[4, 5]], **SHORT)
    assert engine.nbytes == 0
    with pytest.raises(RuntimeError, match="this engine is closed"):
        engine.decode([[4, 5]], **SHORT)
    with pytest.raises(RuntimeError, match="this engine is closed"):
        next(engine.generate_many([[4, 5]], **SHORT))
    engine.close()
    engine = Engine(model, max_batch=1, max_length=20)
    results = engine.generate_many([[4, 5], [6]], **SHORT)
    next(results)
    engine.close()
    with pytest.raises(RuntimeError, match="this engine was closed"):
        next(results)


def test_an_open_iterator_keeps_the_engine(model: LLaDA) -> None:
    engine = Engine(model, max_batch=1, max_length=20)
    results = engine.generate_many([[4, 5], [6], [7]], **SHORT)
    engine.decode([[4, 5]], **SHORT)  # it has not begun
    next(results)
    with pytest.raises(RuntimeError, match="busy: finish or close the iterator"):
        engine.decode([[4, 5]], **SHORT)
    with pytest.raises(RuntimeError, match="busy"):
        next(engine.generate_many([[4, 5]], **SHORT))
    assert decode(model, [[6]], **SHORT).sequences.shape == (1, 17)  # the model's own engine is another
    results.close()  # type: ignore[attr-defined]
    engine.decode([[4, 5]], **SHORT)
    with pytest.raises(RuntimeError, match="busy"):
        engine.decode([[4, 5]], streamer=lambda i, tokens: engine.decode([[4, 5]], **SHORT), **SHORT)
    engine.decode([[4, 5]], **SHORT)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_batch": 0}, ValueError, "max_batch: 0 given; an int of at least 1"),
        ({"max_length": 2.0}, ValueError, "max_length: 2.0 given"),
        ({"cache": "half"}, ValueError, "cache: 'half' given; known: none, prefix, dual"),
        ({"backend": "abacus"}, ValueError, "backend: 'abacus' given"),
    ],
)
def test_bad_engines(model: LLaDA, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Engine(model, **({"max_batch": 1, "max_length": 20} | arguments))


def test_a_call_beyond_the_engine_is_refused(model: LLaDA) -> None:
    engine = Engine(model, max_batch=2, max_length=20)
    with pytest.raises(ValueError, match="3 sequences of 17 columns given; this engine was made for 2 of 20"):
        engine.decode([[4]] * 3, **SHORT)
    with pytest.raises(ValueError, match="1 sequences of 21 columns given"):
        engine.decode([[4] * 5], **SHORT)
    with Engine(tiny_model(max_sequence_length=20), max_batch=1, max_length=99) as larger:
        (fits,) = larger.generate_many([[4] * 4], **SHORT)
        assert len(fits.sequence) == 20
        with pytest.raises(ValueError, match="prompt 0 has 5 tokens; 4 fit"):
            list(larger.generate_many([[4] * 5], **SHORT))
    for name, value, error in (("gen_length", 20, "gen_length: 20 given; max_length 20 leaves no room"),):
        with pytest.raises(ValueError, match=error):
            engine.generate_many([[4]], block_length=4, **{name: value})
    with pytest.raises(ValueError, match="policy: Oracle belongs to one batch"):
        engine.generate_many([[4]], policy=Oracle(torch.zeros(2, 16, dtype=torch.int64)), **SHORT)
    with pytest.raises(TypeError, match="prompts: int given; an iterable"):
        engine.generate_many(3, **SHORT)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="streamer: int given; generate_many takes a callable"):
        engine.generate_many([[4]], streamer=3, **SHORT)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="temperature: -1 given"):
        engine.generate_many([[4]], temperature=-1, **SHORT)


# -- many prompts ---------------------------------------------------------------------------------------------------


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
        ([64], ValueError, "prompts: prompt 4 holds id 64; the model has ids 0 to 63"),
        ([-1], ValueError, "prompts: prompt 4 holds id -1"),
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


# -- streamers ------------------------------------------------------------------------------------------------------


def test_a_callable_hears_of_every_block_of_a_batch(model: LLaDA) -> None:
    heard: dict[int, list[list[int]]] = {i: [] for i in range(4)}
    prompts = some_prompts(4)
    settings: dict[str, Any] = {"gen_length": 32, "block_length": 8, "policy": Threshold(0.5)}
    for end_of_text in ("off", "committed", "predicted"):
        for blocks in heard.values():
            blocks.clear()
        out = decode(
            model, prompts, end_of_text=end_of_text, streamer=lambda i, t: heard[i].append(t.tolist()), **settings
        )
        for i, blocks in heard.items():
            generated, count = out.sequences[i, -32:].tolist(), int(out.generated_tokens[i])
            whole = 32 if end_of_text == "off" else min(count + 1, 32)
            assert [t for block in blocks for t in block] == generated[
                :whole
            ]  # to the end of the text, with the token that ends it
            assert all(len(block) == 8 for block in blocks[:-1])
            if end_of_text == "off":
                assert len(blocks) == 4
        assert torch.equal(out.sequences, decode(model, prompts, end_of_text=end_of_text, **settings).sequences)


def test_a_callable_hears_the_end_that_was_predicted(demo_model: LLaDA) -> None:
    """Also where it is the first token behind a block, and no pass will come to it."""
    names = ["Alan Wells", "Grace Wright", "Amy Fox", "Louis Price", "Rose Stewart"]
    questions = ["Copy: " + ", ".join(f"{i} {name}" for i, name in enumerate(names[:n])) for n in range(2, 6)]
    prompts = [encode_prompt(demo_model.tokenizer, question, chat=True) for question in questions]
    behind_a_block = 0
    for block_length in (2, 4, 8):
        heard: dict[int, list[int]] = {i: [] for i in range(len(prompts))}
        settings: dict[str, Any] = {"gen_length": 64, "block_length": block_length, "policy": "threshold"}
        out = decode(
            demo_model,
            prompts,
            end_of_text="predicted",
            streamer=lambda i, tokens, heard=heard: heard[i].extend(tokens.tolist()),
            **settings,
        )
        for i, count in enumerate(out.generated_tokens.tolist()):
            behind_a_block += count % block_length == 0
            assert heard[i] == out.sequences[i, -64:][: count + 1].tolist()
    assert behind_a_block


@pytest.mark.parametrize("threshold", [0.5, 0.0])
def test_a_callable_hears_of_many_prompts_by_index(model: LLaDA, threshold: float) -> None:
    heard: dict[int, list[int]] = {}
    prompts = some_prompts(12)

    def streamer(index: int, tokens: Tensor) -> None:
        assert tokens.dtype == torch.int64
        heard.setdefault(index, []).extend(tokens.tolist())

    with Engine(model, max_batch=3, max_length=40) as engine:
        for one in engine.generate_many(prompts, policy=Threshold(threshold), streamer=streamer, **SHORT):
            told = heard[one.index]
            assert told == one.generated[: len(told)].tolist()
            assert len(told) == min(one.generated_tokens + 1, 16)
    assert sorted(heard) == list(range(12))


def test_a_streamer_that_raises(model: LLaDA) -> None:
    def broken(index: int, tokens: Tensor) -> None:
        raise ValueError(f"no paper for {index}")

    expected = decode(model, [[4, 5], [6]], **SHORT).sequences
    engine = Engine(model, max_batch=2, max_length=20)
    with pytest.raises(ValueError, match="no paper for"):
        engine.decode([[4, 5], [6]], streamer=broken, **SHORT)
    with pytest.raises(ValueError, match="no paper for"):
        list(engine.generate_many([[4, 5], [6]], streamer=broken, **SHORT))
    assert torch.equal(engine.decode([[4, 5], [6]], **SHORT).sequences, expected)
    with pytest.raises(ValueError, match="no paper for"):
        decode(model, [[4, 5], [6]], streamer=broken, **SHORT)
    assert torch.equal(decode(model, [[4, 5], [6]], **SHORT).sequences, expected)

"""The engine: buffers used again, calls that queue, streamers."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ending_model, tiny_model
from torch import Tensor

from dllm_engine import Engine, LLaDA, buffers, decode
from dllm_engine.policies import Oracle, Threshold
from dllm_engine.tokenizer import encode_prompt

ROOT = Path(__file__).resolve().parent.parent

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
    with pytest.raises(RuntimeError, match="a streamer cannot call the engine"):
        engine.decode([[4, 5]], streamer=lambda i, tokens: engine.decode([[4, 5]], **SHORT), **SHORT)
    engine.decode([[4, 5]], **SHORT)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_batch": 0}, ValueError, "max_batch: 0 given; at least 1 is needed"),
        ({"max_length": 2.0}, TypeError, "max_length: 2.0 given"),
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


def test_an_iterator_that_nobody_finished_ends_with_the_interpreter() -> None:
    script = """
import sys
sys.path.insert(0, "tests")
from conftest import tiny_model
from dllm_engine import Engine
engine = Engine(tiny_model(), max_batch=2, max_length=40)
results = engine.generate_many([[1, 2, 3]] * 20, gen_length=32)
next(results)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_interrupt_leaves_no_engine_busy(model: LLaDA) -> None:
    """On whatever line of the lending it comes."""
    lines: list[int] = []

    def run_until(stop: int | None) -> None:
        lent = False

        def trace(frame: Any, event: str, argument: Any) -> Any:
            nonlocal lent
            if frame.f_code.co_name == "_lent" and not lent:
                lent = event == "return"  # the yield
                lines.append(frame.f_lineno)
                if frame.f_lineno == stop:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            decode(model, [[4, 5]], gen_length=8, block_length=8)
        finally:
            sys.settrace(None)

    run_until(None)
    assert len(lines) > 5
    for line in sorted({*lines}):
        with pytest.raises(KeyboardInterrupt):
            run_until(line)
        decode(model, [[4, 5]], gen_length=8, block_length=8)

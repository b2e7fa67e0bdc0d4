"""When cached keys are computed anew: texts, objects, and what each must equal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import ending_model, tiny_model

from dllm_engine import Engine, LLaDA, decode
from dllm_engine.forward import Forward
from dllm_engine.policies import Threshold
from dllm_engine.refresh import Cache, EveryBlock, EverySteps, Never, Refresh

PROMPTS = [[7, 3, 22, 41, 18, 30], [12], [5, 5, 59], [9, 8, 7, 6, 5, 4, 3, 2, 44]]
BASE: dict[str, Any] = {"gen_length": 32, "block_length": 8}


@pytest.fixture(scope="module", params=[False, True], ids=["", "shifted"])
def model(request: pytest.FixtureRequest) -> LLaDA:
    """Random, in float32, with end ids that come up now and then."""
    return ending_model(shifted=request.param)


@pytest.mark.parametrize("text", ["none", "prefix", "dual", "dual/8", "prefix/1", "dual/never"])
def test_texts(text: str) -> None:
    assert str(Cache.of(text)) == text
    assert Cache.of(Cache.of(text)) == Cache.of(text)


def test_objects() -> None:
    assert Cache.of("dual") == Cache("dual", EveryBlock()) == Cache()
    assert Cache.of("prefix/3").refresh == EverySteps(3)
    assert Cache.of("dual/never").refresh == Never()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Cache.of("dul"), ValueError, "cache: 'dul' given; known: none, prefix, dual"),
        (lambda: Cache.of("dual/"), ValueError, "cache: 'dual/' given"),
        (lambda: Cache.of("dual/0"), ValueError, "cache: 'dual/0' given"),
        (lambda: Cache.of("dual/-1"), ValueError, "cache: 'dual/-1' given"),
        (lambda: Cache.of("none/4"), ValueError, "without a cache every call computes all"),
        (lambda: Cache.of(3), TypeError, "cache: int given"),  # type: ignore[arg-type]
        (lambda: Cache("dual", "never"), TypeError, "refresh: str given"),  # type: ignore[arg-type]
        (lambda: EverySteps(0), ValueError, "steps: 0 given"),
        (lambda: EverySteps(True), ValueError, "steps: True given"),
        (lambda: decode(tiny_model(), [[3]], cache="always"), ValueError, "cache: 'always' given"),
        (lambda: Engine(tiny_model(), max_batch=1, max_length=8, cache="dual/x"), ValueError, "cache: 'dual/x' given"),
    ],
)
def test_errors(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message.replace("(", r"\(")):
        make()


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("end_of_text", ["committed", "predicted"])
def test_a_refresh_at_every_call_is_no_cache(model: LLaDA, cache: str, end_of_text: str) -> None:
    settings = BASE | {"policy": Threshold(0.5), "end_of_text": end_of_text}
    expected = decode(model, PROMPTS, cache="none", **settings)
    out = decode(model, PROMPTS, cache=f"{cache}/1", **settings)
    assert torch.equal(out.sequences, expected.sequences)
    assert torch.equal(out.sequence_passes, expected.sequence_passes)
    assert out.settings["cache"] == f"{cache}/1"


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_as_many_steps_as_a_block_takes_is_every_block(model: LLaDA, cache: str) -> None:
    settings = BASE | {"policy": "topk", "end_of_text": "off"}
    expected = decode(model, PROMPTS, cache=cache, **settings)
    assert torch.equal(decode(model, PROMPTS, cache=f"{cache}/8", **settings).sequences, expected.sequences)
    assert not torch.equal(decode(model, PROMPTS, cache=f"{cache}/5", **settings).sequences, expected.sequences)


def test_refreshes_are_counted(model: LLaDA, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[bool, int]] = []
    forward = Forward.__call__

    def counted(self: Forward, joining: list[int], *arguments: Any, refresh: bool, **others: Any) -> Any:
        calls.append((refresh, len(joining)))
        return forward(self, joining, *arguments, refresh=refresh, **others)

    monkeypatch.setattr(Forward, "__call__", counted)
    for cache, refreshes in (("dual", 4), ("dual/16", 2), ("dual/5", 7), ("dual/never", 1), ("none", 0)):
        calls.clear()
        decode(model, [[3, 4]], policy="topk", cache=cache, end_of_text="off", **BASE)
        assert sum(refresh for refresh, _ in calls) == refreshes, cache
        assert len(calls) == 32


class OnceABlockButTheFirst(Refresh):
    def due(self, step: int, step_in_block: int) -> bool:
        return step_in_block == 1

    def __str__(self) -> str:
        return "once"


@pytest.mark.parametrize(
    "cache", ["dual/3", "prefix/3", "dual/never", "prefix/never", Cache("dual", OnceABlockButTheFirst())], ids=str
)
@pytest.mark.parametrize("extra", [{}, {"cfg_scale": 0.8}, {"end_of_text": "predicted"}], ids=str)
def test_a_batch_gives_each_sequence_what_it_gets_alone(
    model: LLaDA, cache: str | Cache, extra: dict[str, Any]
) -> None:
    settings = BASE | {"policy": Threshold(0.5), "cache": cache} | extra
    batch = decode(model, PROMPTS, **settings)
    assert int((batch.sequences == model.mask_id).sum()) == 1, "the one in a prompt"
    for i, prompt in enumerate(PROMPTS):
        alone = decode(model, [prompt], **settings)
        assert alone.sequences[0, len(prompt) :].tolist() == batch.sequences[i, -32:].tolist(), f"sequence {i}"
        assert alone.sequence_passes[0] == batch.sequence_passes[i]
    with Engine(model, max_batch=2, max_length=48, cache=cache) as engine:
        many = {r.index: r for r in engine.generate_many(PROMPTS, policy=Threshold(0.5), **BASE, **extra)}
    for i, result in many.items():
        assert result.sequence[-32:].tolist() == batch.sequences[i, -32:].tolist(), f"prompt {i}"


@pytest.mark.parametrize(("seed", "shifted"), [(0, False), (5, False), (0, True), (3, True)])
def test_columns_that_are_only_looked_at_leave_no_keys(seed: int, shifted: bool) -> None:
    """Where no end comes in sight, to look for one changes nothing."""
    model = tiny_model(seed, shifted=shifted)
    settings: dict[str, Any] = {"gen_length": 64, "block_length": 8, "policy": Threshold(0.3), "cache": "dual/never"}
    out = decode(model, PROMPTS, end_of_text="predicted", **settings)
    assert int(out.generated_tokens.min()) == 64
    assert torch.equal(out.sequences, decode(model, PROMPTS, end_of_text="off", **settings).sequences)

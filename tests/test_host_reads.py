"""Nothing inside a step makes the host wait: no value of a tensor is read but on the lines that say so."""

from __future__ import annotations

import linecache
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ending_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dllm_engine
from dllm_engine import Engine, LearnedFilter, LLaDA, decode, policies
from dllm_engine.policies import AdaBlock, Factor, Learn2PD, Policy, Random, Threshold

PACKAGE = str(Path(dllm_engine.__file__).parent)
GOLDEN = Path(__file__).parent / "golden"
WAITS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "unique", "masked_select", "bincount")
PROMPTS = [[7, 3, 22, 41, 18, 30], [12], [5, 5, 59], [9, 8, 7, 6, 5, 4, 3, 2, 44]]


def caller() -> str:
    """The innermost line of the package, with its place."""
    frame = sys._getframe()
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(PACKAGE):
            return f"{Path(name).name}:{frame.f_lineno}: {linecache.getline(name, frame.f_lineno).strip()}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


class Watch(TorchDispatchMode):
    """Notes every operation that reads a value and is not on a line marked ``# host:``."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = False
        self.waits: list[str] = []
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.inside:
            self.seen += 1
            name = func.overloadpacket.__name__
            indices = args[1] if name in ("index", "index_put_", "index_put") else ()
            by_mask = any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices)
            if (name in WAITS or name.startswith("_unique") or by_mask) and "# host:" not in caller():
                self.waits.append(f"{name}, {caller()}")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Inside is what `Loop.step` runs."""
    from dllm_engine.loop import Loop

    watch, step = Watch(), Loop.step

    def watched(loop: Loop) -> list[int]:
        before = [row[-1] for row in loop.where]
        watch.inside = True
        try:
            joined = step(loop)
        finally:
            watch.inside = False
        for b in joined:
            stays = type(loop.policy).stay is not Policy.stay
            assert loop.where[b][-1] < before[b] or stays, "a pass that decided nothing"
        return joined

    monkeypatch.setattr(Loop, "step", watched)
    return watch


def _policies() -> dict[str, Policy]:
    learned = LearnedFilter.from_pretrained(GOLDEN / "filter.safetensors", force=True)
    return {"threshold": Threshold(0.5), "factor": Factor(1.5), "learn2pd": Learn2PD(learned, 0.7), "random": Random()}


@pytest.fixture(scope="module")
def model() -> LLaDA:
    return ending_model()


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("policy", _policies())
@pytest.mark.parametrize("extra", [{}, {"temperature": 0.7}, {"cfg_scale": 0.8}, {"end_of_text": "predicted"}], ids=str)
def test_a_step_reads_nothing(model: LLaDA, watch: Watch, policy: str, cache: str, extra: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"gen_length": 16, "block_length": 8, "policy": _policies()[policy], "cache": cache}
    with watch:
        out = decode(model, PROMPTS, seed=0, **settings, **extra)
    assert watch.seen > 50 * out.forward_passes
    assert not watch.waits, "\n".join(sorted(set(watch.waits)))
    assert torch.equal(out.sequences, decode(model, PROMPTS, seed=0, **settings, **extra).sequences)


@pytest.mark.parametrize("policy", [name for name in policies.names() if name != "learn2pd"])
def test_a_step_of_every_rule_reads_nothing(model: LLaDA, watch: Watch, policy: str) -> None:
    with watch:
        rule = AdaBlock(delimiters=[40, 8]) if policy == "adablock" else policy  # the model has no tokenizer
        out = decode(model, PROMPTS, seed=0, gen_length=16, block_length=8, policy=rule)
    assert watch.seen > 50 * out.forward_passes
    assert not watch.waits, "\n".join(sorted(set(watch.waits)))


def test_a_step_of_many_prompts_reads_nothing(model: LLaDA, watch: Watch) -> None:
    with watch, Engine(model, max_batch=3, max_length=32) as engine:
        assert len(list(engine.generate_many(PROMPTS * 2, gen_length=16, block_length=8, policy="threshold"))) == 8
    assert watch.seen > 500
    assert not watch.waits, "\n".join(sorted(set(watch.waits)))


def test_model_calls_are_the_passes_that_are_told(model: LLaDA, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, forward = 0, model.hidden_states

    def counted(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return forward(*arguments)

    monkeypatch.setattr(model, "hidden_states", counted)
    for cache in ("none", "prefix", "dual"):
        calls = 0
        out = decode(model, PROMPTS, gen_length=16, block_length=8, policy=Threshold(0.5), cache=cache)
        assert calls == out.forward_passes


def test_the_watch_sees_what_it_should(watch: Watch) -> None:
    values = torch.arange(3)
    with watch:
        watch.inside = True
        int(values.sum())
        values[values > 1]
        values.nonzero()
        watch.inside = False
    assert [wait.split(",")[0] for wait in watch.waits] == ["_local_scalar_dense", "index", "nonzero"]

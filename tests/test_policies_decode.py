"""Whole decodes with every rule, and the page that describes them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ending_model, tiny_model

from dllm_engine import Engine, LLaDA, cli_options, decode, policies
from dllm_engine.policies import (
    CAD,
    Entropy,
    FreeDave,
    Hierarchical,
    LeftToRight,
    LocalLeap,
    Margin,
    Policy,
    Prophet,
    RunLength,
    WeDLM,
)
from dllm_engine.state import BlockState
from dllm_engine.stats import RowStats

PROMPTS = ["Copy: 0 Ann Lee, 1 Tom Hill", "Reverse: 0 Alan Wells, 1 Grace Wright"]


@pytest.fixture(scope="module")
def prompts(demo_model: LLaDA) -> list[list[int]]:
    from dllm_engine.tokenizer import encode_prompt

    return [encode_prompt(demo_model.tokenizer, text, chat=True) for text in PROMPTS]


@pytest.mark.filterwarnings("ignore:the filter was trained on")
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("name", policies.names())
def test_every_rule_runs_to_the_end(demo_model: LLaDA, prompts: list[list[int]], name: str, cache: str) -> None:
    """The same on every backend; a batch gives what each prompt gets alone, and nothing is left undecided."""
    settings: dict[str, Any] = {"gen_length": 16, "block_length": 8, "policy": name, "cache": cache, "seed": 3}
    outs = [decode(demo_model, prompts, backend=backend, **settings) for backend in ("eager", "cpu")]
    for out in outs:
        generated = out.sequences[:, -16:]
        assert int(generated.max()) < demo_model.vocab_size
        assert not (generated == demo_model.mask_id).any()
        assert int(out.sequence_passes.min()) >= 1
        assert int(out.sequence_passes.max()) <= 16
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    alone = decode(demo_model, prompts[1:], backend="cpu", **settings | {"seed": 4})
    assert alone.sequences[0, -16:].tolist() == outs[1].sequences[1, -16:].tolist()
    assert alone.sequence_passes[0] == outs[1].sequence_passes[1]


RANDOM_PROMPTS = [[7, 3, 22, 41, 18, 30], [12], [5, 5, 59], [9, 8, 7, 6, 5, 4, 3, 2, 44]]


WIDE: dict[str, Policy] = {
    "entropy": Entropy(1.5), "cad": CAD(0.4, 1, 3), "cad entropy": CAD(max_entropy=2.0), "prophet": Prophet(2, 1.5, 1),
    "localleap": LocalLeap(0.5, 0.3, 2), "hierarchical": Hierarchical(0.5, 0.2), "wedlm": WeDLM(1.5, 0.05),
    "run_length": RunLength(0.3), "margin": Margin(), "left_to_right": LeftToRight(),
}  # fmt: skip


@pytest.mark.parametrize("extra", [{}, {"cache": "none", "temperature": 0.7}, {"end_of_text": "predicted"}], ids=str)
@pytest.mark.parametrize("name", WIDE)
def test_a_batch_gives_each_sequence_what_it_gets_alone(name: str, extra: dict[str, Any]) -> None:
    """A random model that is sure of little, ends now and then, and texts of different lengths in one call."""
    model, prompts = ending_model(), RANDOM_PROMPTS
    settings = {"gen_length": 24, "block_length": 8, "policy": WIDE[name]} | extra
    batch = decode(model, prompts, seed=40, **settings)
    for i, prompt in enumerate(prompts):
        alone = decode(model, [prompt], seed=40 + i, **settings)
        assert alone.sequences[0, -24:].tolist() == batch.sequences[i, -24:].tolist(), f"sequence {i}"
        assert alone.sequence_passes[0] == batch.sequence_passes[i]
    assert bool((batch.sequences == 1).any()), "no end of text came up: the test would prove less"
    if name not in ("margin", "left_to_right"):
        assert int(batch.sequence_passes.sum()) < int((batch.generated_tokens + 1).sum()), "nothing was parallel"


def test_ends_held_back_make_longer_texts() -> None:
    """The model's end ids reach a policy through `decode` and through `generate_many`."""
    model, lengths = tiny_model(seed=5), {}
    model.end_ids = tuple(range(1, 12))
    for ratio in (0.0, 1.0):
        settings: dict[str, Any] = {"gen_length": 24, "block_length": 8, "policy": CAD(0.4, eos_ratio=ratio)}
        together = decode(model, RANDOM_PROMPTS, **settings).generated_tokens.tolist()
        with Engine(model, max_batch=2, max_length=40) as engine:
            many = {one.index: one.generated_tokens for one in engine.generate_many(RANDOM_PROMPTS, **settings)}
        assert [many[i] for i in range(4)] == together
        lengths[ratio] = sum(together)
    assert lengths[0.0] < lengths[1.0] - 8


# -- names and the page --------------------------------------------------------------------------------------------

PAGE = Path(__file__).parent.parent / "docs" / "policies.md"


def test_the_example_of_the_page_runs(capsys: pytest.CaptureFixture[str], demo_model: LLaDA) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    space: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), space)
    text, passes = capsys.readouterr().out.splitlines()
    assert text == "Amy Ford, Grace Wright, Alan Wells"
    assert 2 <= int(passes.split()[0]) < 16
    # and it keeps what the page says of batches and of rows that are used again
    patient, prompts = space["Patient"](2), [space["prompt"], [5, 6, 7], space["prompt"][:-3]]
    settings: dict[str, Any] = {"gen_length": 16, "block_length": 8, "policy": patient}
    alone = [decode(demo_model, [prompt], seed=i, **settings) for i, prompt in enumerate(prompts)]
    with Engine(demo_model, max_batch=2, max_length=max(map(len, prompts)) + 16) as engine:
        for one in engine.generate_many(prompts, seed=0, **settings):
            assert one.generated.tolist() == alone[one.index].sequences[0, -16:].tolist()
            assert one.passes == alone[one.index].sequence_passes[0]


def test_the_page_lists_every_rule_with_its_defaults() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (.*?) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert {name: rule for name, rule, _ in rows} == {name: rule.__name__ for name, rule in policies.RULES.items()}
    for name, _, parameters in rows:
        for parameter in inspect.signature(policies.RULES[name]).parameters.values():
            default = parameter.default if isinstance(parameter.default, float | int) else ""
            assert f"{parameter.name} {default}".strip() in parameters, f"{name}: {parameter}"


def test_the_page_lists_what_a_rule_sees() -> None:
    page = (Path(__file__).parent.parent / "docs" / "policies.md").read_text(encoding="utf-8")
    for seen in (BlockState, RowStats):
        missing = {field.name for field in fields(seen)} - set(re.findall(r"`(\w+)`", page))
        assert missing <= {"probe_logits"}, seen  # `stats.probe_logits` among the hooks
    assert "`stats.probe_logits`" in page


def test_names_and_texts() -> None:
    for name, rule in policies.RULES.items():
        assert rule.name == name
        assert name in cli_options.POLICY_FORMS
        parameters = inspect.signature(rule).parameters.values()
        if name != "learn2pd":
            assert all(p.default is not p.empty for p in parameters), f"{name} by its name alone"
    assert repr(LocalLeap()) == "LocalLeap(anchor=0.9, relaxed=0.75, window=4)"


def _says(method: str, answer: Callable[[RowStats, BlockState], Any]) -> Policy:
    """A rule with one method of its own."""
    return type("Own", (Policy,), {"name": "own", method: lambda self, stats, state: answer(stats, state)})()


@pytest.mark.parametrize(
    ("method", "answer", "message"),
    [
        ("select", lambda stats, state: stats.confidence[0] > 0.9, r"Own.select: shape \[8\] returned; \[2, 8\]"),
        ("select", lambda stats, state: (stats.confidence > 0.9).any(1, keepdim=True), r"Own.select: shape \[2, 1\]"),
        ("select", lambda stats, state: stats.confidence, "Own.select: torch.float32 returned; torch.bool"),
        ("select", lambda stats, state: None, "Own.select: NoneType returned; torch.bool"),
        ("score", lambda stats, state: stats.log_odds.mean(1), r"Own.score: shape \[2\] returned; \[2, 8\]"),
        ("score", lambda stats, state: None, "Own.score: NoneType returned; a tensor"),
        ("tokens", lambda stats, state: stats.token.float(), "Own.tokens: torch.float32 returned; torch.int64"),
        ("edit", lambda stats, state: state.undecided.int(), "Own.edit: torch.int32 returned; torch.bool"),
        ("stay", lambda stats, state: state.undecided, r"Own.stay: shape \[2, 8\] returned; \[2\]"),
        ("block_lengths", lambda stats, state: state.left / 2, "Own.block_lengths: torch.float32 returned"),
    ],
)
def test_what_a_rule_returns_is_checked(
    method: str, answer: Callable[[RowStats, BlockState], Any], message: str
) -> None:
    """A row for the whole batch was spread over it; what no operation took was told by torch alone."""
    with pytest.raises((TypeError, ValueError), match=message):
        decode(tiny_model(), [[3, 4], [5]], gen_length=8, block_length=8, policy=_says(method, answer))


def test_what_a_drafted_rule_returns_is_checked() -> None:
    rule = _says("select", lambda stats, state: stats.confidence[:1] > 0.9)
    with pytest.raises(ValueError, match=r"FreeDave.select: shape \[1, 8\] returned; \[2, 8\]"):
        decode(tiny_model(), [[3, 4], [5]], gen_length=8, block_length=8, policy=FreeDave(2, rule=rule))


def test_probes_have_a_row_a_position() -> None:
    rule = type("Own", (Policy,), {"name": "own", "probes": lambda self, state: state.left})()
    with pytest.raises(ValueError, match=r"Own\.probes: shape \[2\] returned; \[2, 8, 'K'\] is needed"):
        decode(tiny_model(), [[3, 4], [5]], gen_length=8, block_length=8, policy=rule)


@pytest.mark.parametrize(
    ("hook", "given", "message"),
    [
        ("probes", [3], r"Own\.probes: list returned; torch.int64 is needed"),
        ("probes", torch.zeros(1, 8, 1), r"Own\.probes: torch.float32 returned"),
        ("reach", 8.0, r"Own\.reach: 8.0 returned; an int is needed"),
        ("reach", None, r"Own\.reach: None returned"),
    ],
)
def test_hooks_of_another_type_are_named(hook: str, given: Any, message: str) -> None:
    rule = type("Own", (Policy,), {"name": "own", hook: lambda self, *_: given})()
    with pytest.raises(TypeError, match=message):
        decode(tiny_model(), [[3, 4]], gen_length=8, block_length=8, policy=rule)

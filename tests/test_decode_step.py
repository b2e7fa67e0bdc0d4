"""The decode step of every backend against eager: what it selects, commits, ends and reports."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import SLOWLY, matrices

from dllm_engine import LearnedFilter, features, ops
from dllm_engine.policies import Factor, Learn2PD, Threshold, TopK, as_rule
from dllm_engine.rules import Rule
from dllm_engine.state import DecodeState

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's numpy on lanes that are masked
    pytest.mark.usefixtures("isas"),
]

STATE = ("tokens", "undecided", "predicted", "progress")  # what a step changes


def fresh_state(seed: int, *, batch: int = 4, blocks: int = 2, width: int = 8, device: str = "cpu") -> DecodeState:
    """A decode somewhere in the middle: some positions decided, some texts ended, some blocks done."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    prompt = torch.randint(0, 60, (batch, 3), generator=generator)
    state = DecodeState(
        prompt, torch.zeros(batch, dtype=torch.int64), gen_length=blocks * width, block_length=width,
        steps=max(1, draw(1, 3) * width // 2) * blocks if draw(0, 2) else None,
        seeds=list(range(5, 5 + batch)), mask_id=63, fill_id=1,
    )  # fmt: skip
    for b in range(batch):
        start = 3 + width * draw(0, blocks)
        end = draw(start + 1, 3 + blocks * width + 1)
        state.progress[b, 0], state.progress[b, 1], state.progress[b, 4] = start, end, draw(0, 9)
        state.undecided[b, :start] = False
        state.undecided[b, start : start + width] &= torch.rand(width, generator=generator) < 0.6
        state.undecided[b, start] = True
        state.undecided[b, end:] = False
        state.tokens[b, end:] = 1
        state.progress[b, 5] = state.undecided[b].sum()
        state.progress[b, 2] = min(draw(0, 3), width - 1)
    state.predicted = torch.randint(-1, 60, state.tokens.shape, generator=generator)
    for name in (*STATE, "seeds", "quota", "padding", "end_ids"):
        setattr(state, name, getattr(state, name).to(device))
    return state


def random_filter(hidden: int) -> LearnedFilter:
    """Of the kind "position", with weights so large that every feature counts."""
    learned = LearnedFilter(kind="position", hidden=hidden)
    for parameter in learned.parameters():
        torch.nn.init.normal_(parameter, std=1.0)
    return learned.requires_grad_(False)


def moved(rule: Rule, device: str) -> Rule:
    return replace(rule, bounds=rule.bounds.to(device), weights=rule.weights.to(device))


def rules_for(width: int, device: str) -> dict[str, Rule]:
    torch.manual_seed(3)
    filters = {}
    for convention in ("model", "one"):
        learned = LearnedFilter(max(width, 12), confidence_of_decided=convention)
        torch.nn.init.normal_(learned.linear2.weight, std=2.0)
        filters[f"learn2pd-{convention}"] = Learn2PD(learned.to(device), 0.6)
    filters["learn2pd-position"] = Learn2PD(random_filter(20).to(device), 0.5)
    policies = {"topk": TopK(), "threshold": Threshold(0.3), "factor": Factor(1.4), **filters}
    rules = {name: as_rule(policy, width, torch.device(device)) for name, policy in policies.items()}
    assert all(rule is not None for rule in rules.values())
    return rules  # type: ignore[return-value]


@pytest.fixture(scope="module", autouse=True)
def several_threads() -> Iterator[None]:
    """Which the C++ backend then has, and other tests have not."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["topk", "threshold", "factor", "learn2pd-model", "learn2pd-one", "learn2pd-position"])
@pytest.mark.parametrize("ends", [(), (1, 2)], ids=["off", "committed"])
def test_a_step_commits_what_eager_commits(where: tuple[str, str], name: str, ends: tuple[int, ...]) -> None:
    """Same tokens, same state: with logits that differ by rounding, so no decision may hang on it."""
    backend, device = where
    seen = {"committed": 0, "ended": 0, "blocks": 0}
    for seed in range(4 if SLOWLY else 12):
        width = (8, 5, 12)[seed % 3]
        state, expected = (fresh_state(seed, width=width, device=d) for d in (device, "cpu"))
        hidden, head = matrices(4 * width, 64, 64, torch.bfloat16, peak=6.0, seed=seed)
        head[1] = hidden[: 3 * width : 5].float().sum(0).bfloat16() / 2  # the end id is often the best
        hidden = hidden.view(4, width, 64)
        sequences = torch.tensor([2, 0, 3] if seed % 2 else [0, 1, 2, 3])
        hidden = hidden[: len(sequences)]
        before = expected.progress.clone()
        options: dict[str, Any] = {"banned_ids": (63, 7), "temperature": 0.5 if seed % 4 == 3 else 0.0}
        for target, device_, backend_ in ((state, device, backend), (expected, "cpu", "eager")):
            ops.decode_step_(
                hidden.to(device_), head.to(device_), target, sequences.to(device_), rules_for(width, device_)[name],
                end_ids=torch.tensor(ends, device=device_) if ends else None, backend=backend_, **options,
            )  # fmt: skip
        for field in STATE:
            assert torch.equal(getattr(state, field).cpu(), getattr(expected, field)), (seed, field)
        seen["committed"] += int(before[:, 5].sum() - expected.progress[:, 5].sum())
        seen["ended"] += int((expected.progress[:, 1] < before[:, 1]).sum())
        seen["blocks"] += int((expected.progress[:, 0] > before[:, 0]).sum())
    assert seen["committed"] > 10
    assert (seen["ended"] > 0) == bool(ends)
    assert seen["blocks"] > 0


def test_decisions_are_exact_given_the_statistics(where: tuple[str, str]) -> None:
    """Log-odds made of few values, so that ranks tie and bounds are met exactly."""
    backend, device = where
    width = 12
    generator = torch.Generator().manual_seed(0)
    for seed in range(2 if SLOWLY else 8):
        levels = torch.randint(0, 4, (4, width), generator=generator).float() * 2
        hidden = torch.zeros(4, width, 8, dtype=torch.bfloat16)
        hidden[..., 0] = levels
        head = torch.zeros(40, 8, dtype=torch.bfloat16)
        head[11, 0] = 1.0
        for name in ("topk", "threshold", "factor"):
            state, expected = (fresh_state(seed, width=width, device=d) for d in (device, "cpu"))
            rule = rules_for(width, "cpu")[name]
            stats = ops.decode_step_(hidden, head, expected, torch.arange(4), rule, backend="eager")
            met = Rule(stats.log_odds[0].sort(descending=True).values, rule.weights)  # bounds that are met exactly
            for bounds in (rule, met):
                state, expected = (fresh_state(seed, width=width, device=d) for d in (device, "cpu"))
                for target, d, b in ((state, device, backend), (expected, "cpu", "eager")):
                    ops.decode_step_(
                        hidden.to(d),
                        head.to(d),
                        target,
                        torch.arange(4, device=d),
                        moved(bounds, d),
                        backend=b,
                    )
                if bounds is rule:
                    for field in STATE:
                        assert torch.equal(getattr(state, field).cpu(), getattr(expected, field)), (seed, name, field)


def read_out(feature: int, cut: float, width: int) -> Rule:
    """The rule "feature > cut": x = relu(x) − relu(−x)."""
    w1, w2 = torch.zeros(2, features.COUNT), torch.tensor([1.0, -1.0])
    w1[:, feature] = w2
    return Rule(
        torch.full((width,), math.inf),
        torch.cat((w1.flatten(), torch.zeros(2), w2, torch.zeros(1))),
        cut,
        position=True,
    )


@pytest.mark.parametrize(
    ("kind", "width"),
    [
        *(("random", width) for width in (1, 2, 5, 32, 45)),
        *(("each feature", width) for width in ((5,) if SLOWLY else (5, 33))),
    ],
)
def test_the_filter_of_a_position_decides_as_eager(where: tuple[str, str], kind: str, width: int) -> None:
    """With decided positions and ends inside the block, and predictions of which some are those of the step before."""
    backend, device = where
    committed = left = 0
    batch = 4 if kind == "random" else 2
    for seed in range(batch // 2 if SLOWLY else batch):
        expected = fresh_state(seed, width=width, batch=batch)
        hidden, head = matrices(batch * width, 64, 64, torch.bfloat16, peak=(1.0, 3.0, 6.0)[seed % 3], seed=seed)
        hidden = hidden.view(batch, width, 64)
        if seed % 2:  # as wide as the longest, as in a decode
            hidden = hidden[:, : min(width, int((expected.active_end - expected.block_start).max()))]
        sequences = torch.arange(batch).flip(0)
        block = expected.block(sequences, hidden.shape[1])
        everything = ops.row_stats(hidden.flatten(0, 1), head, torch.arange(hidden[..., 0].numel()), backend="eager")
        everything = everything.reshape(*block.columns.shape)
        again = torch.rand(block.columns.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
        at = sequences[:, None], block.columns
        expected.predicted[at] = torch.where(again, everything.token, block.predicted)
        block = expected.block(sequences, hidden.shape[1])
        if kind == "random":
            torch.manual_seed(seed)
            rules = [
                Rule(torch.full((width,), math.inf), random_filter(units).packed(), 0.0, position=True)
                for units in ((17,) if SLOWLY else (1, 17, 128))
            ]
        else:
            margin = everything.logit - everything.second_logit
            stable = everything.token == block.predicted
            x = features.position_features(
                everything.log_odds, margin, everything.entropy, block.undecided, block.active, stable
            )[block.undecided]  # fmt: skip
            # not the median itself: there rounding would decide
            rules = [read_out(k, x[:, k].median().item() - 1e-3, width) for k in range(features.COUNT)]
        for rule in rules:
            states = [fresh_state(seed, width=width, batch=batch, device=d) for d in (device, "cpu")]
            for target, d, b in zip(states, (device, "cpu"), (backend, "eager"), strict=True):
                target.predicted.copy_(expected.predicted)
                ops.decode_step_(
                    hidden.to(d), head.to(d), target, sequences.to(d), moved(rule, d),
                    end_ids=torch.tensor([1, 2], device=d) if seed % 3 else None, backend=b,
                )  # fmt: skip
            for field in STATE:
                ours, theirs = getattr(states[0], field).cpu(), getattr(states[1], field)
                assert torch.equal(ours, theirs), (seed, rule.filter_length, field)
            committed += int((block.undecided & ~states[1].undecided[at]).sum())
            left += int(states[1].undecided[at].sum())
    assert committed > 0
    assert left > 0 or width == 1


def test_certain_positions_are_left_to_the_filter(where: tuple[str, str]) -> None:
    """Log-odds of +inf reach even the bounds that mean "never": a filter's rule has no bounds."""
    backend, device = where
    hidden = torch.ones(1, 4, 8, dtype=torch.bfloat16, device=device)
    head = torch.full((40, 8), -math.inf, dtype=torch.bfloat16, device=device)
    head[7] = 1.0
    for filter in (LearnedFilter(4), LearnedFilter(kind="position")):
        for parameter in filter.parameters():
            torch.nn.init.zeros_(parameter)
        rule = as_rule(Learn2PD(filter, 0.9), 4, torch.device(device))
        assert rule is not None
        state = fresh_state(0, batch=1, width=4, device=device)
        state.undecided[0, 3:] = True
        state.progress[0, :3] = torch.tensor([3, state.length, 0])
        state.quota.fill_(1)
        ops.decode_step_(hidden, head, state, torch.tensor([0], device=device), rule, backend=backend)
        assert state.undecided[0, 3:7].tolist() == [False, True, True, True]


@pytest.mark.parametrize("name", ["threshold", "learn2pd-one", "learn2pd-position"])
def test_a_row_that_fills_up_a_call_stays_as_it_is(where: tuple[str, str], name: str) -> None:
    """As calls of a fixed size have it: several times the same one, which ends where it begins."""
    backend, device = where
    if backend == "eager":
        pytest.skip("its idle row moves on once a call, and is put back by the next")
    state, alone = (fresh_state(1, device=device) for _ in range(2))
    for each in (state, alone):
        each.undecided[3] = True  # what is behind its end is nothing to it
        each.progress[3] = torch.tensor([11, 11, 0, 19, 0, 0])
    hidden, head = matrices(40, 64, 60, torch.bfloat16, device=device)
    hidden, rule = hidden.view(5, 8, 64), rules_for(8, device)[name]
    scoring: dict[str, Any] = {"banned_ids": ops.id_tensor([], torch.device(device)), "backend": backend, "known": True}
    excluded = ops.id_tensor([], torch.device(device))
    for _ in range(3):
        ops.decode_step_(
            hidden, head, state, torch.tensor([0, 1, 3, 3, 3], device=device), rule, excluded_ids=excluded, **scoring
        )
        ops.decode_step_(
            hidden[:2], head, alone, torch.arange(2, device=device), rule, excluded_ids=excluded, **scoring
        )
    for field in STATE:
        assert torch.equal(getattr(state, field)[2:], getattr(alone, field)[2:]), field
        assert torch.equal(getattr(state, field)[:2], getattr(alone, field)[:2]), field


def test_predictions_are_remembered_for_the_undecided_only(where: tuple[str, str]) -> None:
    backend, device = where
    state = fresh_state(1, batch=2, device=device)
    before, undecided, start = state.predicted.clone(), state.undecided.clone(), state.block_start.tolist()
    hidden, head = matrices(16, 64, 60, torch.bfloat16, device=device)
    hidden = hidden.view(2, 8, 64)
    hidden[1, 0] = math.nan
    stats = ops.decode_step_(
        hidden, head, state, torch.arange(2, device=device), rules_for(8, device)["topk"], backend=backend
    )
    assert stats.token[1, 0].item() == -1
    for b in range(2):
        inside = slice(start[b], start[b] + 8)
        before[b, inside] = torch.where(undecided[b, inside], stats.token[b], before[b, inside])
    assert torch.equal(state.predicted, before)


def test_a_failed_row_is_reported_and_not_committed(where: tuple[str, str]) -> None:
    backend, device = where
    state = fresh_state(1, batch=2, device=device)
    hidden, head = matrices(16, 64, 60, torch.bfloat16, device=device)
    hidden = hidden.view(2, 8, 64)
    hidden[1, 0] = math.nan
    start = int(state.progress[1, 0])
    ops.decode_step_(
        hidden, head, state, torch.arange(2, device=device), rules_for(8, device)["threshold"], backend=backend
    )
    assert state.progress[:, 3].tolist() == [state.length, start]
    assert state.undecided[1, start].item() is True
    assert state.tokens[1, start].item() == 63
    rest, only = hidden[1:].nan_to_num(), torch.tensor([1], device=device)
    ops.decode_step_(rest, head, state, only, rules_for(8, device)["topk"], backend=backend)
    assert state.progress[1, 3].item() == start, "a later step forgot the failure"

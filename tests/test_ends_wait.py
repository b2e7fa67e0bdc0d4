"""End ids that wait for the text before them: the step on every backend, and what it promises of end of text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import SLOWLY, matrices
from conftest import ending_model
from test_decode_step import STATE, fresh_state, rules_for
from torch import Tensor

from dllm_engine import LLaDA, decode, ops, policies
from dllm_engine.filter import LearnedFilter
from dllm_engine.policies import FreeDave, Learn2PD, Policy, Threshold
from dllm_engine.reference import commit_
from dllm_engine.state import BlockState
from dllm_engine.stats import RowStats

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's numpy on lanes that are masked
    pytest.mark.usefixtures("isas"),
]


def by_hand(
    undecided: list[bool], selected: list[bool], score: list[float], is_end: list[bool], quota: int
) -> list[int]:
    """The positions that a step commits, on lists."""
    open_ = [i for i, u in enumerate(undecided) if u]
    left_out = [i for i in open_ if not selected[i]]
    may_rank = [i for i in open_ if not (is_end[i] and any(j < i for j in left_out))]
    best = sorted(may_rank, key=lambda i: (-score[i], i))[:quota]
    chosen = [i for i in open_ if selected[i] or i in best]
    return [i for i in chosen if not (is_end[i] and any(j < i and j not in chosen for j in open_))]


def test_a_commit_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    held = whole = several = 0
    for seed in range(300):
        state = fresh_state(seed, batch=3, width=9)
        block = state.block(torch.arange(3), 9)
        score = torch.randint(0, 5, (3, 9), generator=generator).float()
        selected = torch.rand(3, 9, generator=generator) < 0.5
        tokens = torch.randint(0, 6, (3, 9), generator=generator)
        none = torch.zeros(3, 9)
        stats = RowStats(tokens, none, tokens, none, none, score, none, none[..., None][..., :0])
        before = state.undecided.clone()
        commit_(state, block, stats, score, selected, tokens, end_ids=None, waiting_ids=torch.tensor([2, 4]))
        for b in range(3):
            start = int(block.columns[b, 0])
            is_end = [t in (2, 4) for t in tokens[b].tolist()]
            lists = block.undecided[b].tolist(), selected[b].tolist(), score[b].tolist(), is_end
            quota = int(block.quota[b])
            expected = by_hand(*lists, quota)
            found = (before & ~state.undecided)[b].nonzero()[:, 0] - start
            assert found.tolist() == expected, seed
            assert expected
            plain = by_hand(*lists[:3], [False] * 9, quota)
            held += expected != plain
            several += quota > 1
            whole += any(is_end[i] for i in expected)
    assert min(held, whole, several) > 50


@pytest.mark.parametrize("name", ["topk", "threshold", "factor", "learn2pd-model", "learn2pd-one", "learn2pd-position"])
@pytest.mark.parametrize("stops", [True, False], ids=["committed", "off"])
def test_a_step_commits_what_eager_commits(where: tuple[str, str], name: str, stops: bool) -> None:
    backend, device = where
    held = 0
    for seed in range(6 if SLOWLY else 12):
        width = (8, 5, 12)[seed % 3]
        hidden, head = matrices(4 * width, 64, 64, torch.bfloat16, peak=(6.0, 3.0)[seed % 2], seed=seed)
        head[1] = hidden[: 3 * width : 4].float().sum(0).bfloat16() / 2  # end ids are often the best
        head[2] = hidden[1 : 3 * width : 5].float().sum(0).bfloat16() / 2
        hidden = hidden.view(4, width, 64)
        states = []
        for waits, device_, backend_ in ((True, device, backend), (True, "cpu", "eager"), (False, "cpu", "eager")):
            state = fresh_state(seed, width=width, device=device_)
            ends = state.end_ids = torch.tensor([1, 2], device=device_)
            rule = replace(rules_for(width, device_)[name], ends_wait=waits)
            if name == "threshold":
                rule = replace(rule, bounds=torch.full_like(rule.bounds, 3.0))
            if seed % 2:
                state.quota.fill_(1)
            ops.decode_step_(
                hidden.to(device_), head.to(device_), state, torch.arange(4, device=device_), rule,
                end_ids=ends if stops else None, banned_ids=(63,), backend=backend_,
            )  # fmt: skip
            states.append(state)
        found, expected, plain = states
        for field in STATE:
            assert torch.equal(getattr(found, field).cpu(), getattr(expected, field)), (seed, field)
        held += not torch.equal(plain.undecided, expected.undecided)
    assert held > 0


class Unfused(Policy):
    """A rule's decisions by `select` and `score`."""

    name = "unfused"

    def __init__(self, policy: Policy) -> None:
        self.policy, self.ends_wait = policy, policy.ends_wait

    def select(self, stats: RowStats, state: BlockState) -> Tensor:
        return self.policy.select(stats, state)


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, 58, (count, 6), generator=generator).tolist()


def texts(model: LLaDA, out: Any) -> list[list[int]]:
    return [ids[: ids.index(1) + 1] if 1 in ids else ids for ids in out.sequences[:, 6:].tolist()]


def waiting(policy: Policy) -> Policy:
    policy.ends_wait = True
    return policy


def random_filter() -> Learn2PD:
    torch.manual_seed(2)
    learned = LearnedFilter(8, kind="position", hidden=8)
    for parameter in learned.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return Learn2PD(learned.requires_grad_(False), 0.5)


@pytest.mark.parametrize("cache", ["none", "dual"])
@pytest.mark.parametrize("make", [lambda: Threshold(0.05), random_filter], ids=["threshold", "filter"])
def test_end_of_text_changes_no_text_if_ends_wait(make: Any, cache: str) -> None:
    model = ending_model()
    options: dict[str, Any] = {"gen_length": 48, "block_length": 16, "cache": cache, "seed": 0}
    plain = [
        texts(model, decode(model, prompts(24), policy=make(), end_of_text=way, **options))
        for way in ("off", "committed")
    ]
    assert plain[0] != plain[1]  # else this shows nothing
    waited = [
        decode(model, prompts(24), policy=waiting(make()), end_of_text=w, **options) for w in ("off", "committed")
    ]
    assert texts(model, waited[0]) == texts(model, waited[1])
    assert waited[1].sequence_passes.sum() < waited[0].sequence_passes.sum()
    unfused = decode(model, prompts(24), policy=Unfused(waiting(make())), end_of_text="committed", **options)
    assert torch.equal(unfused.sequences, waited[1].sequences)
    assert torch.equal(unfused.sequence_passes, waited[1].sequence_passes)


def test_drafts_wait_as_their_rule_does() -> None:
    model = ending_model()
    options: dict[str, Any] = {"gen_length": 32, "block_length": 16, "cache": "none", "seed": 0}
    rules = [waiting(Threshold(0.2)), Threshold(0.2)]
    alone = [decode(model, prompts(24), policy=rule, **options).sequences for rule in rules]
    drafted = [decode(model, prompts(24), policy=FreeDave(4, rule=rule), **options).sequences for rule in rules]
    assert torch.equal(alone[0], drafted[0])
    assert torch.equal(alone[1], drafted[1])
    assert not torch.equal(alone[0], alone[1])


def test_a_filter_remembers_whether_ends_waited(tmp_path: Path) -> None:
    for waits in (False, True):
        LearnedFilter(8, kind="position", ends_wait=waits).save_pretrained(tmp_path)
        learned = LearnedFilter.from_pretrained(tmp_path)
        assert learned.ends_wait is waits
        assert Learn2PD(learned).ends_wait is waits
        assert Learn2PD(learned, ends_wait=not waits).ends_wait is not waits
        rule = policies.as_rule(Learn2PD(learned), 8, torch.device("cpu"))
        assert rule is not None
        assert rule.ends_wait is waits

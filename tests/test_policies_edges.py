"""Rules at their bounds, and what a rule must forget or not look at: statistics by hand, no model."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_model
from test_policies import committed, make_block, make_stats, odds_of
from torch import Tensor

from dllm_engine import decode
from dllm_engine.policies import (
    CAD,
    AdaBlock,
    Credit,
    ExploreExploit,
    FreeDave,
    LocalLeap,
    Margin,
    Oracle,
    Prophet,
    TokenEditing,
)
from dllm_engine.rules import least_log_odds, ranking
from dllm_engine.state import BlockState
from dllm_engine.stats import RowStats

DOT = 7
EVEN = least_log_odds(0.5)  # the least whose confidence is 0.5 in float32


def begun(policy: Any, block: BlockState) -> Any:
    """The policy at the beginning of a decode that the block is of."""
    state = SimpleNamespace(
        tokens=torch.zeros(1, 27, dtype=torch.int64), step=torch.zeros(1, dtype=torch.int64), prompt_length=3,
        length=27, gen_length=24, block_length=block.columns.shape[1],
    )  # fmt: skip
    policy = policy.check(tiny_model(), block_length=8, cache="dual") or policy
    policy.begin(state)
    return policy


def said(block: BlockState, token: list[int], odds: list[float]) -> RowStats:
    """Statistics that decided rows have too."""
    return replace(make_stats(block), token=torch.tensor([token]), log_odds=torch.tensor([odds]))


def test_editing_takes_what_is_surer_than_the_threshold_and_no_token_twice() -> None:
    block = make_block([[0, 0, 0, 1, 1]], [2])
    block = replace(block, tokens=torch.tensor([[5, 5, 5, 99, 99]]), step_in_block=torch.tensor([2]))
    policy = begun(TokenEditing(0.5, 0.5), block)
    stats = said(block, [6, -1, 6, 6, 6], [0.1, 9.0, 0.0, 0.1, 0.0])  # surer, without a token, equal; surer, equal
    assert policy.edit(stats, block).tolist() == [[True, False, False, False, False]]
    assert (policy.select(stats, block) & block.undecided).tolist() == [[False, False, False, True, False]]
    edited, back = replace(block, tokens=torch.full((1, 5), 6)), said(block, [5] * 5, [1.0] * 5)
    assert policy.edit(back, edited).tolist() == [[False, True, True, False, False]]  # 5 was replaced in the first
    assert not policy.edit(said(block, [-1] * 5, [9.0] * 5), edited).any()  # no token
    assert not policy.edit(back, replace(edited, active=torch.zeros(1, 5, dtype=torch.bool))).any()
    assert not policy.edit(back, edited)[0, 0]  # nor does it come back later
    begins = replace(edited, step_in_block=torch.tensor([0]))  # of another prompt, perhaps, in the same row
    assert policy.edit(back, begins).tolist() == [[True, True, True, False, False]]


def test_passes_after_a_block_is_decided_are_counted_anew_in_each() -> None:
    block = replace(make_block([[0, 0]], [8]), tokens=torch.tensor([[5, 5]]), step_in_block=torch.tensor([1]))
    policy = begun(TokenEditing(0.5, 0.5, post_steps=2), block)
    for token, stays in ((6, True), (7, False)):
        policy.edit(said(block, [token] * 2, [1.0] * 2), block)
        assert policy.stay(None, block).tolist() == [stays]
    begins = replace(block, step_in_block=torch.tensor([0]))
    policy.edit(said(block, [8] * 2, [1.0] * 2), begins)
    assert policy.stay(None, begins).tolist() == [True]


@pytest.mark.parametrize(
    ("odds", "expected"),
    [([-1.0, -1, EVEN, -1], 3), ([-1.0, -1, -0.1, -1], 4), ([3.0, 0, 1, 2], 3), ([3.0, -1, -1, 9], 4)],
)
def test_which_delimiter_ends_a_block(odds: list[float], expected: int) -> None:
    """The surest of at least even odds, not before the second position nor behind the third, undecided."""
    block = make_block([[1, 1, 1, 1]], [4])
    policy = begun(AdaBlock(0.9, 0.5, 3 / 24, 2, delimiters=[DOT]), block)
    assert policy.block_lengths(said(block, [DOT] * 4, odds), block).tolist() == [expected]
    decided = make_block([[1, 1, 0, 1]], [3])
    assert policy.block_lengths(said(block, [DOT] * 4, odds), decided).tolist() == [2 if odds[1] >= 0 else 4]


def test_exploring_does_not_count_decided_rows() -> None:
    block, policy = make_block([[1, 1, 0, 1]], [3]), ExploreExploit()
    odds, entropy = odds_of(0.6, 0.5, 0.99, 0.96), torch.tensor([[0.8, 1.2, 9.0, 0.1]])
    stats = replace(said(block, [2] * 4, odds[0]), entropy=entropy)
    assert committed(policy, stats, block) == [[1, 3]]


def test_only_one_position_is_explored_whatever_the_quota() -> None:
    block = make_block([[1, 1, 1, 1]], [4])
    stats = make_stats(block, log_odds=odds_of(0.6, 0.5, 0.7, 0.8), entropy=[[0.8, 1.2, 1.1, 0.1]])
    stats.log_odds[0, 3] = torch.inf  # which may not be taken for the one to explore
    order = ranking(ExploreExploit(enough=2).score(stats, block), block.undecided)
    assert order.tolist() == [[1, 3, 2, 0]]  # entropy once, then what is surest


def test_a_window_is_no_wider_than_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    block, widths = make_block([[1] * 4], [4]), []

    def pooled(x: Tensor, width: int, **how: Any) -> Tensor:
        widths.append(width)
        return max_pool1d(x, width, **how)

    max_pool1d = torch.nn.functional.max_pool1d
    monkeypatch.setattr(torch.nn.functional, "max_pool1d", pooled)
    stats = make_stats(block, log_odds=odds_of(0.95, 0.5, 0.5, 0.8))
    assert LocalLeap(window=10**9).select(stats, block).tolist() == [[True, False, False, True]]
    assert widths == [9]  # a wide one costs as much as it is wide


def test_margins_of_nothing_are_equal() -> None:
    block = make_block([[1] * 24], [24])
    logsumexp = torch.linspace(1, 9, 24)[None]
    rest = torch.log(torch.expm1(logsumexp.double())).float()  # a logit of 0, and the other's
    stats = make_stats(block, logit=0.0, second_logit=0.0, logsumexp=logsumexp.tolist(), log_odds=(-rest).tolist())
    assert Margin().score(stats, block).unique().tolist() == [0.0]


def test_an_id_that_takes_a_forgotten_ones_place_has_no_credit_of_it() -> None:
    policy, block = Credit(decay=1.0, weight=1.0, exponent=1.0, traced=1), make_block([[1]], [1])
    policy._ids, policy._credits = torch.full((1, 27, 1), -1), torch.zeros(1, 27, 1)
    half: dict[str, Any] = {"logit": 0.0, "logsumexp": float(torch.tensor(2.0).log()), "log_odds": 0.0}
    for token, step, gain in ((3, 0, 1.5), (3, 1, 2.0), (5, 2, 1.5), (5, 3, 2.0)):
        now = replace(block, step_in_block=torch.tensor([step]))
        policy.probes(now)
        stats = RowStats(*make_stats(now, token=token, **half).fields()[:-1], torch.zeros(1, 1, 1))
        policy.score(stats, now)
        assert policy._odds.item() == pytest.approx(gain), (token, step)  # 0.5 (1 + credit) beside 0.5


@pytest.mark.parametrize(("decided", "needed"), [(32, 7.5), (33, 5.0), (66, 5.0), (67, 2.5)])
def test_prophet_at_the_bounds_of_progress(decided: int, needed: float) -> None:
    block = make_block([[1, 1]], [2])
    block = replace(block, text_length=torch.tensor([100]), left=torch.tensor([100 - decided]))
    for gap, expected in ((needed, [0, 1]), (needed - 0.1, [0])):
        stats = make_stats(block, second_logit=0.0, logit=gap, log_odds=1.0)
        assert committed(Prophet(), stats, block) == [expected]


def test_a_region_may_end_where_the_text_does() -> None:
    decode(tiny_model(), [[4]], gen_length=16, block_length=8, policy=Prophet(region=(8, 16)))
    with pytest.raises(ValueError, match=r"region: \(8, 17\) given"):
        decode(tiny_model(), [[4]], gen_length=16, block_length=8, policy=Prophet(region=(8, 17)))


def test_cad_holds_no_end_back_when_just_enough_is_decided() -> None:
    for ratio, left, held in ((0.25, 18, False), (0.25, 19, True), (0.0, 24, False)):
        block = make_block([[1, 1]], [left])  # of 24
        stats = make_stats(block, token=[[1, 5]], log_odds=odds_of(0.99, 0.96))  # an end id and another
        assert committed(CAD(eos_ratio=ratio), stats, block) == [[1] if held else [0, 1]]


def test_drafts_fill_in_what_is_surest() -> None:
    block = make_block([[1, 1, 0, 1, 1]], [4])
    block = replace(
        block, tokens=torch.tensor([[99, 99, 5, 99, 99]]), predicted=torch.tensor([[10, 11, 12, 13, -1]]),
        quota=torch.tensor([2]),
    )  # fmt: skip
    policy = begun(FreeDave(3), block)
    policy.score(said(block, [9] * 5, [1.0, 3.0, 9.0, 2.0, 4.0]), block)
    tokens, undecided = policy.propose(block)  # the surest one was never predicted before: it stays open
    assert tokens.tolist() == [[[99, 99, 5, 99, 99], [99, 11, 5, 99, 99], [10, 11, 5, 13, 99]]]
    assert undecided.int().tolist() == [[[1, 1, 0, 1, 1], [1, 0, 0, 1, 1], [0, 0, 0, 0, 1]]]


def test_the_oracle_writes_a_token_that_is_not_predicted_only_where_none_is_right() -> None:
    block = make_block([[1, 1, 1]], [3])
    answer = torch.full((1, 24), 9)
    answer[0, 0] = 3
    for tokens, expected in (([3, 4, 5], [0]), ([4, 4, 5], [1])):
        assert committed(Oracle(answer), said(block, tokens, [0.0, 5.0, 1.0]), block) == [expected]


def test_cad_counts_entropies_at_the_bound() -> None:
    block = make_block([[1, 1, 1]], [3])
    stats = make_stats(block, token=5, entropy=[[0.5, 0.5, 0.75]])
    assert committed(CAD(max_entropy=0.5), stats, block) == [[0, 1]]

"""row_stats and commit_ against float64 numpy, with ties, bans, NaN and several vocabulary tiles."""

from __future__ import annotations

import math
from typing import Any

import naive
import numpy as np
import pytest
import torch

from dllm_engine import noise, reference
from dllm_engine.reference import commit_, row_stats
from dllm_engine.state import DecodeState
from dllm_engine.stats import RowStats

BOUND = 1e-4


def truth(x: np.ndarray, banned: set[int], excluded: set[int], probes: list[int] | None = None) -> dict[str, Any]:
    """Statistics of one row of float64 logits, in the plainest way."""
    allowed = [(value, -v) for v, value in enumerate(x) if v not in banned]
    order = sorted(allowed, reverse=True)
    token, logit = -order[0][1], order[0][0]
    kept = np.array([value for v, value in enumerate(x) if v not in excluded])
    others = np.array([value for v, value in enumerate(x) if v not in excluded and v != token])
    p = np.exp(kept - naive.log_sum_exp(kept))
    return {
        "token": token,
        "logit": logit,
        "second_token": -order[1][1] if len(order) > 1 else -1,
        "second_logit": order[1][0] if len(order) > 1 else -np.inf,
        "logsumexp": naive.log_sum_exp(kept),
        "log_odds": logit - naive.log_sum_exp(others) if token not in excluded else -np.inf,
        "entropy": float(-(p[p > 0] * np.log(p[p > 0])).sum()),
        "probe_logits": [] if probes is None else [x[i] for i in probes],
    }


@pytest.fixture(params=[8192, 37, 1], ids=lambda tile: f"tile{tile}")
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(reference, "VOCAB_TILE", request.param)
    return int(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("peak", [0.3, 3.0, 30.0])
def test_statistics(tile: int, dtype: torch.dtype, peak: float) -> None:
    generator = torch.Generator().manual_seed(int(peak * 10))
    hidden = torch.randn(9, 24, generator=generator).to(dtype)
    head = (torch.randn(150, 24, generator=generator) * peak / 5).to(dtype)
    rows = torch.tensor([8, 0, 3, 3, 5], dtype=torch.int32)
    probes = torch.randint(150, (5, 3), generator=generator)
    banned, excluded = {149, 7, 60}, {11, 60}
    for row in (8, 0):  # bans and exclusions that matter: the best ids of two rows
        best = int((head.double() @ hidden[row].double()).argmax())
        banned.add(best) if row else excluded.add(best)
    stats = row_stats(hidden, head, rows, banned_ids=sorted(banned), excluded_ids=sorted(excluded), probe_ids=probes)
    logits = hidden.double().numpy() @ head.double().numpy().T
    for i, row in enumerate(rows.tolist()):
        expected = truth(logits[row], banned, excluded, probes[i].tolist())
        limit = BOUND * (1 + np.abs(logits[row]).max())
        for name, value in expected.items():
            got = getattr(stats, name)[i].tolist()
            if name in ("token", "second_token"):
                assert got == value, name
            else:
                np.testing.assert_allclose(got, value, atol=limit, rtol=0, err_msg=name)
        assert float(stats.confidence[i]) <= 1.0
    for name in ("logit", "logsumexp", "log_odds", "entropy"):
        assert getattr(stats, name).dtype == torch.float32


def test_log_odds_order_what_float32_probabilities_cannot() -> None:
    head = torch.tensor([[40.0], [1.0], [0.0]])
    stats = row_stats(torch.tensor([[1.0], [1.1]]), head, torch.tensor([0, 1]))
    assert stats.confidence.tolist() == [1.0, 1.0]
    assert float(stats.log_odds[1]) > float(stats.log_odds[0]) + 3


@pytest.mark.parametrize("at", [(0, 1), (3, 140), (36, 37), (74, 75)])
def test_ties_go_to_the_lowest_id(tile: int, at: tuple[int, int]) -> None:
    head = torch.zeros(150, 4)
    head[list(at)] = 1.0
    stats = row_stats(torch.ones(1, 4), head, torch.tensor([0]))
    assert (int(stats.token), int(stats.second_token)) == at
    third = row_stats(torch.ones(1, 4), head, torch.tensor([0]), banned_ids=[at[0]])
    assert int(third.token) == at[1]
    assert int(third.second_token) == (2 if at[0] == 0 else 0)


def test_no_allowed_id_no_runner_up_nan_and_infinity(tile: int) -> None:
    head = torch.eye(3)
    one = row_stats(torch.ones(1, 3), head, torch.tensor([0]), banned_ids=[0, 2])
    assert (int(one.token), int(one.second_token), float(one.second_logit)) == (1, -1, -math.inf)
    nobody = row_stats(torch.ones(1, 3), head, torch.tensor([0]), banned_ids=[0, 1, 2])
    assert int(nobody.token) == -1
    for bad in (math.nan, math.inf):
        hidden = torch.tensor([[1.0, bad, 1.0], [1.0, 2.0, 3.0]])
        assert row_stats(hidden, head, torch.tensor([0, 1])).token.tolist() == [-1, 2]


def test_philox_known_answers() -> None:
    """The vectors that the authors of Random123 publish."""
    cases = [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ]
    for counter, key, words in cases:
        assert " ".join(f"{w:08x}" for w in naive.philox(counter, key)) == words
        ours = noise.philox(tuple(torch.tensor(c) for c in counter), (torch.tensor(key[0]), torch.tensor(key[1])))  # type: ignore[arg-type]
        assert " ".join(f"{int(w):08x}" for w in ours) == words


def test_noise_depends_on_its_keys_alone(tile: int) -> None:
    keys = torch.tensor([[2**40 + 5, 3, 7], [5, 3, 7], [2**40 + 5, 4, 7], [2**40 + 5, 3, 8]])
    whole = noise.gumbel(keys, 0, 50)
    assert torch.equal(whole[:, 13:29], noise.gumbel(keys, 13, 16))
    assert torch.equal(whole[2:3], noise.gumbel(keys[2:3], 0, 50))
    assert len({tuple(row) for row in whole.tolist()}) == 4
    for row, (seed, position, step) in zip(whole.tolist(), keys.tolist(), strict=True):
        for v in (0, 1, 2, 3, 4, 49):
            expected = -math.log(-math.log1p(-naive.uniform(seed, position, step, v // 4, 0, v % 4)))
            assert row[v] == pytest.approx(expected, rel=1e-5, abs=1e-5)
    drawn = noise.uniform_scores(torch.cartesian_prod(torch.arange(40), torch.arange(50), torch.arange(3)))
    ends = noise._uniform(torch.tensor([0, 2**32 - 1]))  # of words: their logarithms are finite
    assert 0 < float(ends[0]) < float(ends[1]) < 1
    assert 0 < float(drawn.min()) < 0.001
    assert 0.999 < float(drawn.max()) < 1
    assert float(drawn.mean()) == pytest.approx(0.5, abs=0.02)


def test_sampling_reports_the_drawn_id_without_noise(tile: int) -> None:
    generator = torch.Generator().manual_seed(4)
    hidden, head = torch.randn(6, 8, generator=generator), torch.randn(90, 8, generator=generator)
    keys = torch.stack((torch.full((6,), 9), torch.arange(6), torch.arange(6) * 2), 1)
    stats = row_stats(hidden, head, torch.arange(6), banned_ids=[3], temperature=1.5, noise_keys=keys)
    logits = hidden.double().numpy() @ head.double().numpy().T
    best = logits.argmax(1)
    differs = 0
    for i in range(6):
        noisy = [
            x - 1.5 * math.log(-math.log1p(-naive.uniform(9, i, 2 * i, v // 4, 0, v % 4))) if v != 3 else -math.inf
            for v, x in enumerate(logits[i])
        ]
        token = int(np.argmax(noisy))
        differs += token != best[i]
        assert int(stats.token[i]) == token
        assert float(stats.logit[i]) == pytest.approx(logits[i][token], abs=1e-4)
        rest = [v for v in np.argsort(-logits[i], kind="stable") if v not in (token, 3)]
        assert int(stats.second_token[i]) == rest[0]
        others = np.delete(logits[i], token)
        assert float(stats.log_odds[i]) == pytest.approx(logits[i][token] - naive.log_sum_exp(others), abs=1e-4)
    assert differs > 1


def test_rows_that_reach_over_the_canvas_are_neither_undecided_nor_active() -> None:
    state = make_state(gen_length=8, block_length=4)
    state.block_start[:] = 6
    state.undecided[:, 2:6] = False
    block = state.block(torch.arange(2), 7)
    assert block.undecided.tolist() == [[True] * 4 + [False] * 3] * 2
    assert block.active.tolist() == [[True] * 4 + [False] * 3] * 2
    assert len(set(block.columns[0].tolist())) == 7, "two rows name one column"
    assert not state.undecided[:, block.columns[0, 4:]].any()
    before, every = state.tokens.clone(), torch.ones(2, 7, dtype=torch.bool)
    stats = make_stats([[5] * 7] * 2)
    commit_(state, block, stats, stats.log_odds, every, stats.token, end_ids=None, edited=every)
    assert torch.equal(state.tokens[:, :6], before[:, :6]), "what lies before the block was edited"
    assert state.tokens[:, 6:].tolist() == [[5] * 4] * 2


# -- commit ---------------------------------------------------------------------------------------------------------


def make_state(gen_length: int = 8, block_length: int = 4, steps: int | None = None, batch: int = 2) -> DecodeState:
    prompt = torch.tensor([[50, 51]]).expand(batch, 2)
    return DecodeState(
        prompt, torch.zeros(batch, dtype=torch.int64), gen_length=gen_length, block_length=block_length, steps=steps,
        seeds=[0] * batch, mask_id=99, fill_id=1,
    )  # fmt: skip


def make_stats(token: list[list[int]]) -> RowStats:
    ids = torch.tensor(token)
    zero = torch.zeros(ids.shape)
    return RowStats(ids, zero, ids, zero, zero, zero, zero, zero[..., None])


def step(
    state: DecodeState, tokens: list[list[int]], score: list[list[float]], select: Any = None, ends: Any = None
) -> None:
    block = state.block(torch.arange(state.batch), state.block_length)
    chosen = torch.zeros(block.columns.shape, dtype=torch.bool) if select is None else torch.tensor(select)
    end_ids = None if ends is None else torch.tensor(ends)
    commit_(state, block, make_stats(tokens), torch.tensor(score), chosen, torch.tensor(tokens), end_ids=end_ids)


def test_commit_takes_the_best_and_the_selected() -> None:
    state = make_state()
    tokens = [[10, 11, 12, 13], [20, 21, 22, 23]]
    step(state, tokens, [[0.1, 0.9, 0.9, 0.2], [-math.inf] * 4], [[True, False, False, False], [False] * 4])
    assert state.tokens[:, 2:6].tolist() == [[10, 11, 99, 99], [20, 99, 99, 99]]  # equal scores: the lower position
    assert state.undecided[:, 2:6].tolist() == [[False, False, True, True], [False, True, True, True]]
    assert state.progress[:, :4].tolist() == [[2, 10, 1, 10], [2, 10, 1, 10]]
    step(state, [[0] * 4] * 2, [[9.0] * 4] * 2, [[True, True, False, False], [False] * 4])
    assert state.tokens[0, 2:6].tolist() == [10, 11, 0, 99]  # decided ones stay
    step(state, [[7] * 4] * 2, [[9.0] * 4] * 2, [[True] * 4] * 2)
    assert state.tokens[:, 2:6].tolist() == [[10, 11, 0, 7], [20, 0, 7, 7]]
    assert state.progress[:, :4].tolist() == [[6, 10, 0, 10], [6, 10, 0, 10]]  # both go on to the next block


def test_an_impossible_position_still_ranks_before_decided_ones() -> None:
    state = make_state()
    state.undecided[:, 2:4] = False
    step(state, [[7] * 4] * 2, [[9.0, 9.0, -math.inf, -math.inf], [9.0, 9.0, -math.inf, -1e38]])
    assert state.undecided[:, 2:6].tolist() == [[False, False, False, True], [False, False, True, False]]


@pytest.mark.parametrize(
    ("steps", "expected"), [(2, [4]), (4, [2, 2]), (6, [2, 1, 1]), (8, [1] * 4), (50, [1] * 4), (None, [1] * 4)]
)
def test_quota_is_the_static_schedule(steps: int | None, expected: list[int]) -> None:
    state = make_state(steps=steps, batch=1)
    counts = []
    while int(state.block_start[0]) == 2:
        before = int(state.undecided.sum())
        step(state, [[5] * 4], [[0.0] * 4])
        counts.append(before - int(state.undecided.sum()))
    assert counts == expected


def test_an_end_id_ends_the_text_where_the_first_one_stands() -> None:
    state = make_state()
    step(state, [[10, 1, 2, 13], [20, 21, 22, 1]], [[0.0, 5.0, 6.0, 1.0]] * 2, [[False, True, True, False]] * 2, [1, 2])
    assert state.active_end.tolist() == [4, 10]
    assert state.tokens[0].tolist() == [50, 51, 99, 1, 1, 1, 1, 1, 1, 1]
    assert state.undecided[0].tolist() == [False, False, True] + [False] * 7
    assert state.tokens[1].tolist() == [50, 51, 99, 21, 22, 99, 99, 99, 99, 99]
    step(state, [[10] * 4, [1, 21, 22, 23]], [[1.0] * 4] * 2, ends=[1, 2])
    assert state.progress[0, :4].tolist() == [6, 4, 0, 10]
    assert state.progress[1, :2].tolist() == [6, 3]


def test_a_row_without_token_is_reported_and_not_written() -> None:
    state = make_state()
    step(state, [[10, -1, 12, 13], [20, 21, 22, 23]], [[0.0, 5.0, 6.0, 1.0]] * 2, [[True] * 4] * 2)
    assert state.tokens[0, 2:6].tolist() == [10, 99, 12, 13]
    assert state.failed_at.tolist() == [3, 10]
    step(state, [[10, 11, 12, -1], [20, 21, -1, 23]], [[0.0] * 4] * 2)
    assert state.failed_at.tolist() == [3, 8]  # the first column, whichever step it was
    state = make_state()
    step(state, [[5] * 4] * 2, [[0.0, math.nan, 1.0, 1.0], [0.0] * 4])
    assert state.failed_at.tolist() == [3, 10]


def test_lengths_of_blocks_are_one_to_what_is_seen() -> None:
    states = [make_state(), make_state()]
    for state, lengths in zip(states, ([0, 99], [1, 4]), strict=True):
        block, stats = state.block(torch.arange(2), 4), make_stats([[5] * 4] * 2)
        every = torch.ones(2, 4, dtype=torch.bool)
        commit_(state, block, stats, stats.log_odds, every, stats.token, end_ids=None, lengths=torch.tensor(lengths))
    assert states[0].tokens[:, 2:6].tolist() == [[5, 99, 99, 99], [5, 5, 5, 5]]
    assert states[0].block_start.tolist() == [3, 6]
    for field in ("tokens", "undecided", "progress"):
        assert torch.equal(getattr(states[0], field), getattr(states[1], field)), field


def test_sequences_that_take_no_part_are_left_as_they_are() -> None:
    state = make_state()
    fields = ("tokens", "undecided", "predicted", "progress")
    before = {name: getattr(state, name).clone() for name in fields}
    block, stats = state.block(torch.arange(2), 4), make_stats([[5, 6, -1, 1]] * 2)
    commit_(
        state, block, stats, stats.log_odds, block.undecided, stats.token, end_ids=torch.tensor([1]),
        only=torch.tensor([True, False]),
    )  # fmt: skip
    for name in fields:
        assert torch.equal(getattr(state, name)[1], before[name][1]), name
        assert not torch.equal(getattr(state, name)[0], before[name][0]), name

"""The features of a position and the filter over them, against numpy in float64 and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import tiny_model
from test_reference import make_state

from dllm_engine import LearnedFilter, decode, features, rules
from dllm_engine.policies import Learn2PD
from dllm_engine.stats import RowStats

# A block of six: two decided, log-odds beyond both clamps, a tie for the least.
ODDS = [-1.0, 99.0, -20.0, 6.0, 14.0, -20.0]
UNDECIDED = [True, False, True, True, True, False]
MARGIN = [0.5, 1.0, -2.0, 13.0, 4.0, 0.0]
ENTROPY = [2.0, 0.0, 7.0, -1e-6, 1.0, 0.0]
STABLE = [True, True, False, True, False, False]

# odds, margin, entropy, place, odds 2 and 1 left, 1 and 2 right, decided 1 left and right, least odds left, undecided
# left, greatest odds, undecided, stable
BY_HAND = {
    0: [-0.25, 0.125, 1.0, 0 / 32, 3, 3, 3, -3, 1, 1, 3, 0 / 32, 3, 4 / 32, 1],
    2: [-3, 0, 3, 2 / 32, -0.25, 3, 1.5, 3, 1, 0, -0.25, 1 / 32, 3, 4 / 32, 0],
    3: [1.5, 3, 0, 3 / 32, 3, -3, 3, 3, 0, 0, -3, 2 / 32, 3, 4 / 32, 1],
    4: [3, 1, 0.5, 4 / 32, -3, 1.5, 3, 0, 0, 1, -3, 3 / 32, 3, 4 / 32, 0],
}


def row(values: list[float]) -> torch.Tensor:
    return torch.tensor([values])


def test_each_feature_of_a_block() -> None:
    x = features.position_features(row(ODDS), row(MARGIN), row(ENTROPY), row(UNDECIDED), row([True] * 6), row(STABLE))
    assert x.shape == (1, 6, features.COUNT)
    assert x.dtype == torch.float32
    for i, expected in BY_HAND.items():
        for name, got, value in zip(features.NAMES, x[0, i].tolist(), expected, strict=True):
            assert got == value, (i, name)
    assert not x[0, [1, 5]].any()  # decided


def test_a_block_of_one() -> None:
    x = features.position_features(row([2.0]), row([1.0]), row([0.5]), row([True]), row([True]), row([False]))
    assert x[0, 0].tolist() == [0.5, 0.25, 0.25, 0, 3, 3, 0, 0, 1, 0, 3, 0, 0.5, 1 / 32, 0]


def test_what_lies_behind_the_end_of_the_text_is_like_what_lies_right_of_the_block() -> None:
    undecided = [True, False, True, True, False, False]
    active = [True] * 4 + [False] * 2
    parts = [row(values) for values in (ODDS, MARGIN, ENTROPY, undecided, active, STABLE)]
    assert torch.equal(
        features.position_features(*parts)[:, :4], features.position_features(*(p[:, :4] for p in parts))
    )


def numpy_features(
    odds: np.ndarray, margin: np.ndarray, entropy: np.ndarray, undecided: np.ndarray, width: int, stable: np.ndarray
) -> np.ndarray:
    """float64 [S, features], written position by position; ``width`` of them are in the text."""

    def at(j: int) -> float:
        if j >= width:
            return 0.0
        return float(np.clip(odds[j], -12, 12)) / 4 if j >= 0 and undecided[j] else 3.0

    rows = []
    for i in range(len(odds)):
        rows.append(
            [
                at(i),
                np.clip(margin[i], 0, 12) / 4,
                np.clip(entropy[i], 0, 6) / 2,
                i / 32,
                *(at(i + by) for by in (-2, -1, 1, 2)),
                float(i == 0 or not undecided[i - 1]),
                float(i + 1 < width and not undecided[i + 1]),
                min((at(j) for j in range(i)), default=3.0),
                undecided[:i].sum() / 32,
                max((at(j) for j in range(width) if undecided[j]), default=-3.0),
                undecided.sum() / 32,
                float(stable[i]),
            ]
        )
    return np.array(rows)


@pytest.mark.parametrize("width", [1, 2, 7, 40])
def test_random_blocks_against_numpy(width: int) -> None:
    rng = np.random.default_rng(width)
    odds, margin, entropy = rng.normal(0, 9, (3, 5, width)).astype(np.float32)
    undecided, stable = rng.random((2, 5, width)) < 0.6
    text = rng.integers(1, width + 1, 5)
    active = np.arange(width) < text[:, None]
    undecided &= active
    x = features.position_features(*map(torch.from_numpy, (odds, margin, entropy, undecided, active, stable)))
    for b in range(5):
        expected = numpy_features(odds[b], margin[b], entropy[b], undecided[b], int(text[b]), stable[b])
        np.testing.assert_allclose(x[b].numpy()[undecided[b]], expected[undecided[b]], rtol=1e-7, atol=0)


@pytest.mark.parametrize("units", [1, 7, 48])
def test_the_rule_is_the_net_over_the_features(units: int) -> None:
    """Cuts just below and above what numpy says of each position."""
    rng = np.random.default_rng(units)
    state = make_state(batch=1, gen_length=6, block_length=6)
    undecided, stable = np.array(UNDECIDED), np.array(STABLE)
    state.undecided[0, -6:] = torch.from_numpy(undecided)
    token = torch.arange(6)[None] + 4
    state.predicted[0, -6:] = torch.where(torch.from_numpy(stable), token, -1)
    block = state.block(torch.tensor([0]), 6)
    second = row([0.25] * 6)
    stats = RowStats(
        token=token, logit=row(MARGIN) + second, second_token=token + 1, second_logit=second, logsumexp=row([9.0] * 6),
        log_odds=row(ODDS), entropy=row(ENTROPY), probe_logits=torch.empty(1, 6, 0),
    )  # fmt: skip
    w1, b1 = rng.normal(size=(units, features.COUNT)).astype(np.float32), rng.normal(size=units).astype(np.float32)
    w2, b2 = rng.normal(size=units).astype(np.float32), rng.normal(size=1).astype(np.float32)
    x = numpy_features(np.array(ODDS), np.array(MARGIN), np.array(ENTROPY), undecided, 6, stable)
    out = np.maximum(x @ w1.T.astype(float) + b1, 0) @ w2 + b2
    weights = torch.from_numpy(np.concatenate((w1.ravel(), b1, w2, b2)))
    for i in range(6):
        for shift, expected in ((-1e-5, True), (1e-5, False)):
            rule = rules.Rule(torch.full((6,), math.inf), weights, float(out[i]) + shift, position=True)
            assert rule.filter_length == units
            assert rules.select(rule, stats, block)[0, i].item() == (expected and UNDECIDED[i])


def test_a_batch_gives_each_sequence_what_its_filter_gives_it_alone() -> None:
    """Filters that look right only, and early ends of text: calls reach beyond the ends of some sequences."""
    prompts = [[i + 2, 2 * i + 3, 7][: 1 + i % 3] for i in range(12)]
    for seed in range(5):
        torch.manual_seed(seed)
        learned = LearnedFilter(8, kind="position")
        with torch.no_grad():
            right = [features.NAMES.index(name) for name in ("odds 1 right", "odds 2 right", "decided 1 right")]
            learned.linear1.weight.zero_()[:, right] = 8 * torch.randn(learned.linear1.weight.shape[0], 3)
            learned.linear1.bias.mul_(8)
            learned.linear2.weight.mul_(8)
        model = tiny_model(seed=seed)
        model.end_ids = tuple(range(1, 12))
        settings = {"gen_length": 24, "block_length": 8, "cache": "none", "temperature": 0.7}
        together = decode(model, prompts, policy=Learn2PD(learned, 0.9), seed=5, **settings)
        for i, prompt in enumerate(prompts):
            alone = decode(model, [prompt], policy=Learn2PD(learned, 0.9), seed=5 + i, **settings)
            assert torch.equal(together.sequences[i, -24:], alone.sequences[0, -24:])
            assert together.sequence_passes[i] == alone.forward_passes

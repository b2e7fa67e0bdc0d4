"""CreditDecoding against its definition on the whole vocabulary, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import ending_model
from test_policies import make_block, make_stats
from torch import Tensor

from dllm_engine import decode
from dllm_engine.policies import Credit
from dllm_engine.policies.base import decide_
from dllm_engine.state import DecodeState
from dllm_engine.stats import RowStats


def stats_of(logits: np.ndarray, probes: Tensor, undecided: Tensor) -> RowStats:
    """From float64 logits [B, S, V]; decided rows hold NaN."""
    x = torch.from_numpy(logits)
    (best, second), (token, runner) = (t.unbind(-1) for t in x.topk(2))
    rest = x.scatter(-1, token[..., None], -math.inf).logsumexp(-1)
    entropy = torch.distributions.Categorical(logits=x).entropy()
    fields = best, second, x.logsumexp(-1), best - rest, entropy
    best, second, total, odds, entropy = (f.float().masked_fill(~undecided, math.nan) for f in fields)
    token = token.masked_fill(~undecided, 0)
    return RowStats(token, best, runner, second, total, odds, entropy, x.gather(-1, probes).float())


@pytest.mark.parametrize(("threshold", "peak"), [(0.8, 1.0), (0.6, 0.5)])
def test_credit_is_the_dense_definition(threshold: float, peak: float) -> None:
    """Credits over the whole vocabulary, in float64, through two blocks, twice; decided rows are NaN throughout."""
    rng, (batch, width, ids) = np.random.default_rng(0), (6, 8, 8)
    policy = Credit(threshold, traced=8)
    state = DecodeState(
        torch.full((batch, 2), 1), torch.zeros(batch, dtype=torch.int64), gen_length=2 * width, block_length=width,
        steps=None, seeds=[0] * batch, mask_id=9, fill_id=0,
    )  # fmt: skip
    policy.begin(state)
    credit = np.zeros((batch, width, ids))
    base, calls, several, changed = rng.normal(size=(batch, width, ids)), 0, 0, 0
    admitted = False
    while int(state.left.sum()) or not admitted:
        if not int(state.left.sum()):  # the same rows, with other prompts
            admitted = True
            base = rng.normal(size=base.shape)
            for b in range(batch):
                state.admit(b, [1, 1], 0, 2 * width)
        alive = torch.nonzero(state.left)[:, 0]
        block = state.block(alive, width)
        logits = peak * (1.5 * base + rng.normal(size=base.shape))
        stats = stats_of(logits[alive.numpy()], policy.probes(block), block.undecided)
        new = block.step_in_block == 0
        assert not policy._credits[alive[new][:, None], block.columns[new]].any(), "credit of another prompt"
        before = state.undecided.clone()
        decide_(policy, state, block, stats, end_ids=None, banned_ids=torch.empty(0).long(), rows=ids)
        calls += 1
        for row, b in enumerate(alive.tolist()):
            if int(block.step_in_block[row]) == 0:
                credit[b] = 0
            found = {}
            for i in torch.nonzero(block.undecided[row])[:, 0].tolist():
                x = logits[b, i]
                p = np.exp(x) / np.exp(x).sum()
                credit[b, i] *= 0.7
                credit[b, i, p.argmax()] += p.max() ** 0.2
                raised = x + 0.65 * np.log(1 + credit[b, i])
                q = np.exp(raised) / np.exp(raised).sum()
                found[i] = float(q.max()), int(q.argmax())
                changed += int(q.argmax() != p.argmax())
                odds = float(policy._odds[row, i])
                assert odds / (1 + odds) == pytest.approx(q.max(), abs=1e-6)
            surest = max(found, key=lambda i: found[i][0])
            expected = {i: token for i, (q_, token) in found.items() if q_ >= threshold or i == surest}
            columns = block.columns[row]
            now = before[b, columns] & ~state.undecided[b, columns]
            got = {i: int(state.tokens[b, columns[i]]) for i in torch.nonzero(now)[:, 0].tolist()}
            assert got == expected
            several += len(got) > 1
    assert calls >= 4
    assert several >= 1
    assert changed >= 1, "credit never outvoted a prediction"


@pytest.mark.parametrize(
    ("threshold", "first", "stable"), [(0.95, 0.924, 0.881), (0.9, 0.853, 0.781)]
)  # published: what a threshold acts like at once, and after the same prediction many times
def test_credit_lowers_thresholds_as_published(threshold: float, first: float, stable: float) -> None:
    for confidence, steps in ((first, 1), (stable, 40)):
        for off, expected in ((-0.003, False), (0.003, True)):
            policy = Credit(threshold)
            state = DecodeState(
                torch.full((1, 1), 1), torch.zeros(1, dtype=torch.int64), gen_length=2, block_length=2, steps=None,
                seeds=[0], mask_id=9, fill_id=0,
            )  # fmt: skip
            policy.begin(state)
            p = confidence + off
            logits = np.log([[[p, 1 - p], [p, 1 - p]]])
            for step in range(steps):
                state.step_in_block[:] = step
                block = state.block(torch.arange(1), 2)
                policy.score(stats_of(logits, policy.probes(block), block.undecided), block)
            assert policy.select(None, block).tolist() == [[expected] * 2]  # type: ignore[arg-type]


def test_credit_ranks_what_has_rounded_to_one() -> None:
    policy, block = Credit(), make_block([[1, 1, 1]], [3])
    policy._ids = torch.full((1, 27, 4), -1)
    policy._credits = torch.zeros(1, 27, 4)
    stats = make_stats(block, logit=0.0, logsumexp=0.0, log_odds=[[30.0, 32.0, 31.0]])
    stats = RowStats(*stats.fields()[:-1], torch.zeros(1, 3, 4))
    assert policy.score(stats, block).argsort().tolist() == [[0, 2, 1]]


def test_nothing_beside_the_best_is_sure_at_every_threshold() -> None:
    model = ending_model(5)
    model.lm_head.mul_(600.0)  # log-odds beyond float32
    settings = {"gen_length": 8, "block_length": 8, "end_of_text": "off"}
    for threshold in (0.0, 0.5, 1.0):
        assert decode(model, [[3, 4, 5]], policy=Credit(threshold), **settings).forward_passes == 1

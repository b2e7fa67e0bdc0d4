"""The rules that torch decides by: their formulas against plain Python, and what each of them is for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_model

from dllm_engine import decode
from dllm_engine.policies import (
    CAD,
    Entropy,
    Factor,
    Hierarchical,
    Learn2PD,
    LeftToRight,
    LocalLeap,
    Margin,
    Policy,
    Prophet,
    RunLength,
    Threshold,
    TopK,
    WeDLM,
)
from dllm_engine.reference import commit_
from dllm_engine.rules import least_log_odds
from dllm_engine.state import BlockState, DecodeState
from dllm_engine.stats import RowStats

END = 1
GEN = 24
Row = dict[str, float]


def make_block(undecided: list[list[int]], left: list[int], *, end: int = GEN, start: int = 0) -> BlockState:
    """Block of width S that begins ``start`` positions into a generation of 24, of which ``left`` are undecided."""
    mask = torch.tensor(undecided, dtype=torch.bool)
    batch, width = mask.shape
    state = DecodeState(
        torch.full((batch, 3), 50), torch.zeros(batch, dtype=torch.int64), gen_length=GEN, block_length=width,
        steps=None, seeds=[0] * batch, mask_id=99, fill_id=END, end_ids=(END, 7),
    )  # fmt: skip
    state.block_start[:] = 3 + start
    state.active_end[:] = 3 + end
    state.left[:] = torch.tensor(left)
    state.undecided[:, 3 + start : 3 + start + width] = mask
    return state.block(torch.arange(batch), width)


def make_stats(block: BlockState, seed: int = 0, *, peak: float = 1.0, **given: Any) -> RowStats:
    """Random statistics that fit together; decided rows hold what `ops.block_stats` leaves there."""
    rng = np.random.default_rng(seed)
    shape = tuple(block.undecided.shape)
    logits = rng.normal(size=(*shape, 12)) * 2 * peak
    logits[..., 3] += rng.choice([0.0, 3.0, 6.0], size=shape) * peak
    logits = np.sort(logits, axis=-1)[..., ::-1]
    exp = np.exp(logits)
    p = exp / exp.sum(-1, keepdims=True)
    fields: dict[str, Any] = {
        "token": rng.integers(0, 12, size=shape), "second_token": rng.integers(0, 12, size=shape),
        "logit": logits[..., 0], "second_logit": logits[..., 1], "logsumexp": np.log(exp.sum(-1)),
        "log_odds": logits[..., 0] - np.log(exp[..., 1:].sum(-1)), "entropy": -(p * np.log(p)).sum(-1),
    } | given  # fmt: skip
    made = {}
    for name, value in fields.items():
        ids = name.endswith("token")
        tensor = torch.as_tensor(np.asarray(value), dtype=torch.int64 if ids else torch.float32).expand(shape)
        made[name] = tensor.masked_fill(~block.undecided, 0 if ids else -math.inf)
    return RowStats(**made, probe_logits=torch.empty(*shape, 0))


def rows_of(stats: RowStats, block: BlockState, b: int) -> list[Row]:
    """The undecided positions of a sequence as plain numbers, ``i`` being the position in the block."""
    names = ("token", "logit", "second_logit", "logsumexp", "log_odds", "entropy", "confidence")
    values = {name: getattr(stats, name)[b].tolist() for name in names}
    return [{"i": i} | {n: values[n][i] for n in names} for i, u in enumerate(block.undecided[b].tolist()) if u]


def committed(policy: Policy, stats: RowStats, block: BlockState) -> list[list[int]]:
    """Positions that a step commits: the engine's commit, with the policy's decisions, in a state of its own."""
    batch, width = block.undecided.shape
    state = DecodeState(
        torch.full((batch, 3), 50), torch.zeros(batch, dtype=torch.int64), gen_length=GEN, block_length=width,
        steps=None, seeds=[0] * batch, mask_id=99, fill_id=END,
    )  # fmt: skip
    state.undecided[block.sequences[:, None], block.columns] = block.undecided
    with torch.inference_mode():
        decisions = [f(stats, block) for f in (policy.score, policy.select, policy.tokens)]
        commit_(state, block, stats, *decisions, end_ids=None)
    after = state.undecided[block.sequences[:, None], block.columns]
    assert decisions[0].dtype == torch.float32
    assert decisions[1].dtype == torch.bool
    return [torch.arange(width)[row].tolist() for row in block.undecided & ~after]


# -- formulas, in plain Python: which of the rows a step commits -----------------------------------------------------


def by(rows: list[Row], key: Any) -> list[Row]:
    """Best first; of equals the leftmost."""
    return sorted(rows, key=lambda r: (-key(r), r["i"]))


def left_to_right(rows: list[Row], progress: float) -> list[Row]:
    return rows[:1]


def margin(rows: list[Row], progress: float) -> list[Row]:
    return by(rows, lambda r: r["confidence"] - math.exp(r["second_logit"] - r["logsumexp"]))[:1]


def entropy(rows: list[Row], progress: float) -> list[Row]:
    return [r for r in rows if r["entropy"] <= 0.5] or by(rows, lambda r: -r["entropy"])[:1]


def cad(rows: list[Row], progress: float) -> list[Row]:
    candidates = [r for r in rows if progress >= 0.3 or r["token"] not in (END, 7)]
    k = sum(r["confidence"] >= 0.7 for r in candidates)
    return by(candidates or rows, lambda r: r["log_odds"])[: min(max(k, 2), 3) if candidates else 1]


def cad_entropy(rows: list[Row], progress: float) -> list[Row]:
    candidates = [r for r in rows if progress >= 0.3 or r["token"] not in (END, 7)]
    k = sum(r["entropy"] <= 0.9 for r in candidates)
    return by(candidates or rows, lambda r: -r["entropy"])[: min(max(k, 1), 32)]


def prophet(rows: list[Row], progress: float) -> list[Row]:
    gap = sum(r["logit"] - r["second_logit"] for r in rows) / len(rows)
    needed = 3.5 if progress < 0.33 else 2.5 if progress < 0.67 else 1.5
    return rows if gap >= needed else by(rows, lambda r: r["log_odds"])[:1]


def localleap(rows: list[Row], progress: float) -> list[Row]:
    anchors = [r["i"] for r in rows if r["confidence"] >= 0.9]
    chosen = [
        r
        for r in rows
        if r["confidence"] >= 0.9 or (r["confidence"] >= 0.5 and any(abs(r["i"] - a) <= 2 for a in anchors))
    ]
    return chosen or by(rows, lambda r: r["log_odds"])[:1]


def hierarchical(rows: list[Row], progress: float) -> list[Row]:
    runs: list[list[Row]] = []
    for r in rows:
        if runs and runs[-1][-1]["i"] == r["i"] - 1:
            runs[-1].append(r)
        else:
            runs.append([r])
    best = [by(run, lambda r: r["log_odds"])[0] for run in runs]
    chosen = [r for r in best if r["confidence"] > 0.4] + [r for r in rows if r["confidence"] > 0.9]
    return chosen or by(rows, lambda r: r["log_odds"])[:1]


def wedlm(rows: list[Row], progress: float) -> list[Row]:
    cost = {r["i"]: r["entropy"] + 0.05 * (r["i"] - rows[0]["i"]) for r in rows}
    return [r for r in rows if cost[r["i"]] < 0.8] or by(rows, lambda r: -cost[r["i"]])[:1]


def run_length(rows: list[Row], progress: float) -> list[Row]:
    chosen, product = [], 1.0
    for r in rows:
        product *= r["confidence"]
        if product < 0.6:
            break
        chosen.append(r)
    return chosen or rows[:1]


FORMULAS: dict[str, tuple[Policy, Any]] = {
    "left_to_right": (LeftToRight(), left_to_right),
    "margin": (Margin(), margin),
    "entropy": (Entropy(0.5), entropy),
    "cad": (CAD(0.7, 2, 3, 0.3), cad),
    "cad by entropy": (CAD(max_entropy=0.9), cad_entropy),
    "prophet": (Prophet(3.5, 2.5, 1.5), prophet),
    "localleap": (LocalLeap(0.9, 0.5, 2), localleap),
    "hierarchical": (Hierarchical(0.9, 0.4), hierarchical),
    "wedlm": (WeDLM(0.8, 0.05), wedlm),
    "run_length": (RunLength(0.6), run_length),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_formula(name: str) -> None:
    policy, formula = FORMULAS[name]
    rng, sizes = np.random.default_rng(1), set()
    for seed in range(40):
        undecided = rng.random((5, 8)) < rng.choice([0.3, 0.7, 1.0])
        undecided[:, seed % 8] = True
        left = (undecided.sum(1) + rng.integers(0, 17, size=5)).tolist()
        block = make_block(undecided.tolist(), left)
        stats = make_stats(block, seed, peak=float(rng.choice([0.3, 1.0, 2.0])))
        got = committed(policy, stats, block)
        for b in range(5):
            expected = formula(rows_of(stats, block, b), (GEN - left[b]) / GEN)
            assert got[b] == sorted({int(r["i"]) for r in expected}), f"seed {seed}, sequence {b}"
            sizes.add(len(got[b]))
    assert sizes == {1} if name in ("left_to_right", "margin") else {1, 2, 3} <= sizes


def test_what_lies_in_decided_rows_changes_nothing() -> None:
    """On a GPU their statistics are those of decided tokens, on a CPU a fill: neither may count."""
    undecided = [[0, 1, 1, 0, 1, 0, 1, 1], [1, 0, 0, 0, 0, 0, 0, 1]]
    block = make_block(undecided, [5, 2])
    for seed in range(10):
        stats = make_stats(block, seed)
        other = make_stats(make_block([[1] * 8] * 2, [8, 8]), seed + 100, peak=3.0)
        mixed = RowStats(
            *(
                torch.where(block.undecided, a, b) if a.ndim == 2 else a
                for a, b in zip(stats.fields(), other.fields(), strict=True)
            )
        )
        for name, (policy, _) in FORMULAS.items():
            assert committed(policy, mixed, block) == committed(policy, stats, block), name


def test_confidences_are_compared_as_float32() -> None:
    """At every float32 around a bound, what a threshold says: equality counts, and for strict rules does not."""
    for c in (0.4, 0.75, 0.9, 0.95, 0.0, 1.0):
        wanted = torch.tensor(c)
        odds = torch.logit(wanted.double()).clamp(-40, 40).float()
        near = [odds]
        for towards in (math.inf, -math.inf):
            x = odds
            for _ in range(30):
                x = torch.nextafter(x, torch.tensor(towards))
                near.append(x)
        for x in near:
            confidence = np.float32(1 / (1 + math.exp(-x.item())))
            assert (x.item() >= least_log_odds(c)) == (confidence >= wanted.numpy())
            assert (x.item() >= least_log_odds(c, above=True)) == (confidence > wanted.numpy())
        rule = Threshold(c).rule(8, torch.device("cpu"))
        assert rule is not None
        assert set(rule.bounds.tolist()) == {least_log_odds(c)}
    never = TopK().rule(8, torch.device("cpu"))
    assert never is not None
    assert set(never.bounds.tolist()) == {least_log_odds(1.0, above=True)} == {math.inf}
    block = make_block([[1, 1]], [2])
    nothing = make_stats(block, log_odds=-math.inf)  # what `ops.row_stats` says of a chosen id that it excludes
    assert Threshold(0).select(nothing, block).all()
    entropies = make_stats(block, entropy=[[0.45, float(np.nextafter(np.float32(0.45), np.float32(1)))]])
    assert Entropy(0.45).select(entropies, block).tolist() == [[True, False]]
    assert WeDLM(0.45, 0).select(entropies, block).tolist() == [[False, False]]  # strictly below
    half = make_stats(block, log_odds=0.0)
    for policy in (LocalLeap(0.5, 0.5), LocalLeap(0.5, 0, 0), RunLength(0.5), CAD(0.5)):
        assert policy.select(half, block)[0, 0], policy
    for policy in (Hierarchical(0.5, 0.5), Hierarchical(0.9, 0.5)):  # strictly above
        assert not policy.select(half, block).any(), policy


# -- what each is for ------------------------------------------------------------------------------------------------


def test_margins_still_rank_where_probabilities_are_all_one() -> None:
    block = make_block([[1, 1, 1]], [3])
    odds = [[40.0, 42.0, 41.0]]
    second = [[-40.0, -42.0, -41.0]]
    stats = make_stats(block, logit=0.0, logsumexp=0.0, log_odds=odds, second_logit=second)
    assert stats.confidence.tolist() == [[1.0, 1.0, 1.0]]
    assert committed(Margin(), stats, block) == [[1]]
    # log_odds alone would take the first: the rest of its mass is spread, the second's is one rival
    stats = make_stats(block, logit=0.0, logsumexp=[[0.7, 0.8, 3.0]], log_odds=[[0.0, -0.2, -3.0]], second_logit=[
        [-0.1, -5.0, -0.1]])  # fmt: skip
    assert committed(Margin(), stats, block) == [[1]]


def test_prophet_needs_less_the_further_the_text_is() -> None:
    undecided = [[1] * 8] * 3
    block = make_block(undecided, [17, 16, 8])  # of 24: progress 0.29, 0.333…, 0.667 (below 0.67)
    for gap, expected in ((7.5, [8, 8, 8]), (5.1, [1, 8, 8]), (4.9, [1, 1, 1])):
        stats = make_stats(block, second_logit=0.0, logit=gap)
        assert [len(c) for c in committed(Prophet(), stats, block)] == expected
    late = make_block([[1] * 8], [7])
    assert committed(Prophet(), make_stats(late, second_logit=0.0, logit=2.5), late) == [list(range(8))]


def test_prophet_looks_at_its_region_only() -> None:
    block = make_block([[1, 1, 1, 1, 0, 1]], [20], start=6)  # offsets 6 to 11
    stats = make_stats(block, second_logit=0.0, logit=[[0.1, 9.0, 9.0, 0.1, 0.1, 0.1]], log_odds=[[9.0, 1, 1, 1, 1, 1]])
    assert committed(Prophet(region=(7, 9)), stats, block) == [[0, 1, 2, 3, 5]]
    assert committed(Prophet(region=(7, 10)), stats, block) == [[0]]
    assert committed(Prophet(region=(10, 11)), stats, block) == [[0]]  # its one position is decided
    assert committed(Prophet(region=(0, 6)), stats, block) == [[0]]
    with pytest.raises(ValueError, match=r"region: \(30, 35\) given; offsets 0 to gen_length 16 allowed"):
        decode(tiny_model(), [[4]], gen_length=16, block_length=8, policy=Prophet(region=(30, 35)))


def odds_of(*confidences: float) -> list[list[float]]:
    return [[math.log(c / (1 - c)) for c in confidences]]


def test_bounds_that_were_not_given_are_no_hindrance() -> None:
    assert (LocalLeap().relaxed, LocalLeap(0.5).relaxed, LocalLeap(0.5, 0.2).relaxed) == (0.75, 0.5, 0.2)
    assert (Hierarchical().low, Hierarchical(0.3).low, Hierarchical(0.3, 0.1).low) == (0.4, 0.3, 0.1)


def test_localleap_relaxes_beside_undecided_anchors_only() -> None:
    odds = odds_of(0.8, 0.8, 0.95, 0.8, 0.7, 0.8)
    block = make_block([[1] * 6], [6])
    stats = make_stats(block, log_odds=odds)
    assert committed(LocalLeap(window=1), stats, block) == [[1, 2, 3]]
    assert committed(LocalLeap(window=50), stats, block) == [[0, 1, 2, 3, 5]]
    assert committed(LocalLeap(window=0), stats, block) == [[2]]
    decided = make_block([[1, 1, 0, 1, 1, 1]], [5])
    assert committed(LocalLeap(), make_stats(decided, log_odds=odds), decided) == [[0]]


def test_hierarchical_takes_one_of_a_run() -> None:
    block = make_block([[1, 1, 1, 0, 1, 1, 0, 1]], [6])
    stats = make_stats(block, log_odds=odds_of(0.6, 0.6, 0.5, 0.99, 0.5, 0.8, 0.99, 0.3))
    assert committed(Hierarchical(), stats, block) == [[0, 5]]
    assert committed(Hierarchical(low=0.2), stats, block) == [[0, 5, 7]]
    assert committed(Hierarchical(0.55, 0.2), stats, block) == [[0, 1, 5, 7]]


def test_cad_holds_ends_back_until_enough_is_written() -> None:
    tokens = [[END, 5, 7, 6]]
    odds = odds_of(0.99, 0.3, 0.98, 0.96)
    early, later = make_block([[1] * 4], [17]), make_block([[1] * 4], [16])  # progress 0.29 and 0.33
    assert committed(CAD(), make_stats(early, token=tokens, log_odds=odds), early) == [[3]]
    assert committed(CAD(), make_stats(later, token=tokens, log_odds=odds), later) == [[0, 2, 3]]
    assert committed(CAD(eos_ratio=0), make_stats(early, token=tokens, log_odds=odds), early) == [[0, 2, 3]]
    only = make_stats(early, token=END, log_odds=odds_of(0.3, 0.4, 0.9, 0.2))
    assert committed(CAD(k_min=4), only, early) == [[2]]  # never stuck: the surest end, and no more
    assert not CAD(k_min=4).select(only, early).any()


def test_run_length_skips_what_is_decided_and_stops_where_it_gets_unsure() -> None:
    odds = odds_of(0.99, 0.01, 0.97, 0.5, 0.999)
    block = make_block([[1, 0, 1, 1, 1]], [4])
    assert committed(RunLength(), make_stats(block, log_odds=odds), block) == [[0, 2]]
    assert committed(RunLength(0), make_stats(block, log_odds=odds), block) == [[0, 2, 3, 4]]
    assert committed(RunLength(1), make_stats(block, log_odds=odds), block) == [[0]]


def test_progress_is_of_the_text_that_stays() -> None:
    block = make_block([[1] * 4, [1, 1, 0, 0]], [24, 6], end=12)
    assert block.text_length.tolist() == [12, 12]
    assert block.progress[1].item() == 0.5
    assert make_block([[1] * 4], [24]).progress.tolist() == [0.0]
    assert sorted(block.end_ids.tolist()) == [1, 7]


# -- parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Entropy(-0.1), "threshold: -0.1 given; a finite number ≥ 0 is allowed"),
        (lambda: Entropy(math.nan), "threshold: nan given"),
        (lambda: CAD(1.1), "threshold: 1.1 given; 0 to 1 allowed"),
        (lambda: CAD(k_min=0), "k_min: 0 given; a whole number ≥ 1"),
        (lambda: CAD(k_min=4, k_max=3), "k_max: 3 given; a whole number ≥ 4"),
        (lambda: CAD(eos_ratio=-1), "eos_ratio: -1 given; 0 to 1"),
        (lambda: CAD(max_entropy=-1), "max_entropy: -1 given; a finite number ≥ 0"),
        (lambda: Prophet(middle=-1), "middle: -1 given; a finite number ≥ 0"),
        (lambda: Prophet(region=(5, 5)), "region: 5 given; a whole number ≥ 6"),
        (lambda: Prophet(region=5), "region: 5 given; a pair"),  # type: ignore[arg-type]
        (lambda: Prophet(region=(0, 1, 2)), "region: .* given; a pair"),  # type: ignore[arg-type]
        (lambda: Threshold(torch.tensor([0.1, 0.2])), "threshold: .* given; a number"),  # type: ignore[arg-type]
        (lambda: Learn2PD(5), "filter: int given; a LearnedFilter or the path"),  # type: ignore[arg-type]
        (lambda: LocalLeap(relaxed=0.95), "relaxed: 0.95 given; 0 to 0.9 allowed"),
        (lambda: LocalLeap(window=1.5), "window: 1.5 given; a whole number ≥ 0"),  # type: ignore[arg-type]
        (lambda: Hierarchical(0.3, 0.4), "low: 0.4 given; 0 to 0.3 allowed"),
        (lambda: WeDLM(penalty=math.inf), "penalty: inf given; a finite number ≥ 0"),
        (lambda: RunLength(2), "threshold: 2 given; 0 to 1"),
        (lambda: Threshold(-1), "threshold: -1 given; 0 to 1"),
        (lambda: Factor(math.inf), "factor: inf given; a finite number ≥ 0"),
        (lambda: Factor(10**400), "factor: 10*0 given; at most 1e\\+30"),
        (lambda: Prophet(1e39), "early: 1e\\+39 given; at most 1e\\+30"),
        (lambda: CAD(k_max=10**30), "k_max: 10*0 given; at most 1e\\+09"),
        (lambda: LocalLeap(window=2**62), "window: 4611686018427387904 given; at most 1e\\+09"),
        (lambda: Threshold("0.9"), "threshold: '0.9' given; a number is needed"),  # type: ignore[arg-type]
        (lambda: CAD(k_min=None), "k_min: None given; a number is needed"),  # type: ignore[arg-type]
    ],
)
def test_bad_parameters_are_named(make: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        make()

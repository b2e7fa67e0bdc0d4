"""Every backend of the decode step against float64, against eager, and against itself in other company."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from cases import DTYPES, ROWS, SHAPES, SLOWLY, compare, matrices, skip_unsupported
from cases import truth as truth_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dllm_engine import LearnedFilter, features, ops
from dllm_engine.policies import Factor, Learn2PD, Threshold, TopK, as_rule
from dllm_engine.rules import Rule
from dllm_engine.state import DecodeState
from dllm_engine.stats import RowStats

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's numpy on lanes that are masked
    pytest.mark.usefixtures("isas"),
]


def small(shape: tuple[int, int], rows: int, dtype: torch.dtype, backend: str, device: str) -> bool:
    """Sizes that a fast test can do; a GPU's tests have minutes, all together."""
    vocab = shape[1]
    if device == "cuda":
        return vocab < 100_000 or (rows in (3, 257) and dtype == torch.bfloat16)
    if backend == "triton" or SLOWLY:
        return vocab <= 4096 and rows <= 33
    return vocab <= 4096 or (vocab == 32003 and rows <= 32 and backend in ("cpu", "eager"))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_row_stats_against_float64(
    where: tuple[str, str], shape: tuple[int, int], rows: int, dtype: torch.dtype
) -> None:
    backend, device = where
    dim, vocab = shape
    if not small(shape, rows, dtype, backend, device):
        pytest.skip("too large for a fast test; see test_large_shape")
    check_against_float64(backend, device, dim, vocab, rows, dtype)


@pytest.mark.slow
@pytest.mark.skipif(SLOWLY, reason="too large for the interpreter")
@pytest.mark.parametrize("rows", [1, 32])
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_large_shape(backend: str, rows: int) -> None:
    check_against_float64(backend, "cpu", 4096, 126464, rows, torch.bfloat16)


def check_against_float64(backend: str, device: str, dim: int, vocab: int, rows: int, dtype: torch.dtype) -> None:
    hidden, head = matrices(rows + 5, dim, vocab, dtype, peak=3.0, device=device)
    skip_unsupported(backend, hidden, head)
    index = torch.randperm(rows + 5, generator=torch.Generator().manual_seed(1))[:rows].to(device, torch.int32)
    banned, excluded = (0, 5, vocab - 1), (5, 9)
    stats = ops.row_stats(hidden, head, index, banned_ids=banned, excluded_ids=excluded, backend=backend)
    assert all(len(field) == rows for field in stats.fields())
    if rows == 0:
        return
    expected = truth_of(hidden, head, index, banned, excluded)
    assert expected["log_odds"].max() - expected["log_odds"].min() > 0.1 or rows == 1  # rows differ
    errors = compare(stats, expected)
    # eager in the same dtype is the error budget: a kernel may not be much worse than plain torch
    eager = ops.row_stats(hidden, head, index, banned_ids=banned, excluded_ids=excluded, backend="eager")
    budget = compare(eager, expected)
    # tensor cores cut off, and do not round, what an addition of 16 products leaves below float32
    cut = 4e-9 * dim if device == "cuda" and dtype != torch.float32 else 0.0
    for name, error in errors.items():
        assert error <= 8 * budget[name] + (2e-6 + cut) * (1 + np.abs(expected["logits"]).max()), name


@pytest.mark.parametrize("table", ["WIDE", "NARROW", "BUSY"])
@pytest.mark.parametrize("rows", [16, 32, 64, None])
def test_every_size_of_tiles(
    where: tuple[str, str], monkeypatch: pytest.MonkeyPatch, table: str, rows: int | None
) -> None:
    """Each tile that may be chosen, whatever the number of rows that it is chosen for: two of rows, some of ids."""
    backend, device = where
    if backend != "triton":
        pytest.skip("tiles of Triton")
    from dllm_engine.kernels import decode_step as kernels

    if rows not in (configs := getattr(kernels, table)):
        pytest.skip(f"no tile for {rows} rows in {table}")
    if device == "cuda" and table == "WIDE" and torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("these tiles need a large device")
    config, count, calls = configs[rows], configs[rows].rows + 3, []
    monkeypatch.setattr(kernels, "config_for", lambda *_: calls.append(1) or config)
    hidden, head = matrices(count + 2, 144, 1300, torch.float16, peak=3.0, device=device)
    index = torch.arange(count, dtype=torch.int32, device=device)
    stats = ops.row_stats(hidden, head, index, banned_ids=(0, 70, 1299), excluded_ids=(70, 511), backend=backend)
    assert calls
    compare(stats, truth_of(hidden, head, index, (0, 70, 1299), (70, 511)))


@pytest.mark.parametrize("peak", [0.01, 30.0, 300.0])
def test_flat_and_peaked_data(where: tuple[str, str], peak: float) -> None:
    backend, device = where
    hidden, head = matrices(12, 64, 500, its_dtype(backend), peak=peak, device=device)
    rows = torch.arange(12, dtype=torch.int32, device=device)
    expected = truth_of(hidden, head, rows)
    best = np.sort(np.exp(expected["logits"] - expected["logsumexp"][:, None]), axis=1)[:, -1]
    assert best.mean() > 0.9 if peak >= 30 else best.max() < 0.01
    stats = ops.row_stats(hidden, head, rows, backend=backend)
    compare(stats, expected)
    if peak == 300.0:  # float32 probabilities have all rounded to 1, log-odds still tell the rows apart
        saturated = stats.confidence == 1.0
        assert int(saturated.sum()) >= 6
        order = stats.log_odds.cpu().numpy().argsort()
        assert (order == expected["log_odds"].argsort()).all()


def its_dtype(backend: str) -> torch.dtype:
    """float32 where the backend takes it."""
    return torch.bfloat16 if backend == "cuda" else torch.float32


def one_hot(values: list[list[float]], device: str) -> tuple[Tensor, Tensor]:
    """hidden = identity rows, head such that the logits are exactly ``values`` [R][V]."""
    logits = torch.tensor(values, dtype=torch.bfloat16, device=device)
    rows = len(values)
    size = max(8, rows)
    hidden = torch.zeros(rows, size, dtype=torch.bfloat16, device=device)
    hidden[:, :rows] = torch.eye(rows)
    head = torch.zeros(logits.shape[1], size, dtype=torch.bfloat16, device=device)
    head[:, :rows] = logits.T
    return hidden, head


def test_ties_go_to_the_lowest_id(where: tuple[str, str]) -> None:
    backend, device = where
    vocab = 3000
    values = [[0.0] * vocab for _ in range(3)]
    for i in (2999, 17, 1700, 40):
        values[0][i] = 5.0
    values[1][2100] = 4.0
    hidden, head = one_hot(values, device)
    stats = ops.row_stats(hidden, head, torch.arange(3, device=device), backend=backend)
    assert stats.token.tolist() == [17, 2100, 0]
    assert stats.second_token.tolist() == [40, 0, 1]
    assert stats.logsumexp[2].item() == pytest.approx(math.log(vocab), abs=1e-5)
    assert stats.entropy[2].item() == pytest.approx(math.log(vocab), abs=1e-5)
    assert stats.log_odds[2].item() == pytest.approx(-math.log(vocab - 1), abs=1e-5)


def test_what_may_not_be_chosen(where: tuple[str, str]) -> None:
    backend, device = where
    hidden, head = one_hot([[1.0, 7.0, 3.0, 2.0], [9.0, 8.0, 0.0, 1.0]], device)
    rows = torch.tensor([0, 1, 0], device=device)

    def stats(**options: Any) -> RowStats:
        return ops.row_stats(hidden, head, rows, backend=backend, **options)

    plain, banned = stats(), stats(banned_ids=(1,))
    assert (plain.token.tolist(), banned.token.tolist()) == ([1, 0, 1], [2, 0, 2])
    assert (plain.second_token.tolist(), banned.second_token.tolist()) == ([2, 1, 2], [3, 3, 3])
    torch.testing.assert_close(
        plain.logsumexp, banned.logsumexp, atol=1e-6, rtol=0
    )  # banned ones stay in the normaliser
    only = stats(banned_ids=(0, 1, 3))
    assert only.token.tolist() == [2, 2, 2]
    assert only.second_token.tolist() == [-1, -1, -1]
    assert only.second_logit.tolist() == [-math.inf] * 3
    assert stats(banned_ids=(0, 1, 2, 3)).token.tolist() == [-1, -1, -1]
    out = stats(excluded_ids=(1,))
    assert out.token.tolist() == [1, 0, 1]
    assert out.log_odds[0].item() == -math.inf
    assert out.confidence[0].item() == 0.0
    assert out.logsumexp[0].item() == pytest.approx(np.logaddexp.reduce([1.0, 3.0, 2.0]), abs=1e-5)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_broken_rows_say_so_and_spare_the_others(where: tuple[str, str], broken: float) -> None:
    backend, device = where
    hidden, head = matrices(4, 64, 700, torch.bfloat16, device=device)
    whole = ops.row_stats(hidden, head, torch.arange(4, device=device), backend=backend)
    hidden[2, 3] = broken
    stats = ops.row_stats(hidden, head, torch.arange(4, device=device), backend=backend)
    assert stats.token[2].item() == -1
    for r in (0, 1, 3):
        assert [f[r].tolist() for f in stats.fields()] == [f[r].tolist() for f in whole.fields()]


def test_kernels_guard_against_rows_that_there_are_not(where: tuple[str, str]) -> None:
    """On a GPU nobody looks at the values of rows before the launch."""
    backend, device = where
    if backend not in ("triton", "cuda"):
        pytest.skip("values on a CPU are checked before")
    hidden, head = matrices(4, 64, 700, torch.bfloat16, device=device)
    rows = torch.tensor([3, 4, 0, -1, 2**31 - 1], device=device)
    tokens = ops.row_stats(hidden, head, rows, backend=backend, values_known=True).token.tolist()
    best = truth_of(hidden, head, torch.tensor([3, 0], device=device))["token"].tolist()
    assert tokens == [best[0], -1, best[1], -1, -1]


def test_minus_infinity_is_an_impossible_id(where: tuple[str, str]) -> None:
    backend, device = where
    hidden = torch.ones(2, 8, dtype=torch.bfloat16, device=device)
    head = torch.zeros(300, 8, dtype=torch.bfloat16, device=device)
    head[:, 0] = torch.arange(300, device=device) % 7
    head[250:, 0] = -math.inf
    stats = ops.row_stats(hidden, head, torch.arange(2, device=device), backend=backend)
    x = np.arange(250) % 7
    assert stats.token.tolist() == [6, 6]
    assert stats.logsumexp[0].item() == pytest.approx(np.logaddexp.reduce(x.astype(float)), abs=1e-5)
    assert stats.entropy.isfinite().all()
    head = head.roll(50, 0)  # also where a segment begins
    stats = ops.row_stats(hidden, head, torch.arange(2, device=device), backend=backend)
    assert stats.token.tolist() == [56, 56]
    weights = np.exp(x - np.logaddexp.reduce(x.astype(float)))
    assert stats.entropy[0].item() == pytest.approx(-(weights * np.log(weights)).sum(), abs=1e-5)


def test_strides_offsets_and_repeated_rows(where: tuple[str, str]) -> None:
    backend, device = where
    wide, tall = matrices(40, 160, 900, torch.bfloat16, device=device)
    hidden, head = wide[4:, 16:80], tall[100:, 16:80]  # 32-byte offsets; strides of 160
    rows = torch.tensor([35, 0, 7, 7, 1], dtype=torch.int32, device=device)
    stats = ops.row_stats(hidden, head, rows, backend=backend)
    compare(stats, truth_of(hidden, head, rows))
    copied = ops.row_stats(hidden.contiguous(), head.contiguous(), rows, backend=backend)
    for a, b in zip(stats.fields(), copied.fields(), strict=True):
        assert torch.equal(a, b)


def test_ids_may_be_listed_in_any_order_and_twice(where: tuple[str, str]) -> None:
    backend, device = where
    assert ops.id_tensor([40, 7, 40, 0], torch.device(device)).tolist() == [0, 7, 40]  # as kernels bisect it
    hidden, head = matrices(4, 64, 700, its_dtype(backend), device=device)
    rows = torch.arange(4, device=device)
    best = truth_of(hidden, head, rows)["token"].tolist()
    banned, excluded = [699, *best, 3, *best], [650, best[0], 1, 1]
    stats = ops.row_stats(hidden, head, rows, banned_ids=banned, excluded_ids=excluded, backend=backend)
    compare(stats, truth_of(hidden, head, rows, tuple({*banned}), tuple({*excluded})))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_many_neighbours_may_be_banned(where: tuple[str, str], temperature: float) -> None:
    """Whole tiles without an allowed id, as behind a vocabulary: they stay in the normaliser."""
    backend, device = where
    hidden, head = matrices(3, 32, 800, its_dtype(backend), device=device)
    rows, keys, banned = torch.arange(3, device=device), torch.arange(9, device=device).view(3, 3), (*range(60, 750),)
    expected = truth_of(hidden, head, rows, banned)
    stats = ops.row_stats(hidden, head, rows, banned_ids=banned, backend=backend)
    compare(stats, expected)
    drawn = ops.row_stats(
        hidden, head, rows, banned_ids=banned, backend=backend, temperature=temperature, noise_keys=keys
    )
    for name in ("logsumexp", "entropy"):
        np.testing.assert_allclose(getattr(drawn, name).cpu().numpy(), expected[name], atol=1e-4)
    chosen = np.take_along_axis(expected["logits"], drawn.token.cpu().numpy()[:, None], 1)[:, 0]
    others = np.log(np.exp(expected["logsumexp"]) - np.exp(chosen))
    np.testing.assert_allclose(drawn.log_odds.cpu().numpy(), chosen - others, atol=1e-4)


def test_a_chosen_id_is_never_likely_where_all_are_excluded(where: tuple[str, str]) -> None:
    backend, device = where
    hidden, head = matrices(2, 16, 600, its_dtype(backend), device=device)
    rows = torch.arange(2, device=device)
    stats = ops.row_stats(hidden, head, rows, excluded_ids=range(600), backend=backend)
    assert stats.token.tolist() == truth_of(hidden, head, rows)["token"].tolist()
    assert stats.log_odds.tolist() == [-math.inf] * 2
    assert stats.confidence.tolist() == [0.0] * 2


def test_probes(where: tuple[str, str]) -> None:
    backend, device = where
    hidden, head = matrices(5, 64, 700, torch.bfloat16, device=device)
    rows = torch.tensor([4, 2, 0], device=device)
    ids = torch.tensor([[0, 699, 5], [511, 512, 513], [7, 7, 128]], device=device)
    stats = ops.row_stats(hidden, head, rows, probe_ids=ids, backend=backend)
    x = truth_of(hidden, head, rows)["logits"]
    expected = np.take_along_axis(x, ids.cpu().numpy(), 1)
    np.testing.assert_allclose(stats.probe_logits.cpu().numpy(), expected, atol=1e-4)


def test_a_row_is_the_same_in_any_company_and_twice(where: tuple[str, str]) -> None:
    backend, device = where
    hidden, head = matrices(33, 128, 2000, torch.bfloat16, device=device)
    rows = torch.arange(33, device=device)
    first, again = (ops.row_stats(hidden, head, rows, backend=backend) for _ in range(2))
    for a, b in zip(first.fields(), again.fields(), strict=True):
        assert torch.equal(a, b)
    if backend == "eager":
        return  # torch's matrix product chooses its own order
    for some in ([5], [32, 5, 0], [5, *range(6, 25)]):
        few = ops.row_stats(hidden, head, torch.tensor(some, device=device), backend=backend)
        for a, b in zip(first.fields(), few.fields(), strict=True):
            # numpy's product stands in for tl.dot, and on some CPUs its order depends on the number of rows; on a GPU
            # Triton's order within a part of the ids depends on the tile
            if backend == "triton" and a.is_floating_point():
                torch.testing.assert_close(a[some], b, rtol=1e-5, atol=1e-5)
            else:
                assert torch.equal(a[some], b)


def test_any_number_of_threads_gives_the_same() -> None:
    hidden, head = matrices(9, 256, 9000, torch.bfloat16)
    rows, before = torch.arange(9), torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(ops.row_stats(hidden, head, rows, backend="cpu").fields())
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_sampling_draws_what_eager_draws(where: tuple[str, str]) -> None:
    backend, device = where
    hidden, head = matrices(32, 64, 1000, torch.bfloat16, peak=2.0, device=device)
    rows = torch.arange(32, device=device)
    keys = torch.stack((rows * 7 + 2**40, rows % 5, rows // 5), dim=1)
    options: dict[str, Any] = {"temperature": 0.9, "noise_keys": keys, "banned_ids": (3, 4)}
    stats = ops.row_stats(hidden, head, rows, backend=backend, **options)
    eager = ops.row_stats(hidden.cpu(), head.cpu(), rows.cpu(), backend="eager", **options | {"noise_keys": keys.cpu()})
    assert stats.token.tolist() == eager.token.tolist()
    assert stats.second_token.tolist() == eager.second_token.tolist()
    best = ops.row_stats(hidden, head, rows, backend=backend).token
    assert 0 < int((stats.token == best).sum()) < 32  # it does draw
    for name in ("logit", "log_odds", "entropy"):
        torch.testing.assert_close(getattr(stats, name).cpu(), getattr(eager, name), atol=2e-4, rtol=0)


# -- the step ---------------------------------------------------------------------------------------------------------

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
    for name in ("tokens", "undecided", "predicted", "progress", "seeds", "quota", "padding"):
        setattr(state, name, getattr(state, name).to(device))
    return state


def random_filter(hidden: int) -> LearnedFilter:
    """Of the kind "position", with weights so large that every feature counts."""
    learned = LearnedFilter(kind="position", hidden=hidden)
    for parameter in learned.parameters():
        torch.nn.init.normal_(parameter, std=1.0)
    return learned.requires_grad_(False)


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
                        bounds.to(torch.device(d)),
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
                    hidden.to(d), head.to(d), target, sequences.to(d), rule.to(torch.device(d)),
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


# -- properties -------------------------------------------------------------------------------------------------------


@settings(max_examples=10 if SLOWLY else 60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_small_problem(where: tuple[str, str], data: st.DataObject) -> None:
    backend, device = where
    dim, vocab, rows = data.draw(st.integers(1, 40)) * 8, data.draw(st.integers(1, 1100)), data.draw(st.integers(1, 9))
    peak = data.draw(st.sampled_from([0.1, 3.0, 40.0]))
    dtype = data.draw(st.sampled_from(DTYPES[1:] if backend == "cuda" else DTYPES))
    hidden, head = matrices(rows, dim, vocab, dtype, peak=peak, seed=data.draw(st.integers(0, 99)), device=device)
    index = torch.tensor(
        data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=9)), dtype=torch.int32, device=device
    )
    ids = st.sets(st.integers(0, vocab - 1), max_size=min(5, vocab - 1))
    banned, excluded = (tuple(sorted(data.draw(ids))) for _ in range(2))
    if len(excluded) == vocab or vocab - len(excluded) < 2 or vocab - len(banned) < 2:
        excluded = banned = ()
    if vocab < 3:
        return
    stats = ops.row_stats(hidden, head, index, banned_ids=banned, excluded_ids=excluded, backend=backend)
    expected = truth_of(hidden, head, index, banned, excluded)
    x, token = expected["logits"], stats.token.cpu().numpy()
    bound = 1e-4 * (1 + np.abs(x).max(1))
    at = np.arange(len(x))
    assert not set(token.tolist()) & set(banned)
    assert (np.abs(x[at, token] - expected["logit"]) <= bound).all()
    assert (np.abs(stats.logsumexp.cpu().numpy() - expected["logsumexp"]) <= bound).all()
    assert (np.abs(stats.entropy.cpu().numpy() - expected["entropy"]) <= 10 * bound).all()
    same = token == expected["token"]
    odds = stats.log_odds.cpu().numpy()
    finite = same & np.isfinite(expected["log_odds"])
    assert (np.abs(odds - expected["log_odds"])[finite] <= 2 * bound[finite]).all()
    assert (np.isfinite(odds) == np.isfinite(expected["log_odds"]))[same].all()

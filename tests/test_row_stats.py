"""Scoring by every backend against float64, against eager, and against itself in other company."""

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

from dllm_engine import ops
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

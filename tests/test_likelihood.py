"""The Monte-Carlo estimate against every mask written out in float64; of the engine only the forward pass is shared."""

from __future__ import annotations

import itertools
import math
from typing import Any

import naive
import numpy as np
import pytest
import torch
from conftest import tiny_model

from dllm_engine import LLaDA, decode, likelihood, ops
from dllm_engine.likelihood import greedy_matches, log_likelihood

CONTEXT = [7, 3, 59, 41]  # it holds the mask id


@pytest.fixture(scope="module")
def model() -> LLaDA:
    return tiny_model(seed=3)


def written_out(model: LLaDA, context: list[int], target: list[int], cfg_scale: float = 0.0) -> float:
    """−E[L / l · Σ cross-entropy of the masked], l uniform in 1..L, the mask uniform among those of size l."""
    length, total = len(target), 0.0
    for size in range(1, length + 1):
        subsets = list(itertools.combinations(range(length), size))
        for subset in subsets:
            tokens = context + [model.mask_id if i in subset else token for i, token in enumerate(target)]
            logits = naive.logits_of(model, tokens, len(context), cfg_scale)
            for i in subset:
                row = logits[len(context) + i]
                loss = naive.log_sum_exp(row) - float(row[target[i]])
                total -= loss * length / size / len(subsets) / length
    return total


def estimate(model: LLaDA, target: list[int], context: list[int] = CONTEXT, **options: Any) -> float:
    (found,) = log_likelihood(model, [context], [target], **options)
    return found.value


def test_one_token_is_exact_and_probabilities_sum_to_one(model: LLaDA) -> None:
    targets = [[token] for token in range(model.config.embedding_size)]
    for samples in (1, 128):
        found = list(log_likelihood(model, [CONTEXT] * len(targets), targets, samples=samples, batch_size=16))
        assert {one.passes for one in found} == {1}
        assert sum(math.exp(one.value) for one in found) == pytest.approx(1, abs=1e-5)
    row = naive.logits_of(model, [*CONTEXT, model.mask_id], len(CONTEXT), 0.0)[-1]
    assert [one.value for one in found] == pytest.approx(row - naive.log_sum_exp(row), abs=1e-4)


@pytest.mark.parametrize("cfg_scale", [0.0, 0.7])
@pytest.mark.parametrize("target", [[5, 30], [5, 30, 12], [20, 20, 59, 1]])
def test_short_targets_are_enumerated(model: LLaDA, target: list[int], cfg_scale: float) -> None:
    expected = written_out(model, CONTEXT, target, cfg_scale)
    (found,) = log_likelihood(model, [CONTEXT], [target], cfg_scale=cfg_scale)
    assert found.value == pytest.approx(expected, rel=1e-5)
    assert found.passes == 2 ** len(target) - 1
    assert estimate(model, target, cfg_scale=cfg_scale, seed=1) == found.value  # nothing was drawn
    assert estimate(model, target, cfg_scale=cfg_scale, samples=found.passes) == found.value


@pytest.mark.parametrize(("target", "samples"), [([5, 30, 12], 2), ([5, 30, 12], 6), ([20, 7, 33, 1], 4), ([5] * 5, 3)])
def test_samples_average_to_every_mask(model: LLaDA, target: list[int], samples: int) -> None:
    draws = [estimate(model, target, samples=samples, seed=seed) for seed in range(300)]
    error = np.std(draws) / math.sqrt(len(draws))
    assert abs(np.mean(draws) - written_out(model, CONTEXT, target)) < 3.5 * error
    assert 0 < error < 0.2 * abs(np.mean(draws))  # so that the line above can fail


def test_sizes_are_stratified() -> None:
    generator = torch.Generator().manual_seed(0)
    for length, samples in ((8, 16), (50, 100)):  # each size twice
        sizes: dict[int, float] = {}
        for mask, weight in likelihood.masks(length, samples, generator):
            assert mask == sorted(set(mask))
            assert 0 <= mask[0] <= mask[-1] < length
            sizes[len(mask)] = sizes.get(len(mask), 0) + weight * samples * len(mask) / length
        assert sizes == pytest.approx(dict.fromkeys(range(1, length + 1), samples / length))
    few = [len(mask) for mask, _ in likelihood.masks(1000, 10, generator)]
    assert sorted(few) == pytest.approx(range(min(few), 1000, 100))  # 1, 101, … from a random start


def test_a_request_gets_what_it_gets_alone(model: LLaDA) -> None:
    contexts = [CONTEXT, [4], [], [9] * 17, CONTEXT]
    targets = [[5, 30, 12], [8] * 11, [1, 2], [33], list(range(20))]
    alone = [estimate(model, t, c, samples=9, seed=4) for c, t in zip(contexts, targets, strict=True)]
    for batch_size in (1, 4, 64):
        found = list(log_likelihood(model, contexts, targets, samples=9, seed=4, batch_size=batch_size))
        assert [one.value for one in found] == pytest.approx(alone, rel=1e-5)
        assert [one.passes for one in found] == [7, 9, 3, 1, 9]
    back = list(log_likelihood(model, contexts[::-1], targets[::-1], samples=9, seed=4, batch_size=4))
    assert [one.value for one in back[::-1]] == pytest.approx(alone, rel=1e-5)
    assert estimate(model, targets[1], [4], samples=9, seed=5) != pytest.approx(alone[1], rel=1e-5)
    assert list(log_likelihood(model, [], [])) == []


def test_masks_depend_on_all_ids_of_a_request(model: LLaDA, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, masks = [], likelihood.masks
    monkeypatch.setattr(likelihood, "masks", lambda *given: drawn.append(masks(*given)) or drawn[-1])
    target = list(range(20))
    list(log_likelihood(model, [[4], [5], [4], [4]], [target, target, target, target[::-1]], samples=3))
    assert drawn[0] == drawn[2]
    assert drawn[0] not in (drawn[1], drawn[3])


def test_only_masked_rows_meet_the_head(model: LLaDA, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    row_stats = ops.row_stats

    def watched(hidden: torch.Tensor, head: torch.Tensor, wanted: torch.Tensor, **options: Any) -> Any:
        rows.append(len(wanted))
        return row_stats(hidden, head, wanted, **options)

    monkeypatch.setattr(ops, "row_stats", watched)
    monkeypatch.setattr(LLaDA, "forward", None)  # makes logits of every position
    estimate(model, [5, 30, 12], batch_size=7)
    assert rows == [3 * 1 + 3 * 2 + 3]


@pytest.mark.parametrize("cfg_scale", [0.0, 0.7])
def test_greedy_is_the_most_confident_token_a_step(model: LLaDA, cfg_scale: float) -> None:
    contexts = [CONTEXT, [4], [9, 8, 9], [30, 2], [5]]
    lengths = [1, 4, 4, 7, 4]
    targets = [
        naive.generate(model, c, steps=n, gen_length=n, block_length=n, cfg_scale=cfg_scale)[len(c) :]
        for c, n in zip(contexts, lengths, strict=True)
    ]
    targets[2][3] = (targets[2][3] + 1) % 50
    for batch_size in (1, 2, 8):
        found = greedy_matches(model, contexts, targets, batch_size=batch_size, cfg_scale=cfg_scale)
        assert found == [True, True, False, True, True]


def test_targets_that_just_fit_and_settings_beside_the_model() -> None:
    model = tiny_model(seed=3, max_sequence_length=8)
    model.generation_defaults = {"steps": 1, "temperature": 3.0, "cfg_scale": 2.0, "cache": "dual", "policy": "random"}
    target = decode(model, [CONTEXT], gen_length=4, block_length=4, steps=4, policy="topk", cache="none",
                    temperature=0.0, cfg_scale=0.0, end_of_text="off").sequences[0, 4:].tolist()  # fmt: skip
    assert greedy_matches(model, [CONTEXT], [target]) == [True]
    assert math.isfinite(estimate(model, target))
    with pytest.raises(ValueError, match=r"4 \+ 5 tokens given in request 0"):
        log_likelihood(model, [CONTEXT], [[*target, 5]])


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ([], {}, "targets: 4 + 0 tokens given in request 0; a target of at least 1"),
        ([3] * 5000, {}, "4 + 5000 tokens given"),
        ([64], {}, "targets: request 0: id 64 given; the model has ids 0 to 63"),
        ([-1], {}, "request 0: id -1 given"),
        ([3], {"seed": -1}, "seed: -1 given"),
        ([3], {"samples": 0}, "samples: 0 given; at least 1 is needed"),
        ([3], {"batch_size": 0}, "batch_size: 0 given"),
        ([3], {"cfg_scale": -0.5}, "cfg_scale: -0.5 given; a finite number ≥ 0"),
        ([3], {"cfg_scale": math.inf}, "cfg_scale: inf given; a finite number ≥ 0"),
        ([3], {"cfg_scale": math.nan}, "cfg_scale: nan given"),
    ],
)
def test_errors_come_before_the_first_call(
    model: LLaDA, target: list[int], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        log_likelihood(model, [CONTEXT], [target], **options)
    for name in ("samples", "batch_size"):
        with pytest.raises(TypeError, match=f"{name}: 2.5 given; an int is needed"):
            log_likelihood(model, [CONTEXT], [[3]], **{name: 2.5})
    for seed in ("a", [0], None, True):
        with pytest.raises(TypeError, match="seed: .* given; an int is needed"):
            log_likelihood(model, [CONTEXT], [[3]], seed=seed)  # type: ignore[arg-type]


@pytest.mark.parametrize("function", [log_likelihood, greedy_matches])
@pytest.mark.parametrize(
    ("contexts", "targets", "message"),
    [
        ([[1]], [[2], [3]], "targets: 2 given for 1 contexts"),
        ([[1], [2]], [[3]], "targets: 1 given for 2 contexts"),
        ([[1]], [[]], "a target of at least 1"),
        ([None], [[3]], "contexts: request 0 has a NoneType; a list of ids is needed"),
        ([[1]], [torch.tensor([4, 5])], "targets: request 0 has a Tensor; a list of ids"),
        ([[1]], [[9.5]], "targets: request 0 holds 9.5; ids are ints"),
    ],
)
def test_requests_that_are_none(model: LLaDA, function: Any, contexts: Any, targets: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        function(model, contexts, targets)
    with pytest.raises(ValueError, match="batch_size: 0 given"):
        function(model, [[1]], [[2]], batch_size=0)

"""From prompts to a filter: traces, training, threshold."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ending_model, tiny_model

from dllm_engine import LLaDA, decode, features, traces, train_filter
from dllm_engine.policies import Learn2PD
from dllm_engine.state import BlockState
from dllm_engine.stats import RowStats

PROMPTS = [[7, 3, 22, 41], [12], [9, 8, 7], [5, 5], [30, 31, 32]]
SETTINGS: dict[str, Any] = {"gen_length": 16, "block_length": 8, "cache": "dual", "end_of_text": "off"}


def collect(model: LLaDA, directory: Path, **changes: Any) -> dict[str, torch.Tensor]:
    return traces.collect(model, PROMPTS, directory, batch_size=2, progress=False, **(SETTINGS | changes))


def test_a_trace_is_the_model_s_own_decode_replayed(tmp_path: Path) -> None:
    model = tiny_model(seed=5)
    found = collect(model, tmp_path, cache="none")
    prompt = PROMPTS[0]
    answer = decode(model, [prompt], policy="topk", **(SETTINGS | {"cache": "none"})).sequences[0, len(prompt) :]
    rows, step = {name: value[found["prompt"] == 0] for name, value in found.items()}, 0
    for caution in traces.CAUTION:  # one replay after the other
        canvas = [*prompt, *[model.mask_id] * 16]
        for block in (0, 8):
            undecided = set(range(8))
            predicted: dict[int, int] = {}
            while undecided:
                with torch.inference_mode():
                    logits = model(torch.tensor([canvas]))[0, len(prompt) + block :][:8].double()
                confidences = logits.softmax(1).numpy()
                logits = logits.numpy()
                logits[:, model.mask_id] = -np.inf
                logits[:, model.vocab_size :] = -np.inf
                best, second = np.sort(logits, axis=1)[:, -1], np.sort(logits, axis=1)[:, -2]
                token = logits.argmax(1)
                for i in range(8):
                    assert rows["undecided"][step, i].item() == (i in undecided)
                    assert rows["final"][step, i].item() == (token[i] == int(answer[block + i]))
                    if i in undecided:
                        assert rows["margin"][step, i].item() == pytest.approx(best[i] - second[i], abs=1e-3)
                        assert rows["stable"][step, i].item() == (predicted.get(i) == token[i])
                right = {i for i in undecided if token[i] == int(answer[block + i])}
                chosen = {i for i in right if confidences[i, token[i]] >= caution}
                # one is always committed: the oracle's is right if any is, a cautious replay's is the surest
                surest = max(right or undecided, key=lambda i: rows["log_odds"][step, i].item())
                if caution:
                    surest = max(undecided, key=lambda i: rows["log_odds"][step, i].item())
                chosen |= {surest}
                for i in chosen:
                    canvas[len(prompt) + block + i] = int(answer[block + i])
                predicted = {i: int(token[i]) for i in undecided}
                undecided -= chosen
                step += 1
    assert step == len(rows["final"])


def test_an_interrupted_collection_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(seed=5)
    whole = collect(model, tmp_path / "whole")
    calls = []
    stop = True

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if stop and len(calls) == 8:
            raise KeyboardInterrupt
        return decode(*args, **options)

    monkeypatch.setattr(traces, "decode", counted)
    with pytest.raises(KeyboardInterrupt):
        collect(model, tmp_path / "part")
    stop = False
    calls.clear()
    again = collect(model, tmp_path / "part")
    assert len(calls) == 2 * 6  # two of three batches were missing, a decode and five replays each
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    collect(model, tmp_path / "part")
    assert len(calls) == 2 * 6


@pytest.mark.parametrize("waits", [True, False])
def test_ends_wait_in_all_replays_or_in_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: bool) -> None:
    model = ending_model()
    told = set()

    def watched(*given: Any, policy: Any, **options: Any) -> Any:
        if policy != "topk":
            told.add(policy.ends_wait)
        return decode(*given, policy=policy, **options)

    monkeypatch.setattr(traces, "decode", watched)
    collect(model, tmp_path, ends_wait=waits)
    assert told == {waits}


def test_traces_of_something_else_are_refused(tmp_path: Path) -> None:
    model = tiny_model(seed=5)
    collect(model, tmp_path)
    with pytest.raises(ValueError, match=r"traces\.json was made with settings .*'cache': 'dual'.*now .*'prefix'"):
        collect(model, tmp_path, cache="prefix")
    with pytest.raises(ValueError, match=r"was made with another model; give another directory"):
        collect(tiny_model(seed=6), tmp_path)
    with pytest.raises(ValueError, match="was made with prompts"):
        traces.collect(model, PROMPTS[:3], tmp_path, batch_size=2, progress=False, **SETTINGS)
    with pytest.raises(ValueError, match="was made with other prompts; give another directory"):
        traces.collect(model, [*PROMPTS[:4], [6]], tmp_path, batch_size=2, progress=False, **SETTINGS)


def test_a_run_that_fails_before_its_first_decode_claims_no_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(seed=5)
    with monkeypatch.context() as patch:
        patch.setattr(traces, "decode", None)
        with pytest.raises(TypeError):
            collect(model, tmp_path)
    assert list(tmp_path.iterdir()) == []
    collect(model, tmp_path, cache="prefix")
    (tmp_path / "traces.json").unlink()
    with pytest.raises(ValueError, match=r"holds traces, but no traces\.json that tells how made"):
        collect(model, tmp_path)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    model = tiny_model(seed=5)
    collect(model, tmp_path)
    shard, index = tmp_path / "traces-00001.safetensors", tmp_path / "traces.json"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"traces-00001\.safetensors is damaged .*; remove it"):
        collect(model, tmp_path)
    index.write_text("")
    with pytest.raises(ValueError, match=r"traces\.json is not valid JSON"):
        collect(model, tmp_path)


def synthetic(prompts: int = 60, seed: int = 0) -> dict[str, torch.Tensor]:
    """Steps in which a prediction is final exactly when it is surer than its left neighbour, with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    steps = prompts * 6
    log_odds = 4 * torch.randn(steps, 8, generator=generator)
    left = torch.cat((torch.full((steps, 1), 12.0), log_odds[:, :-1]), dim=1)
    noise = torch.rand(steps, 8, generator=generator) < 0.002
    return {
        "log_odds": log_odds,
        "margin": torch.rand(steps, 8, generator=generator),
        "entropy": torch.rand(steps, 8, generator=generator),
        "undecided": torch.ones(steps, 8, dtype=torch.bool),
        "active": torch.ones(steps, 8, dtype=torch.bool),
        "stable": torch.rand(steps, 8, generator=generator) < 0.5,
        "final": (log_odds > left) ^ noise,
        "prompt": torch.arange(steps) // 6,
    }


def test_it_learns_what_neighbours_tell_and_keeps_to_the_risk() -> None:
    learned, found = train_filter.train(synthetic(300), risk=0.02, progress=False)
    assert sum(p.numel() for p in learned.parameters()) < 4000
    assert found["validation"].wrong <= 0.02
    assert found["test"].wrong <= 0.04
    assert found["test"].found > 0.9
    # said and true agree bin by bin
    assert all(abs(said - true) < 0.15 for said, true, rows in found["test"].calibration if rows > 100)
    # the published filter has no way to look at a neighbour in odds
    assert learned.threshold is not None
    assert 0 < learned.threshold < 1


@pytest.mark.parametrize("kind", ["position", "block"])
def test_a_seed_gives_the_same_bits(kind: str) -> None:
    data = synthetic()
    first, second, third = (
        train_filter.train(data, kind=kind, epochs=3, seed=seed, progress=False)[0] for seed in (1, 1, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert first.threshold == second.threshold
    assert not torch.equal(first.packed(), third.packed())


@pytest.mark.filterwarnings("ignore:risk")
@pytest.mark.parametrize("kind", ["position", "block"])
def test_which_rows_a_filter_is_trained_on(kind: str) -> None:
    """Neither kind sees what lies behind the text; the published one's loss counts decided positions, ours does not."""
    data = synthetic(20)
    data["active"][::2, 6:] = False
    data["undecided"] = data["active"].clone()
    data["undecided"][:, 0] = False
    behind, decided = ~data["active"], data["active"] & ~data["undecided"]

    def weights(**changes: torch.Tensor) -> torch.Tensor:
        given = {"kind": kind, "risk": 0.5, "epochs": 2, "progress": False}
        return train_filter.train(data | changes, **given)[0].packed()

    torch.manual_seed(7)
    before, plain = torch.get_rng_state(), weights()
    assert torch.equal(torch.get_rng_state(), before), "the caller's random numbers"
    assert torch.equal(weights(log_odds=data["log_odds"].masked_fill(behind, 5.0)), plain)
    assert torch.equal(weights(final=data["final"] ^ decided), plain) == (kind == "position")


def test_prompts_are_split_not_steps() -> None:
    prompt = torch.arange(1000) // 10
    parts = train_filter.split(prompt, torch.Generator().manual_seed(0))
    held = {name: set(prompt[mask].tolist()) for name, mask in parts.items()}
    assert [len(held[name]) for name in ("train", "validation", "test")] == [80, 10, 10]
    assert len(set.union(*held.values())) == 100


def test_threshold_for_a_risk() -> None:
    probability = torch.tensor([0.9, 0.2, 0.8, 0.7, 0.6, 0.6, 0.5])
    final = torch.tensor([True, False, True, False, True, True, False])
    # from the top: 0 of 1, 0 of 2, 1 of 3, then the two equal ones: 1 of 5, 2 of 6, 3 of 7 wrong
    assert train_filter.threshold_for(probability, final, 0.01) == pytest.approx(0.75)
    assert train_filter.threshold_for(probability, final, 0.2) == pytest.approx(0.55)
    assert train_filter.threshold_for(probability, final, 0.5) == pytest.approx(0.1)
    assert train_filter.threshold_for(probability, ~final, 0.01) == 1.0
    equal = torch.tensor([0.9, 0.6, 0.6])  # the first of the equal ones is right, but no threshold has it alone
    assert train_filter.threshold_for(equal, torch.tensor([True, True, False]), 0.01) == pytest.approx(0.75)


def test_figures_by_hand() -> None:
    found = train_filter.figures(torch.tensor([0.95, 0.91, 0.5, 0.15]), torch.tensor([True, False, True, False]), 0.9)
    assert (found.rows, found.final, found.committed, found.wrong, found.found) == (4, 0.5, 0.5, 0.5, 0.5)
    assert found.loss == pytest.approx(-np.log([0.95, 0.09, 0.5, 0.85]).mean(), rel=1e-5)
    assert [(round(p, 2), share, rows) for p, share, rows in found.calibration] == [
        (0.15, 0.0, 1),
        (0.5, 1.0, 1),
        (0.93, 0.5, 2),
    ]


def test_figures_at_their_bounds() -> None:
    found = train_filter.figures(torch.tensor([0.5, 1.0]), torch.tensor([True, True]), 0.5)
    assert (found.committed, found.found) == (0.5, 0.5)  # above the threshold, not at it
    assert found.calibration == [(0.5, 1.0, 1), (1.0, 1.0, 1)]
    certain = train_filter.figures(torch.tensor([1.0, 0.0]), torch.tensor([False, True]), 0.5)
    assert certain.loss == pytest.approx(-np.log(1e-7), abs=0.2)  # not infinite, nor what torch clamps at
    for risk, enough in ((0.0105, True), (0.0104, False)):  # 96 rows, or one more
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            train_filter.train(synthetic(20), risk=risk, epochs=1, progress=False)
        assert any("96 validation rows cannot tell it" in str(warning.message) for warning in told) != enough


def test_a_filter_that_never_commits_is_never_wrong() -> None:
    found = train_filter.figures(torch.tensor([0.9, 0.5]), torch.tensor([True, False]), 1.0)
    assert (found.committed, found.wrong) == (0.0, 0.0)


def test_a_risk_that_is_not_kept_is_told() -> None:
    with pytest.warns(UserWarning, match=r"^risk: 0.0003 given; 96 validation rows cannot tell it, at least 3,334 can"):
        train_filter.train(synthetic(20), epochs=1, progress=False)
    data = synthetic(300)
    test = train_filter.split(data["prompt"], torch.Generator().manual_seed(0))["test"]
    data["final"][test] = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_filter.train(data, risk=0.2, epochs=10, progress=False)
    data["final"][test] = False
    with pytest.warns(UserWarning, match=r"^risk: 0.2 given; 100 % of the filter's commits on the test prompts are"):
        train_filter.train(data, risk=0.2, epochs=10, progress=False)
    data["final"][:] = False
    with pytest.warns(UserWarning, match=r"^risk: 0.2 given; no threshold is that safe .*the filter commits nothing$"):
        train_filter.train(data, risk=0.2, epochs=1, progress=False)


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    data = synthetic(12)
    with pytest.raises(ValueError, match="batch_size: 0 given"):
        traces.collect(tiny_model(), [[3]], tmp_path, batch_size=0, **SETTINGS)
    with pytest.raises(ValueError, match="prompts: none given"):
        traces.collect(tiny_model(), [], tmp_path, **SETTINGS)
    for risk in (0, 1e-310, 1.0):
        with pytest.raises(ValueError, match=f"risk: {risk} given; 1e-09 or more and less than 1 allowed"):
            train_filter.train(data, risk=risk)
    with pytest.raises(ValueError, match="epochs: 0 given"):
        train_filter.train(data, epochs=0)
    with pytest.raises(ValueError, match="hidden: 0 given"):
        train_filter.train(data, hidden=0)
    with pytest.raises(ValueError, match="kind: 'token' given"):
        train_filter.train(data, kind="token")
    with pytest.raises(ValueError, match="of 9 prompts; at least 10"):
        train_filter.train(synthetic(9))


@pytest.mark.parametrize("kind", ["position", "block"])
def test_the_filter_that_was_trained_is_the_one_that_decodes(kind: str, tmp_path: Path) -> None:
    model = tiny_model(seed=5)
    prompts = [[i + 2, 2 * i + 3, 7] for i in range(16)]
    data = traces.collect(model, prompts, tmp_path, batch_size=8, progress=False, **SETTINGS)
    learned, _ = train_filter.train(data, kind=kind, epochs=20, risk=0.4, progress=False)
    if kind == "position":
        names = ("log_odds", "margin", "entropy", "undecided", "active", "stable")
        logits = learned(features.position_features(*(data[name] for name in names)))
    else:
        logits = learned(data["log_odds"].sigmoid().masked_fill(~data["active"], 0.0))
    cut = float(logits[data["undecided"]].median())
    picked = []

    class Spy(Learn2PD):
        def select(self, stats: RowStats, state: BlockState) -> torch.Tensor:
            picked.append(super().select(stats, state))
            return picked[-1]

    decode(model, prompts[:8], policy=Spy(learned, float(torch.tensor(cut).double().sigmoid())), **SETTINGS)
    firsts = [int((data["prompt"] == i).nonzero()[0]) for i in range(8)]  # the first block's first step
    assert torch.equal(picked[0], logits[firsts] > cut)
    assert 0 < int(picked[0].sum()) < 64

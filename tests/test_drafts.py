"""FreeDave: the tokens of the rule, in fewer passes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ending_model

from dllm_engine import LearnedFilter, LLaDA, decode
from dllm_engine.drafts import BranchCache
from dllm_engine.kv_cache import KVCache
from dllm_engine.policies import Factor, FreeDave, Learn2PD, LocalLeap, Margin, Policy, Random, Threshold, TopK

GOLDEN = Path(__file__).parent / "golden"
PROMPTS = [[7, 3, 22, 41, 18, 30], [12], [5, 5, 59], [9, 8, 7, 6, 5, 4, 3, 2, 44]]
CACHES = ["none", "prefix", "dual", "dual/3", "dual/never"]


def drafted() -> dict[str, tuple[Policy, int | None]]:
    learned = LearnedFilter.from_pretrained(GOLDEN / "filter.safetensors", force=True)
    return {
        "topk": (TopK(), None), "topk 3": (TopK(), 9), "threshold": (Threshold(0.5), None),
        "factor": (Factor(1.5), None), "learn2pd": (Learn2PD(learned, 0.7), None), "margin": (Margin(), None),
        "localleap": (LocalLeap(0.5, 0.3, 2), None), "threshold 2": (Threshold(0.7), 12), "random": (Random(), 12),
    }  # fmt: skip


ENDS = itertools.cycle(["off", "committed", "predicted", "committed"])


@pytest.mark.parametrize("shifted", [False, True], ids=["", "shifted"])
@pytest.mark.parametrize(
    ("name", "cache", "ends", "drafts"),
    [(n, c, next(ENDS), d) for (n, c), d in zip(itertools.product(drafted(), CACHES), itertools.cycle([2, 4, 8]))],
)
def test_drafts_change_no_token(
    name: str, cache: str, ends: str, drafts: int, shifted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (rule, steps) = ending_model(shifted=shifted), drafted()[name]
    settings: dict[str, Any] = {
        "gen_length": 24,
        "block_length": 8,
        "cache": cache,
        "end_of_text": ends,
        "steps": steps,
    }
    plain = decode(model, PROMPTS, policy=rule, seed=0, **settings)
    calls, forward = [], model.hidden_states
    monkeypatch.setattr(model, "hidden_states", lambda *given: calls.append(1) or forward(*given))
    out = decode(model, PROMPTS, policy=FreeDave(drafts, rule=rule), seed=0, **settings)
    assert torch.equal(out.sequences, plain.sequences)
    assert len(calls) == out.forward_passes
    assert bool((out.sequence_passes <= plain.sequence_passes).all())
    assert int(out.sequence_passes.max()) <= out.forward_passes
    assert ends != "off" or out.forward_passes >= 3


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_drafts_save_passes(demo_model: LLaDA, cache: str) -> None:
    from dllm_engine.tokenizer import encode_prompt

    texts = ["Copy: 0 Ann Lee, 1 Tom Hill", "Reverse: 0 Alan Wells, 1 Grace Wright", "Sort: 0 Tom Hill, 1 Ann Lee"]
    prompts = [encode_prompt(demo_model.tokenizer, text, chat=True) for text in texts]
    settings: dict[str, Any] = {"gen_length": 16, "block_length": 8, "cache": cache}
    plain = decode(demo_model, prompts, policy="topk", **settings)
    before = plain.sequence_passes
    for drafts in (2, 4, 8):
        out = decode(demo_model, prompts, policy=FreeDave(drafts), **settings)
        assert torch.equal(out.sequences, plain.sequences)
        assert bool((out.sequence_passes < before).all())
        assert int(out.sequence_passes.sum()) <= int(before.sum())
        before = torch.minimum(before, out.sequence_passes + 1)


@pytest.mark.parametrize("seed", [32, 38])
def test_drafts_end_where_the_text_does(seed: int) -> None:
    """An end of the text in a block's last column leaves the canvas that was drafted, but hides what is behind it."""
    model = ending_model(seed=seed)
    settings: dict[str, Any] = {"gen_length": 16, "block_length": 4, "cache": "none", "end_of_text": "committed"}
    plain, drafted = (decode(model, [*PROMPTS[:3], [9, 8, 7]], policy=p, **settings) for p in (TopK(), FreeDave(4)))
    assert torch.equal(drafted.sequences, plain.sequences)


@pytest.mark.parametrize("first", [0, 1])
def test_rows_behind_the_end_leave_the_last_column_alone(first: int) -> None:
    """Two sequences of a ragged call, two drafts of each; the second ends two columns earlier than what is seen."""
    data = (
        torch.arange(14.0).view(1, 1, 2, 1, 7, 1).repeat(1, 2, 1, 1, 1, 1)
    )  # six columns of two rows, and a spare one
    columns = torch.tensor([[3, 4, 5], [2, 3, 6]])
    (cache,) = KVCache(data.clone()).block(2, columns, slice(first, 6))
    new = 100 + torch.arange(12.0).view(4, 1, 3, 1)
    for seen in BranchCache.of(cache, 2).write(new, new + 50):
        assert seen.shape == (4, 1, 6 - first, 1)
    keys = BranchCache.of(cache, 2).write(new, new)[0][:, 0, :, 0]
    expected = [[0, 1, 2, 100, 101, 102], [0, 1, 2, 103, 104, 105], [7, 8, 106, 107, 11, 12], [7, 8, 109, 110, 11, 12]]
    assert keys.tolist() == [row[first:] for row in expected]

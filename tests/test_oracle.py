"""The oracle of Learn2PD: the answer it was given, in as few passes as right predictions allow."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model

from dllm_engine import decode
from dllm_engine.policies import Oracle

PROMPTS = [[7, 3, 22, 41], [12], [9, 8, 7]]


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_gives_the_answer_and_commits_exactly_what_equals_it(cache: str) -> None:
    model = tiny_model(seed=5)
    settings = {"gen_length": 16, "block_length": 8, "cache": cache, "end_of_text": "off"}
    slow = decode(model, PROMPTS, policy="topk", **settings)
    fast = decode(model, PROMPTS, policy=Oracle(slow.sequences[:, -16:]), **settings)
    assert torch.equal(fast.sequences, slow.sequences)
    assert int(fast.sequence_passes.sum()) < 0.8 * int(slow.sequence_passes.sum())


def test_an_answer_that_the_model_never_gives_costs_a_pass_a_token_and_is_still_written() -> None:
    model = tiny_model(seed=5)
    model.lm_head[33] = 0.0
    model.lm_head[34] = 10 * model.lm_head[34]  # whatever is asked, 34 or its opposite is far above 33
    answer = torch.full((1, 8), 33)
    out = decode(model, [[4, 5]], gen_length=8, block_length=8, policy=Oracle(answer), end_of_text="off")
    assert out.sequences[0, -8:].tolist() == answer[0].tolist()
    assert out.forward_passes == 8


def test_an_answer_that_does_not_fit_is_named() -> None:
    model = tiny_model(seed=5)
    with pytest.raises(ValueError, match=r"answer: shape \[2, 8\] given; this decode needs \[1, 8\]"):
        decode(model, [[4]], gen_length=8, block_length=8, policy=Oracle(torch.zeros(2, 8, dtype=torch.int64)))
    with pytest.raises(TypeError, match="answer: list given"):
        Oracle([[1]])  # type: ignore[arg-type]

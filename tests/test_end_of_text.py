"""End of text "predicted", against the rule spelled out on Python lists and float64."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from conftest import ending_model
from naive import log_sum_exp, logits_of
from test_reference import make_state

from dllm_engine import LLaDA, decode, end_of_text, tasks
from dllm_engine.policies import Threshold, TokenEditing
from dllm_engine.tokenizer import encode_prompt

GEN, BLOCK, THRESHOLD, END = 32, 8, 0.9, 1


def questions(model: LLaDA) -> list[list[int]]:
    rng = random.Random(3)
    return [
        encode_prompt(model.tokenizer, tasks.generate(task, rng, longest=longest).prompt, chat=True)
        for task in ("copy", "reverse", "insert_index", "remove_index", "shuffle")
        for longest in (3, 4)
    ]


def spelled_out(model: LLaDA, prompt: list[int]) -> tuple[list[int], int, int]:
    """Generated tokens, passes, and how often the text was cut ahead; no cache."""
    p = len(prompt)
    tokens, end = prompt + [model.mask_id] * GEN, p + GEN
    open_ = set(range(p, end))
    passes = cuts = 0
    for start in range(p, p + GEN, BLOCK):
        first = True
        while any(start <= i < start + BLOCK for i in open_):
            logits = logits_of(model, tokens[:end], p, 0.0)
            passes += 1
            best = {}
            for i in open_:
                x = logits[i].copy()
                x[model.mask_id] = -np.inf
                x[model.vocab_size :] = -np.inf
                token = int(np.argmax(x))
                best[i] = (float(np.exp(x[token] - log_sum_exp(logits[i]))), token)
            here = [i for i in open_ if start <= i < start + BLOCK]
            top = max(here, key=lambda i: best[i][0])
            for i in here:
                if best[i][0] >= THRESHOLD or i == top:
                    tokens[i] = best[i][1]
                    open_.discard(i)
                    if tokens[i] == END:
                        end = min(end, i + 1)
            if first:
                for e in range(start + BLOCK, end):
                    if all(best[i][1] == END and best[i][0] >= 0.9 for i in range(e, end)):
                        cuts += e + 1 < end
                        end = e + 1
                        tokens[e] = END
                        open_.discard(e)
                        break
            for i in range(end, p + GEN):
                tokens[i] = END
                open_.discard(i)
            first = False
    return tokens[p:], passes, cuts


def test_equals_the_rule_spelled_out(demo_model: LLaDA) -> None:
    settings = {"gen_length": GEN, "block_length": BLOCK, "policy": Threshold(THRESHOLD), "end_of_text": "predicted"}
    prompts = questions(demo_model)
    batch = {cache: decode(demo_model, prompts, cache=cache, **settings) for cache in ("none", "prefix", "dual")}
    cut = later = 0
    for i, prompt in enumerate(prompts):
        tokens, passes, cuts = spelled_out(demo_model, prompt)
        assert batch["none"].sequences[i, -GEN:].tolist() == tokens, f"sequence {i}"
        assert int(batch["none"].sequence_passes[i]) == passes
        cut += cuts
        later += END in tokens and tokens.index(END) >= BLOCK
        for cache, together in batch.items():
            alone = decode(demo_model, [prompt], cache=cache, **settings)
            assert alone.sequences[0, -GEN:].tolist() == together.sequences[i, -GEN:].tolist()
            assert alone.sequence_passes[0] == together.sequence_passes[i]
    assert cut >= 5, "hardly any text is cut ahead: the test shows nothing"
    assert later >= 5, "texts end in their first block"


def test_a_cut_saves_passes_also_guided_or_drawn(demo_model: LLaDA) -> None:
    settings = {"gen_length": 64, "block_length": BLOCK, "policy": "topk", "seed": 3}
    for extra in ({}, {"cfg_scale": 0.5}, {"temperature": 0.4}):
        passes = {}
        for mode in ("off", "committed", "predicted"):
            out = decode(demo_model, questions(demo_model), end_of_text=mode, **settings, **extra)
            passes[mode] = int(out.sequence_passes.sum())
            if mode != "off":
                for ids, count in zip(out.sequences[:, -64:].tolist(), out.generated_tokens.tolist(), strict=True):
                    assert ids[count:] == [END] * (64 - count)
        assert passes["predicted"] < passes["committed"] < passes["off"]


def test_a_cut_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states are logits. The second sequence is a block further on: its last rows lie behind the canvas."""
    monkeypatch.setattr(end_of_text, "CONFIDENCE", 0.5)  # which equal logits of two ids have
    state = make_state(gen_length=8, block_length=2, batch=3)  # columns 2 to 9
    state.undecided[1, 2:4], state.left[1] = False, 6
    end, even, text = [5.0, 0.0], [0.0, 0.0], [0.0, 5.0]
    logits = torch.tensor([[end, text, even, end, end, even], [text, end, end, even, text, text], [end] * 6])
    first, ids = torch.tensor([4, 6, 4]), torch.tensor([0])
    end_of_text.predict_end_(state, torch.arange(3), first, logits, torch.eye(2), ids, {"backend": "eager"})
    assert state.active_end.tolist() == [7, 8, 5]
    assert state.tokens.tolist() == [
        [50, 51, 99, 99, 99, 99, 1, 1, 1, 1],
        [50, 51, 99, 99, 99, 99, 99, 1, 1, 1],
        [50, 51, 99, 99, 1, 1, 1, 1, 1, 1],
    ]
    open_ = [[i for i, u in enumerate(row) if u] for row in state.undecided.tolist()]
    assert open_ == [[2, 3, 4, 5], [4, 5, 6], [2, 3]]
    assert state.left.tolist() == [4, 3, 2]


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_a_rule_that_stays_in_a_decided_block_still_does(cache: str) -> None:
    """The first call decides all, the end is predicted in the same call; the rule edits on, as under "committed"."""
    prompt, settings = [7, 3, 22, 41, 18, 30], {"gen_length": 12, "block_length": 4, "cache": cache}
    committed, predicted = (
        decode(ending_model(39), [prompt], policy=TokenEditing(0.4, 0.2, 5), end_of_text=mode, **settings)
        for mode in ("committed", "predicted")
    )
    assert predicted.forward_passes == committed.forward_passes == (3 if cache == "none" else 2)
    assert torch.equal(predicted.sequences, committed.sequences)
    if cache == "none":
        assert predicted.sequences[0, 6:8].tolist() == [38, END]

"""Rows that begin and end at any time, each with a length of its own, give what each gives alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import ending_model
from torch import Tensor

from dllm_engine import Engine, Generated, LLaDA, decode, policies
from dllm_engine.continuous import Scheduler
from dllm_engine.options import Options
from dllm_engine.policies import AdaBlock, Factor, Policy, Prophet, Random, Threshold
from dllm_engine.tokenizer import encode_prompt

LENGTHS = (8, 24, 16, 32)


@pytest.fixture(scope="module")
def model() -> LLaDA:
    return ending_model()


def options(model: LLaDA, **changes: Any) -> Options:
    settings: dict[str, Any] = {
        "gen_length": 32, "block_length": 8, "steps": None, "policy": "threshold", "cache": "dual", "temperature": 0.0,
        "cfg_scale": 0.0, "end_of_text": "auto", "backend": "auto",
    }  # fmt: skip
    return Options.resolve(model, longest_prompt=1, **settings | changes)


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (count,), generator=generator).tolist()
    return [torch.randint(2, 59, (n,), generator=generator).tolist() for n in lengths]


def alone(model: LLaDA, prompt: list[int], seed: int, gen_length: int, **settings: Any) -> tuple[list[int], int]:
    """Tokens and passes."""
    out = decode(model, [prompt], seed=seed, gen_length=gen_length, block_length=8, **settings)
    return out.sequences[0].tolist(), int(out.sequence_passes[0])


def drained(scheduler: Scheduler) -> list[Generated]:
    done = []
    while scheduler.running:
        done += scheduler.step()
        scheduler.check()
    return done


MIXES: dict[str, dict[str, Any]] = {
    "dual": {"policy": Threshold(0.5)},
    "prefix": {"policy": Threshold(0.5), "cache": "prefix"},
    "none": {"policy": Factor(1.5), "cache": "none"},
    "drawn": {"policy": Random(), "temperature": 0.8},
    "static": {"policy": "topk", "temperature": 0.7},
    "guided": {"policy": Threshold(0.5), "cfg_scale": 0.8},
    "predicted": {"policy": Threshold(0.5), "end_of_text": "predicted"},
    "everything": {"policy": Threshold(0.5), "end_of_text": "off"},
    "by progress": {"policy": Prophet()},
    "all by progress": {"policy": Prophet(), "end_of_text": "off"},
}


@pytest.mark.parametrize("mix", MIXES)
@torch.inference_mode()
def test_rows_of_different_lengths_equal_the_decode_alone(model: LLaDA, mix: str) -> None:
    given, heard = prompts(13, seed=len(mix)), dict[int, list[int]]()

    def streamer(name: int, tokens: Tensor) -> None:
        heard.setdefault(name, []).extend(tokens.tolist())

    engine, done = Engine(model, max_batch=3, max_length=40), list[Generated]()
    with engine.scheduler(options(model, **MIXES[mix]), streamer) as scheduler:
        for i, prompt in enumerate(given):
            while not scheduler.free:
                done += scheduler.step()
            scheduler.admit(i, prompt, 70 + i, LENGTHS[i % 4])
        done += drained(scheduler)
    assert sorted(one.index for one in done) == list(range(13))
    for one in done:
        length = LENGTHS[one.index % 4]
        tokens, passes = alone(model, given[one.index], 70 + one.index, length, **MIXES[mix])
        assert one.sequence.tolist() == tokens
        assert (one.passes, one.seed, len(one.generated)) == (passes, 70 + one.index, length)
        assert heard[one.index] == one.generated[: len(heard[one.index])].tolist()
        assert len(heard[one.index]) >= min(one.generated_tokens + 1, length)


def test_which_rules_have_a_reach_of_their_own() -> None:
    """The server does not run their rows at different lengths."""
    own = {name for name, rule in policies.RULES.items() if rule.reach is not Policy.reach}
    assert own == {AdaBlock.name, "ete"}


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@torch.inference_mode()
def test_a_cancelled_row_is_free_and_nobody_else_notices(model: LLaDA, cache: str) -> None:
    given, settings = prompts(9, seed=3), {"policy": "topk", "cache": cache}
    engine = Engine(model, max_batch=3, max_length=40)
    with engine.scheduler(options(model, **settings)) as scheduler:
        rows = [scheduler.admit(i, given[i], i) for i in range(3)]
        for _ in range(5):
            assert not scheduler.step()
        assert scheduler.cancel(rows[1]) == 5
        assert scheduler.free == [rows[1]]
        for _ in range(4):
            scheduler.step()
        assert scheduler.loop.taken[rows[1]] == 5
        assert scheduler.admit(3, given[3], 3, 16) == rows[1]
        done = drained(scheduler)
        assert not scheduler.step()
        for i in range(4, 7):
            scheduler.admit(i, given[i], i)
        scheduler.step()
        for row in range(3):
            scheduler.cancel(row)
        assert not scheduler.running
        assert not scheduler.step()
        scheduler.admit(7, given[7], 7)
        done += drained(scheduler)
    assert sorted(one.index for one in done) == [0, 2, 3, 7]
    for one in done:
        length = 16 if one.index == 3 else 32
        assert one.sequence.tolist() == alone(model, given[one.index], one.index, length, **settings)[0]


@torch.inference_mode()
def test_an_engine_has_one_scheduler_at_a_time(model: LLaDA) -> None:
    with Engine(model, max_batch=2, max_length=40) as engine:
        with engine.scheduler(options(model)), pytest.raises(RuntimeError, match="this engine is busy"):
            engine.decode([[4]], gen_length=8, block_length=8)
        assert engine.decode([[4]], gen_length=8, block_length=8).forward_passes
        with pytest.raises(ValueError, match="gen_length: 40 given; max_length 40 leaves no room"):
            engine.scheduler(options(model, gen_length=40)).__enter__()


@torch.inference_mode()
def test_rows_inside_a_block_do_not_wait_for_all_new_ones(demo_model: LLaDA) -> None:
    """While prompts come that need a refresh, a bound on patience gives the others their turn, with the same tokens."""
    names, given = ("Alan Wells", "Grace Wright", "Amy Ford", "Louis Price"), []
    for i in range(40):
        people = ", ".join(f"{j} {names[(i + j) % 4]}" for j in range(4))
        text = f"{('Reverse', 'Copy', 'Sort')[i % 3]}: {people}"
        given.append(encode_prompt(demo_model.tokenizer, text, chat=True))
    waits, found = {}, {}
    for patience in (math.inf, 2):
        rule = options(demo_model, policy=Threshold(0.999), block_length=16)
        engine = Engine(demo_model, max_batch=4, max_length=96)
        with engine.scheduler(rule, patience=patience) as scheduler:
            left, begun, longest, done = iter(enumerate(given)), dict[int, int](), 0, list[Generated]()
            while True:
                while scheduler.free and (one := next(left, None)) is not None:
                    scheduler.admit(*one, 0)
                    begun[one[0]] = scheduler.passes
                if not scheduler.running:
                    break
                for result in scheduler.step():
                    done.append(result)
                    longest = max(longest, scheduler.passes - begun[result.index] - result.passes)
            waits[patience] = longest
            found[patience] = {one.index: (one.sequence.tolist(), one.passes) for one in done}
    assert found[2] == found[math.inf]
    assert waits[2] < waits[math.inf]


@torch.inference_mode()
def test_patience_begins_anew_after_each_turn(model: LLaDA) -> None:
    """One refresh of others is waited for, not two; then a row has its call, and waits again for the next."""
    given = prompts(5)
    engine = Engine(model, max_batch=2, max_length=40)
    with engine.scheduler(options(model, policy="topk", end_of_text="off"), patience=1) as scheduler:

        def calls(count: int) -> list[list[int]]:
            made = []
            for _ in range(count):
                scheduler.step()
                made.append(sorted(scheduler.joined))
            return made

        first = scheduler.admit(0, given[0], 0)
        assert calls(1) == [[first]]
        other = scheduler.admit(1, given[1], 1)
        assert calls(1) == [[other]]
        scheduler.cancel(other)
        scheduler.admit(2, given[2], 2)
        assert calls(3) == [[first], [other], sorted([first, other])]
        scheduler.cancel(other)
        scheduler.admit(3, given[3], 3)
        assert calls(1) == [[other]]

"""decode(): batches, seeds, end of text, odd prompts, streamers, and outputs that are never half done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ending_model, tiny_model
from torch import Tensor

from dllm_engine import LearnedFilter, LLaDA, decode
from dllm_engine.policies import Factor, Learn2PD, Policy, Random, Threshold, TopK

GOLDEN = Path(__file__).parent / "golden"
PROMPTS = [[7, 3, 22, 41, 18, 30], [12], [5, 5, 59], [9, 8, 7, 6, 5, 4, 3, 2, 44]]


def _policies() -> dict[str, Policy]:
    learned = LearnedFilter.from_pretrained(GOLDEN / "filter.safetensors", force=True)
    return {
        "topk": TopK(),
        "random": Random(),
        "threshold": Threshold(0.5),
        "factor": Factor(1.5),
        "learn2pd": Learn2PD(learned, 0.7),
    }


POLICIES = _policies()


@pytest.fixture(scope="module")
def model() -> LLaDA:
    """Random, in float32, with end ids that come up now and then."""
    return ending_model()


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("extra", [{}, {"temperature": 0.7}, {"cfg_scale": 0.8}], ids=["plain", "drawn", "guided"])
def test_a_batch_gives_each_sequence_what_it_gets_alone(
    model: LLaDA, policy: str, cache: str, extra: dict[str, Any]
) -> None:
    settings = {"gen_length": 32, "block_length": 8, "policy": POLICIES[policy], "cache": cache} | extra
    batch = decode(model, PROMPTS, seed=40, **settings)
    width = max(map(len, PROMPTS))
    padded = torch.tensor([[1] * (width - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    assert torch.equal(batch.sequences, decode(model, padded, attention_mask=mask, seed=40, **settings).sequences)
    for i, prompt in enumerate(PROMPTS):
        alone = decode(model, torch.tensor([prompt]), seed=40 + i, **settings)
        assert alone.sequences[0, len(prompt) :].tolist() == batch.sequences[i, -32:].tolist(), f"sequence {i}"
        assert alone.sequence_passes[0] == batch.sequence_passes[i]
        assert alone.generated_tokens[0] == batch.generated_tokens[i]
    assert batch.forward_passes >= batch.sequence_passes.max()
    ends = batch.sequences[:, width:] == 1
    assert bool(ends.any()), "no end of text came up: the test would prove less"


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_no_output_holds_the_mask_or_an_id_beyond_the_vocabulary(model: LLaDA, cache: str) -> None:
    loud = tiny_model(seed=6)
    for i in (59, 60, 63):  # the mask id and rows without a token
        loud.lm_head[i] = loud.lm_head[11] * 2
    out = decode(loud, PROMPTS, gen_length=32, block_length=8, policy="threshold", cache=cache, end_of_text="off")
    generated = out.sequences[:, -32:]
    assert int(generated.max()) < 59
    assert out.sequences[2, :9].tolist() == [1] * 6 + PROMPTS[2]


def test_topk_makes_exactly_steps_passes(model: LLaDA) -> None:
    for steps, passes in ((32, 32), (8, 8), (4, 4), (501, 32)):
        for cache in ("none", "prefix", "dual"):
            out = decode(
                model,
                [[4, 5]],
                gen_length=32,
                block_length=8,
                steps=steps,
                policy="topk",
                cache=cache,
                end_of_text="off",
            )
            assert out.forward_passes == passes
            assert out.sequence_passes.tolist() == [passes]
    assert decode(model, [[4, 5]], gen_length=32, policy="topk", end_of_text="off").forward_passes == 32


def test_steps_are_a_quota_beside_a_rule_of_its_own(model: LLaDA) -> None:
    """With a threshold that nothing passes, ``steps`` alone decides; without steps one position a pass."""
    never = Threshold(1.0)
    off = {"gen_length": 16, "block_length": 8, "end_of_text": "off", "cache": "none"}
    slow = decode(model, [[4, 5]], policy=never, **off)
    assert slow.forward_passes == 16
    assert torch.equal(slow.sequences, decode(model, [[4, 5]], policy="topk", **off).sequences)
    fast = decode(model, [[4, 5]], policy=never, steps=4, **off)
    assert fast.forward_passes == 4
    assert torch.equal(fast.sequences, decode(model, [[4, 5]], policy="topk", steps=4, **off).sequences)


def test_seeds(model: LLaDA) -> None:
    settings = {"gen_length": 16, "block_length": 8, "policy": "random", "temperature": 1.0}
    two = [[4, 5], [4, 5]]
    first = decode(model, two, seed=3, **settings)
    assert torch.equal(first.sequences, decode(model, two, seed=3, **settings).sequences)
    assert first.settings["seed"] == [3, 4]
    assert first.sequences[0].tolist() != first.sequences[1].tolist()
    same = decode(model, two, seed=[9, 9], **settings).sequences
    assert same[0].tolist() == same[1].tolist()
    torch.manual_seed(1)
    drawn = decode(model, two, **settings)
    assert torch.equal(drawn.sequences, decode(model, two, seed=drawn.settings["seed"], **settings).sequences)


def test_sampling_follows_the_distribution() -> None:
    """One position, 4,000 seeds: drawn shares against the model's softmax at two temperatures."""
    model = tiny_model(seed=7, scale=0.6)
    prompt = torch.tensor([[4, 5, 6]])
    logits = model(torch.tensor([[4, 5, 6, 59]]))[0, -1].double()
    logits = logits.index_fill(0, torch.arange(59, 64), float("-inf"))
    for temperature in (0.5, 1.0):
        expected = torch.softmax(logits / temperature, 0)[:60]
        out = decode(
            model, prompt.expand(4000, -1).clone(), gen_length=1, block_length=1, temperature=temperature, seed=0
        )
        shares = torch.bincount(out.sequences[:, -1], minlength=60).double() / 4000
        spread = (expected * (1 - expected) / 4000).sqrt()
        assert float(((shares - expected).abs() / (spread + 1e-3)).max()) < 4.5
        assert float(expected.max()) < 0.9


def test_end_of_text_stops_early_and_keeps_what_comes_before(model: LLaDA) -> None:
    eager_to_end = ending_model()
    for cache in ("none", "prefix", "dual"):
        common = {"gen_length": 64, "block_length": 8, "policy": Threshold(0.6), "cache": cache}
        out = decode(eager_to_end, PROMPTS, end_of_text="committed", **common)
        full = decode(eager_to_end, PROMPTS, end_of_text="off", **common)
        for ids, count in zip(out.sequences[:, -64:].tolist(), out.generated_tokens.tolist(), strict=True):
            assert 1 not in ids[:count]
            assert ids[count:] == [1] * (64 - count)
        assert int(out.sequence_passes.sum()) < int(full.sequence_passes.sum())
        assert bool((out.generated_tokens < 64).any())
        assert torch.equal(out.tokens_per_forward, out.generated_tokens / out.sequence_passes)


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_nan_is_an_error_that_names_sequence_and_position(cache: str) -> None:
    model = tiny_model(seed=1)
    model.wte.weight[33] = float("nan")
    with pytest.raises(RuntimeError, match=r"no valid token for sequence 1 at position 2.*NaN"):
        decode(model, [[4, 5], [6, 33]], gen_length=8, block_length=8, cache=cache)


def test_auto_is_the_threshold_without_a_shipped_filter(model: LLaDA) -> None:
    settings = decode(model, [[4]], gen_length=8, block_length=8).settings
    assert repr(settings["policy"]) == "Threshold(threshold=0.9)"
    assert (settings["cache"], settings["end_of_text"], settings["backend"]) == ("dual", "committed", "cpu")


class Recorder:
    """A streamer that keeps everything."""

    def __init__(self) -> None:
        self.prompt: list[int] | None = None
        self.final: list[int] = []
        self.drafts: list[list[int]] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        if self.prompt is None:
            self.prompt = value.flatten().tolist()
        else:
            self.final += value.flatten().tolist()

    def put_draft(self, value: Tensor) -> None:
        self.drafts.append(self.final + value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


def test_a_streamer_sees_every_step(model: LLaDA) -> None:
    streamer = Recorder()
    out = decode(model, [[4, 5]], gen_length=16, block_length=8, policy="topk", end_of_text="off", streamer=streamer)
    assert streamer.prompt == [4, 5]
    assert streamer.final == out.sequences[0, 2:].tolist()
    assert streamer.ended == 1
    assert len(streamer.drafts) == 15  # the last pass leaves nothing to draft
    undecided = [draft.count(model.mask_id) for draft in streamer.drafts]
    assert undecided == list(range(15, 0, -1))


def test_streamer_errors(model: LLaDA) -> None:
    with pytest.raises(TypeError, match=r"streamer: object has no put\(\)"):
        decode(model, [[4]], gen_length=8, block_length=8, streamer=object())
    with pytest.raises(ValueError, match="streamer: takes one sequence, the batch has 2"):
        decode(model, [[4], [5]], gen_length=8, block_length=8, streamer=Recorder())


def test_transformers_text_streamer_prints_the_answer(demo_model: LLaDA, capsys: pytest.CaptureFixture[str]) -> None:
    streamers = pytest.importorskip("transformers.generation.streamers")
    kind = getattr(streamers, "TextDiffusionStreamer", None)
    if kind is None:
        pytest.skip("this transformers has no TextDiffusionStreamer")
    from dllm_engine.tokenizer import encode_prompt

    ids = encode_prompt(demo_model.tokenizer, "Copy: 0 Alan Wells, 1 Grace Wright, 2 Amy Fox", chat=True)
    decode(demo_model, [ids], gen_length=32, streamer=kind(demo_model.tokenizer))
    assert "Grace Wright" in capsys.readouterr().out

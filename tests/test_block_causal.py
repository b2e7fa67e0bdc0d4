"""Block-causal models: decoding against float64 numpy code that has no cache, for LLaDA2 and SDAR checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from block_causal import RAW_LLADA2, RAW_SDAR, Written, published, reference, write
from conftest import ending_model, tiny_model
from test_policies import make_stats
from torch import Tensor

from dllm_engine import Engine, LearnedFilter, LLaDA, decode
from dllm_engine.likelihood import log_likelihood
from dllm_engine.options import Options
from dllm_engine.policies import AdaBlock, Factor, FreeDave, Learn2PD, Oracle, Policy, Random, Threshold, TopK
from dllm_engine.policies import TokenEditing as Editing
from dllm_engine.state import BlockState, DecodeState
from dllm_engine.stats import RowStats
from dllm_engine.traces import Recorder

# their lengths end before, in, at the end of and behind blocks of 4 and of 8 columns
PROMPTS = [[7, 3, 22, 41, 18, 30], [12], [5, 5, 44, 17], [9, 8, 7, 6, 5, 14, 13, 12, 44, 11, 10], [33] * 8]
RAWS = {"llada2": RAW_LLADA2 | {"num_experts": 16, "num_experts_per_tok": 5}, "sdar": RAW_SDAR}
BASE: dict[str, Any] = {"gen_length": 16, "end_of_text": "off"}
Both = tuple[LLaDA, Written]


@pytest.fixture(scope="module", params=RAWS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    raw = RAWS[request.param]
    tensors = published(reference(raw, seed=1), raw)
    directory = write(tensors, tmp_path_factory.mktemp(request.param) / "model", raw)
    return LLaDA.from_pretrained(directory, device="cpu"), Written(tensors, raw)


@pytest.fixture(scope="module")
def model() -> LLaDA:
    return ending_model(block_size=8, max_sequence_length=511)


@pytest.fixture(scope="module", params=[False, True], ids=["", "shifted"])
def either(request: pytest.FixtureRequest, model: LLaDA) -> LLaDA:
    """Of LLaDA2's and SDAR's kind, or of Fast-dLLM v2's: blocks of 16 columns, decoded in halves."""
    return ending_model(block_size=16, max_sequence_length=511, shifted=True) if request.param else model


@pytest.mark.parametrize("block_length", [4, 8, 16])
def test_every_token_is_that_of_the_float64_code(both: Both, block_length: int) -> None:
    model, written = both
    width = max(map(len, PROMPTS))
    for threshold in (1.0, 0.25):
        expected = [written.decode(prompt, 16, block_length, threshold) for prompt in PROMPTS]
        for cache in ("none", "prefix", "dual"):
            settings = BASE | {"block_length": block_length, "policy": Threshold(threshold), "cache": cache}
            out = decode(model, PROMPTS, **settings)
            assert out.sequences[:, width:].tolist() == expected, cache
            for row, prompt in zip(out.sequences.tolist(), PROMPTS, strict=True):
                assert row[width - len(prompt) : width] == prompt


def test_a_quota_is_that_of_whole_blocks(both: Both) -> None:
    model, written = both
    expected = [written.decode(prompt, 16, 8, 2.0, quota=4) for prompt in PROMPTS]
    out = decode(model, PROMPTS, **BASE, block_length=8, steps=4, policy="topk")
    assert out.sequences[:, -16:].tolist() == expected
    # a prompt's last tokens and the columns that the answer ends in are part of blocks, two steps each
    assert out.sequence_passes.tolist() == [2 * 3 - 1, 2 * 3, 2 * 3 - 1, 2 * 3, 2 * 2]


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_an_end_of_text_fills_what_is_behind_it_but_one_of_the_prompt_does_not(both: Both, cache: str) -> None:
    model, written = both
    end, told = model.end_ids[0], 0
    prompts = [[*prompt, end, 31] for prompt in PROMPTS]
    free = [written.decode(prompt, 32, 8, 0.25) for prompt in prompts]
    ends = [min(row[5] for row in free), end]  # an id that comes up
    expected = [written.decode(prompt, 32, 8, 0.25, end_ids=ends) for prompt in prompts]
    before = model.end_ids
    try:
        model.end_ids = tuple(ends)
        settings = BASE | {"gen_length": 32, "block_length": 8, "end_of_text": "committed", "cache": cache}
        out = decode(model, prompts, policy=Threshold(0.25), **settings)
    finally:
        model.end_ids = before
    for row, answer, count in zip(out.sequences[:, -32:].tolist(), expected, out.generated_tokens, strict=True):
        at = next((i for i, token in enumerate(answer) if token in ends), 32)
        assert row[: at + 1] == answer[: at + 1]
        assert row[at + 1 :] == [model.fill_id] * len(row[at + 1 :])
        assert int(count) == at
        told += at < 32
    assert told


def test_caches_that_are_the_same_are_so_to_a_filter(model: LLaDA, recwarn: pytest.WarningsRecorder) -> None:
    learned = LearnedFilter(8, cache="dual").requires_grad_(False)
    for cache in ("prefix", "dual"):
        decode(model, [[3, 4]], gen_length=16, block_length=8, cache=cache, policy=Learn2PD(learned))
    assert not recwarn.list


def test_padding_that_was_given_is_given_back(both: Both) -> None:
    model, _ = both
    width = max(map(len, PROMPTS)) + 3
    ids = torch.tensor([[50] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    settings = BASE | {"block_length": 4, "policy": Threshold(0.25)}
    out = decode(model, ids, attention_mask=mask, **settings)
    assert torch.equal(out.sequences[:, :width], ids)
    assert torch.equal(out.sequences[:, width:], decode(model, PROMPTS, **settings).sequences[:, -16:])


LEARNED = LearnedFilter.from_pretrained(Path(__file__).parent / "golden/filter.safetensors", force=True)
RULES: list[Policy] = [TopK(), Factor(1.5), Random(), Editing(0.3, 0.2, 4), Threshold(0.2), Learn2PD(LEARNED, 0.7)]


@pytest.mark.parametrize("policy", RULES, ids=str)
@pytest.mark.parametrize("extra", [{}, {"cfg_scale": 0.6}, {"end_of_text": "off"}], ids=str)
def test_caches_are_exact_and_a_batch_gives_each_what_it_gets_alone(
    either: LLaDA, policy: Policy, extra: dict[str, Any]
) -> None:
    model = either
    settings: dict[str, Any] = {"gen_length": 24, "policy": policy, "seed": [4, 5, 6, 7, 8]} | extra
    out = decode(model, PROMPTS, cache="none", **settings)
    cached = decode(model, PROMPTS, cache="dual", **settings)
    assert (cached.settings["block_length"], cached.settings["cache"]) == (8, "dual")
    for other in (cached, decode(model, PROMPTS, cache="prefix", **settings)):
        assert torch.equal(other.sequences, out.sequences)
        assert torch.equal(other.sequence_passes, out.sequence_passes)
        assert other.settings["cache"] == "dual"
    settings.pop("seed")
    for i, prompt in enumerate(PROMPTS):
        alone = decode(model, [prompt], seed=4 + i, **settings)
        assert torch.equal(alone.sequences[0, -24:], out.sequences[i, -24:])
        assert int(alone.sequence_passes) == int(out.sequence_passes[i])
    if not extra.get("cfg_scale"):
        with Engine(model, max_batch=2, max_length=11 + 24) as engine:
            memory, heard = engine.nbytes, dict[int, list[int]]()
            for one in engine.generate_many(
                PROMPTS, streamer=lambda i, tokens: heard.setdefault(i, []).extend(tokens.tolist()), seed=4, **settings
            ):
                assert torch.equal(one.generated, out.sequences[one.index, -24:])
                assert one.sequence.tolist()[: one.prompt_length] == PROMPTS[one.index]
                assert (one.passes, one.generated_tokens) == (
                    int(out.sequence_passes[one.index]),
                    int(out.generated_tokens[one.index]),
                )
                text = one.generated.tolist()
                assert heard[one.index] == text[: len(heard[one.index])]
                assert len(heard[one.index]) in (one.generated_tokens, one.generated_tokens + 1, 24)
            assert engine.nbytes < memory + 100, "what it was made for has room for whole blocks"


class Rewrites(Threshold):
    """Replaces whatever may be replaced, and notes how far each sequence is."""

    reads_decided = True

    def begin(self, state: DecodeState) -> None:
        self.progress: list[float] = []

    def edit(self, stats: RowStats, state: BlockState) -> Tensor:
        self.progress += state.progress.tolist()
        return torch.ones_like(state.undecided)


def test_tokens_of_the_prompt_are_not_edited_and_are_no_progress(either: LLaDA) -> None:
    policy = Rewrites(0.3)
    with Engine(either, max_batch=len(PROMPTS), max_length=32) as engine:
        for one in engine.generate_many(PROMPTS, policy=policy, gen_length=16):
            assert one.sequence[: one.prompt_length].tolist() == PROMPTS[one.index]
    assert policy.progress[: len(PROMPTS)] == [0] * len(PROMPTS)


def begun(policy: Policy, block: int) -> tuple[BlockState, RowStats]:
    """A block of a sequence with a prompt of three and an answer of eight, all decided, where 6 is predicted."""
    state = DecodeState(
        torch.tensor([[7, 3, 22]]), torch.tensor([0]), gen_length=8, block_length=8, steps=None, seeds=[0], mask_id=59,
        fill_id=1, alignment=8,
    )  # fmt: skip
    state.undecided.fill_(False)
    state.block_start.fill_(8 * block)
    policy.begin(state)
    made = state.block(torch.tensor([0]), 8)
    return made, replace(make_stats(made), token=torch.full((1, 8), 6), log_odds=torch.full((1, 8), 9.0))


def test_editing_has_no_wish_to_change_the_prompt() -> None:
    """It would stay in a block for it."""
    block, stats = begun(policy := Editing(0.5, 0.5), 0)
    assert policy.edit(stats, block).tolist() == [[False] * 3 + [True] * 5]


def test_an_oracle_knows_the_answer_alone(model: LLaDA) -> None:
    settings: dict[str, Any] = {"gen_length": 16, "end_of_text": "off"}
    answer = decode(model, PROMPTS, policy="topk", **settings).sequences[:, -16:].clone()
    out = decode(model, PROMPTS, policy=Oracle(answer), **settings)
    assert torch.equal(out.sequences[:, -16:], answer)
    block, stats = begun(policy := Oracle(torch.arange(8)[None]), 1)
    assert policy.tokens(stats, block).tolist() == [[5, 6, 7, 6, 6, 6, 6, 6]]


def test_traces_have_nothing_to_say_of_what_is_behind_an_answer() -> None:
    block, stats = begun(recorder := Recorder(torch.arange(8)[None], 8, 0.0), 1)
    recorder.select(stats, replace(block, undecided=torch.ones_like(block.undecided)))
    assert recorder.steps()["undecided"].tolist() == [[True] * 3 + [False] * 5]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Any]]:
    """Tokens and mask of each call of the transformer."""
    made: list[tuple[Tensor, Any]] = []
    hidden_states = LLaDA.hidden_states

    def noted(self: LLaDA, tokens: Tensor, rope: Any, seen: Any, *more: Any) -> Any:
        made.append((tokens.clone(), seen))
        return hidden_states(self, tokens, rope, seen, *more)

    monkeypatch.setattr(LLaDA, "hidden_states", noted)
    return made


def test_no_row_sees_nothing_and_guidance_masks_the_whole_prompt(model: LLaDA, calls: list[tuple[Tensor, Any]]) -> None:
    for scale in (0.0, 0.5):
        decode(model, PROMPTS, gen_length=8, cfg_scale=scale)
    for _, seen in calls:
        assert seen is None or bool((seen == 0).any(-1).all())
    tokens = next(tokens for tokens, _ in calls if len(tokens) == 2 * len(PROMPTS))
    assert (tokens[1::2] == model.mask_id).sum(1).tolist() == [16] * len(PROMPTS)
    for row, prompt in zip(tokens[::2].tolist(), PROMPTS, strict=True):
        assert [token for token in row if token not in (model.mask_id, model.fill_id)] == prompt


def test_only_first_calls_compute_the_prompt(model: LLaDA, calls: list[tuple[Tensor, Any]]) -> None:
    """Though the third begins when the first is at a block's start."""
    prompts, settings = [[3] * 19, [4] * 24, [5] * 35], {"gen_length": 16, "steps": 4, "end_of_text": "off"}
    with Engine(model, max_batch=2, max_length=60) as engine:
        list(engine.generate_many(prompts, policy="topk", **settings))
    assert sum(len(tokens) for tokens, _ in calls if tokens.shape[1] > 16) == len(prompts)


def test_columns_that_are_computed(model: LLaDA, calls: list[tuple[Tensor, Any]]) -> None:
    """The prompt once, with the first block; later each block beside the one before it, then alone."""
    settings: dict[str, Any] = {"gen_length": 16, "policy": "topk", "steps": 4, "end_of_text": "off"}
    decode(model, [[3] * 19], **settings)
    # two steps for the five columns beside the prompt's three, then two blocks of eight
    assert [tokens.shape[1] for tokens, _ in calls] == [24, 8, 16, 8, 16, 8]
    calls.clear()
    decode(model, [[3] * 19], cache="none", **settings)
    assert [tokens.shape[1] for tokens, _ in calls] == [24, 24, 32, 32, 40, 40]


@pytest.mark.parametrize("cache", ["none", "dual"])
@pytest.mark.parametrize("rule", [TopK(), Threshold(0.4), Factor(1.5)], ids=str)
def test_drafts_change_no_token(either: LLaDA, cache: str, rule: Policy) -> None:
    settings: dict[str, Any] = {"gen_length": 24, "cache": cache}
    plain = decode(either, PROMPTS, policy=rule, **settings)
    out = decode(either, PROMPTS, policy=FreeDave(4, rule=rule), **settings)
    assert torch.equal(out.sequences, plain.sequences)
    assert bool((out.sequence_passes <= plain.sequence_passes).all())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache": "dual/8"}, "cache: 'dual/8' given; a block-causal model's cache is never refreshed"),
        ({"cache": "prefix/never"}, "cache: 'prefix/never' given"),
        ({"end_of_text": "predicted"}, "end_of_text: 'predicted' given; a block-causal model has no predictions right"),
        ({"policy": "ete"}, "policy: ExploreExploit given; a block-causal model computes blocks as they are"),
        ({"policy": AdaBlock(delimiters=[5])}, "policy: AdaBlock given"),
        ({"gen_length": 12}, "block_length: 8 given; it must divide gen_length 12"),
        ({"gen_length": 496}, r"a prompt of 11 tokens \+ 496 exceeds .* 511, 504 of them in whole blocks"),
    ],
    ids=str,
)
def test_what_needs_other_columns_is_refused(model: LLaDA, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(model, PROMPTS, **settings)


def test_prompts_are_counted_in_whole_blocks(model: LLaDA) -> None:
    longest = [3] * 487
    settings: dict[str, Any] = {"gen_length": 16, "policy": Threshold(0.0)}
    out = decode(model, [longest], **settings)  # 488 + 16 columns: there are no more whole blocks
    with Engine(model, max_batch=1, max_length=512) as engine:
        (one,) = engine.generate_many([longest], **settings)
        assert one.sequence.tolist() == out.sequences[0].tolist()
        with pytest.raises(ValueError, match="prompt 0 has 489 tokens; 488 fit"):
            list(engine.generate_many([[3] * 489], **settings))


def test_a_likelihood_is_refused(model: LLaDA) -> None:
    with pytest.raises(ValueError, match="model: a block-causal one given"):
        log_likelihood(model, [[3]], [[4]])


def test_without_a_valid_token_the_position_is_told(both: Both) -> None:
    model = LLaDA.from_pretrained(both[0].path or "", device="cpu")
    model.lm_head.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="no valid token for sequence 0 at position 11:"):  # of `sequences`
        decode(model, PROMPTS, gen_length=16, block_length=4)
    with (
        Engine(model, max_batch=1, max_length=30) as engine,
        pytest.raises(RuntimeError, match="no valid token for prompt 0 at position 6:"),
    ):
        list(engine.generate_many(PROMPTS, gen_length=16, block_length=4))


def test_a_model_of_block_size_0_sees_everything() -> None:
    """The same weights, so that a mask that is left out shows."""
    one, other = tiny_model(), tiny_model(block_size=4)
    outs = [decode(m, PROMPTS, gen_length=16, block_length=4, cache="none", policy="topk") for m in (one, other)]
    assert not torch.equal(outs[0].sequences, outs[1].sequences)
    assert Options.resolve(other, longest_prompt=1).block_length == 4

"""The rules that do more than rank and pick: they remember, edit, set blocks, look ahead and draft."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ending_model, tiny_model
from test_policies import committed, make_block, make_stats, odds_of
from torch import Tensor

from dllm_engine import Engine, LearnedFilter, LLaDA, LLaDAConfig, decode, policies
from dllm_engine.policies import (
    AdaBlock,
    Credit,
    ExploreExploit,
    FreeDave,
    Learn2PD,
    Policy,
    Threshold,
    TokenEditing,
)
from dllm_engine.rules import Rule
from dllm_engine.state import BlockState, DecodeState
from dllm_engine.stats import RowStats

GOLDEN = Path(__file__).parent / "golden"
PROMPTS = [[7, 3, 22, 41, 18, 30], [12], [5, 5, 59], [9, 8, 7, 6, 5, 4, 3, 2, 44]]
CACHES = ["none", "prefix", "dual", "dual/3", "dual/never"]
END, MASK, IDS = 31, 30, 32
Script = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def random_model() -> LLaDA:
    """Sure of little, ends now and then."""
    model = ending_model()
    return model


class Scripted(LLaDA):
    """A model that predicts at each position, whatever stands at the others, what ``script`` says of the offset into
    the generation (after a prompt of three) and the token there: an id and its confidence.
    """

    def __init__(self, script: Script) -> None:
        super().__init__(
            LLaDAConfig(
                d_model=IDS, n_layers=1, n_heads=1, n_kv_heads=1, mlp_hidden_size=1, vocab_size=IDS, embedding_size=IDS,
                max_sequence_length=256, mask_token_id=MASK, eos_token_ids=(END,), rms_norm_eps=1e-5,
                rope_theta=10000.0, weight_tying=True,
            )
        )  # fmt: skip
        self.script = script
        self.eval().requires_grad_(False)
        self.wte.weight.copy_(torch.eye(IDS))

    def rope_tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return positions, positions

    def hidden_states(self, tokens: Tensor, rope: tuple[Tensor, Tensor], *_: Any) -> Tensor:
        ids, confidence = self.script(rope[0].expand(tokens.shape) - 3, tokens)
        logits = ((1 - confidence) / (IDS - 1)).log()[..., None].repeat(1, 1, IDS)
        return logits.scatter(2, ids[..., None], confidence.log()[..., None])


class Blocks:
    """A streamer that keeps what it hears."""

    def __init__(self) -> None:
        self.heard: list[list[int]] = []

    def __call__(self, sequence: int, tokens: Tensor) -> None:
        self.heard.append(tokens.tolist())

    @property
    def lengths(self) -> list[int]:
        return [len(block) for block in self.heard]


def scripted(script: Script, policy: Policy, **settings: Any) -> tuple[list[int], int, Blocks]:
    """The generation, passes and blocks of a scripted model."""
    blocks = Blocks()
    settings = {"gen_length": 16, "block_length": 8, "end_of_text": "off"} | settings
    out = decode(Scripted(script), [[2, 2, 2]], policy=policy, streamer=blocks, **settings)
    assert out.forward_passes == int(out.sequence_passes[0])
    told = [token for block in blocks.heard for token in block]
    assert told == out.sequences[0, 3:][: len(told)].tolist(), "told what is not final"
    return out.sequences[0, 3:].tolist(), out.forward_passes, blocks


# -- all: batches, rows used again, temperature, parameters ------------------------------------------------------------

HOOKED: dict[str, Policy] = {
    "credit": Credit(0.5), "credit one": Credit(0.4, traced=1), "editing": TokenEditing(0.5, 0.3, 3),
    "adablock": AdaBlock(0.4, 0.1, 0.5, 3, delimiters=[40, 17, 8, 23]), "ete": ExploreExploit(0.5),
    "ete three": ExploreExploit(0.6, 3, 1), "freedave": FreeDave(4),
    "freedave threshold": FreeDave(3, rule=Threshold(0.4)),
}  # fmt: skip


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"cache": "none", "end_of_text": "predicted"},
        {"cache": "prefix", "steps": 12},
        {"end_of_text": "predicted"},
        {"cache": "dual/3"},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", HOOKED)
def test_a_batch_gives_each_sequence_what_it_gets_alone(name: str, extra: dict[str, Any]) -> None:
    """Texts of different lengths in one call, and prompts that are put in the rows of finished ones."""
    model = random_model()
    settings = {"gen_length": 24, "block_length": 8, "policy": HOOKED[name]} | extra
    batch = decode(model, PROMPTS, **settings)
    alone = [decode(model, [prompt], **settings) for prompt in PROMPTS]
    for i, one in enumerate(alone):
        assert not (one.sequences[0, -24:] == model.mask_id).any()
        assert one.sequences[0, -24:].tolist() == batch.sequences[i, -24:].tolist(), f"sequence {i}"
        assert int(one.sequence_passes[0]) == int(batch.sequence_passes[i]) == one.forward_passes
    with Engine(model, max_batch=2, max_length=max(map(len, PROMPTS)) + 24) as engine:
        for found in engine.generate_many(PROMPTS, seed=0, **settings):
            assert found.generated.tolist() == alone[found.index].sequences[0, -24:].tolist()
            assert found.passes == alone[found.index].forward_passes
    assert bool((batch.sequences == 1).any()), "no end of text came up: the test would prove less"


def test_no_kernel_decides_for_a_rule_with_a_hook() -> None:
    class Repairs(Threshold):
        def edit(self, stats: RowStats, state: Any) -> Tensor:
            return ~state.undecided

    class Wide(Threshold):
        def reach(self, block_length: int, gen_length: int) -> int:
            return 2 * block_length

    class Writes(Threshold):
        def tokens(self, stats: RowStats, state: Any) -> Tensor:
            return stats.second_token

    given = Threshold(), Repairs(), Wide(), Writes(), FreeDave()
    rules = [policies.as_rule(rule, 8, torch.device("cpu")) for rule in given]
    assert [rule is None for rule in rules] == [False, True, True, True, True]


def test_a_reach_is_a_block_at_least_and_the_text_at_most() -> None:
    class Reaching(Threshold):
        def __init__(self, columns: int) -> None:
            super().__init__(0.5)
            self.columns = columns

        def reach(self, block_length: int, gen_length: int) -> int:
            return self.columns

    model = random_model()
    for far, as_far in ((1, 8), (10**6, 24)):
        one, other = (
            decode(model, PROMPTS, policy=Reaching(columns), gen_length=24, block_length=8).sequences
            for columns in (far, as_far)
        )
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["credit", "editing", "freedave"])
def test_greedy_rules_take_no_temperature(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    monkeypatch.setattr(model, "hidden_states", None)
    with pytest.raises(ValueError, match=r"temperature: 0.7 given; \w+ decides without one"):
        decode(model, PROMPTS, gen_length=8, block_length=8, policy=name, temperature=0.7)
    if name == "freedave":
        with pytest.raises(ValueError, match="cfg_scale: 0.5 given; FreeDave decodes without guidance"):
            decode(model, PROMPTS, gen_length=8, block_length=8, policy=name, cfg_scale=0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Credit(1.1), "threshold: 1.1 given; 0 to 1 allowed"),
        (lambda: Credit(weight=-1), "weight: -1 given; a finite number ≥ 0"),
        (lambda: Credit(decay=1.5), "decay: 1.5 given; 0 to 1"),
        (lambda: Credit(exponent=math.inf), "exponent: inf given"),
        (lambda: Credit(traced=0), "traced: 0 given; a whole number ≥ 1"),
        (lambda: Credit(traced=9), "traced: 9 given; 1 to 8"),
        (lambda: TokenEditing(-0.1), "threshold: -0.1 given"),
        (lambda: TokenEditing(0.7, 2), "edit_threshold: 2 given"),
        (lambda: TokenEditing(post_steps=0), "post_steps: 0 given; a whole number ≥ 1"),
        (lambda: AdaBlock(2), "threshold: 2 given"),
        (lambda: AdaBlock(0.9, -1), "delimiter_threshold: -1 given"),
        (lambda: AdaBlock(window=1.1), "window: 1.1 given; 0 to 1"),
        (lambda: AdaBlock(least=0), "least: 0 given; a whole number ≥ 1"),
        (lambda: AdaBlock(delimiters="."), "delimiters: '.' given; a list"),
        (lambda: AdaBlock(delimiters=[]), "delimiters: \\[\\] given"),
        (lambda: AdaBlock(delimiters=5), "delimiters: 5 given; a list"),  # type: ignore[arg-type]
        (lambda: AdaBlock(delimiters=[0.5]), "delimiters: \\[0.5\\] given"),  # type: ignore[list-item]
        (lambda: ExploreExploit(2), "threshold: 2 given"),
        (lambda: ExploreExploit(blocks=0), "blocks: 0 given"),
        (lambda: ExploreExploit(enough=0), "enough: 0 given"),
        (lambda: FreeDave(1), "drafts: 1 given; a whole number ≥ 2"),
        (lambda: FreeDave(rule=Credit()), "rule: Credit.* given; one that decides by the statistics of one pass"),
        (lambda: FreeDave(rule=TokenEditing()), "rule: TokenEditing"),
        (lambda: FreeDave(rule=AdaBlock()), "rule: AdaBlock"),
        (lambda: FreeDave(rule=ExploreExploit()), "rule: ExploreExploit"),
        (lambda: FreeDave(rule=FreeDave()), "rule: FreeDave"),
    ],
)
def test_bad_parameters_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        make()
    with pytest.raises(TypeError, match="rule: str given"):
        FreeDave(rule="threshold")  # type: ignore[arg-type]


class OfOneBatch(Policy):
    name, of_one_batch = "of one batch", True


def test_drafts_of_a_rule_of_one_batch_are_of_one_batch() -> None:
    with Engine(random_model(), max_batch=2, max_length=32) as engine:
        for policy in (OfOneBatch(), FreeDave(rule=OfOneBatch())):
            with pytest.raises(ValueError, match="belongs to one batch; give it to decode"):
                engine.generate_many(PROMPTS, policy=policy, gen_length=8, block_length=8)


class Steps(Policy):
    name = "steps"

    def __init__(self, steps: Any) -> None:
        self.steps = steps

    def default_steps(self, gen_length: int) -> int | None:
        return self.steps


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (5, r"default_steps: 5 given; the 2 blocks \(gen_length 16 / block_length 8\) must divide it"),
        (1, "default_steps: 1 given; the 2 blocks"),
        (-2, "default_steps: -2 given; at least 1"),
        (2.5, "default_steps: 2.5 given; an int"),
    ],
)
def test_a_rule_s_steps_are_checked_like_the_caller_s(steps: Any, message: str) -> None:
    settings: dict[str, Any] = {"gen_length": 16, "block_length": 8, "end_of_text": "off"}
    with pytest.raises((TypeError, ValueError), match=f"^Steps.{message}"):
        decode(random_model(), PROMPTS, policy=Steps(steps), **settings)
    out = decode(random_model(), PROMPTS, policy=Steps(4), **settings)
    assert (out.settings["steps"], out.forward_passes) == (4, 4)


class ByRule(Policy):
    """A `Rule`, and nothing that says the same in torch."""

    name = "by rule"

    def rule(self, block_length: int, device: torch.device) -> Rule | None:
        return Threshold(0.1).rule(block_length, device)


class Scored(ByRule):
    """Its own score: no kernel decides by the rule."""

    def score(self, stats: RowStats, state: BlockState) -> torch.Tensor:
        return stats.log_odds


@pytest.mark.parametrize("policy", [ByRule(), Scored(), FreeDave(rule=ByRule())], ids=lambda p: p.name)
def test_what_a_rule_says_is_selected(policy: Policy) -> None:
    settings: dict[str, Any] = {"gen_length": 16, "block_length": 8}
    want = decode(random_model(), PROMPTS, policy=Threshold(0.1), **settings)
    assert want.forward_passes < decode(random_model(), PROMPTS, policy="topk", **settings).forward_passes
    out = decode(random_model(), PROMPTS, policy=policy, **settings)
    assert torch.equal(out.sequences, want.sequences)
    assert policy.drafts > 1 or out.forward_passes == want.forward_passes


class Log(Threshold):
    def begin(self, state: DecodeState) -> None:
        self.seen = 0

    def select(self, stats: RowStats, state: BlockState) -> torch.Tensor:
        self.seen += 1
        return super().select(stats, state)


def test_a_decode_that_failed_gives_its_rule_back() -> None:
    """Though somebody keeps the exception, and with it all that its frames hold."""
    model, settings = random_model(), {"gen_length": 8, "block_length": 4, "end_of_text": "off"}
    policy, kept = Log(0.5), []

    def stumble(index: int, tokens: torch.Tensor) -> None:
        raise KeyError(index)

    with Engine(model, max_batch=2, max_length=40) as engine:
        for decoding in (
            lambda: decode(model, PROMPTS, policy=policy, streamer=stumble, **settings),
            lambda: list(engine.generate_many(PROMPTS, policy=policy, streamer=stumble, **settings)),
        ):
            with pytest.raises(KeyError) as raised:
                decoding()
            kept.append(raised)
            out = decode(model, PROMPTS, policy=policy, **settings)
            assert policy.seen == out.forward_passes


def test_drafts_beyond_a_block_are_refused() -> None:
    model = random_model()
    for block_length, drafts, most in ((8, 9, 8), (4, 9, 8), (16, 17, 16)):
        settings = {"gen_length": 16, "block_length": block_length}
        with pytest.raises(ValueError, match=f"^drafts: {drafts} given; 2 to {most} allowed"):
            decode(model, PROMPTS, policy=FreeDave(drafts), **settings)
        decode(model, PROMPTS, policy=FreeDave(most), **settings)
    decode(model, PROMPTS, gen_length=8, block_length=4, policy="freedave")
    with pytest.raises(ValueError, match="^drafts: 65 given; 2 to 64 allowed"):
        decode(model, PROMPTS, policy=FreeDave(65), gen_length=128, block_length=128)
    with pytest.raises(ValueError, match="this filter takes blocks up to 4"):  # the rule checks itself too
        decode(model, PROMPTS, policy=FreeDave(4, rule=Learn2PD(LearnedFilter(4))), gen_length=8, block_length=8)


# -- editing -----------------------------------------------------------------------------------------------------------


def answers(first_wrong: dict[int, int], then: Callable[[Tensor, Tensor], Tensor] | None = None) -> Script:
    """Position i is 10 + i, but what is masked at ``first_wrong`` is taken for another; ``then``: of decided tokens."""

    def script(offset: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        right = (10 + offset).clamp(0, IDS - 1)
        wrong = right.clone()
        for at, token in first_wrong.items():
            wrong[offset == at] = token
        later = right if then is None else then(offset, tokens)
        return torch.where(tokens == MASK, wrong, later), torch.full(tokens.shape, 0.9)

    return script


@pytest.mark.parametrize("cache", CACHES)
def test_editing_repairs_what_was_decided_wrongly(cache: str) -> None:
    text, passes, blocks = scripted(answers({9: 3, 12: 4, 15: 5}), TokenEditing(), cache=cache)
    assert text == list(range(10, 26))
    assert passes == 2 + 3  # a block without an edit costs one more pass, an edit costs another
    assert blocks.lengths == [8, 8]
    text, passes, _ = scripted(answers({9: 3, 12: 4}), TokenEditing(edit_threshold=0.91), cache=cache)
    assert [text[9], text[12], passes] == [3, 4, 4]


def test_editing_does_not_swing_and_stops() -> None:
    def swing(offset: Tensor, tokens: Tensor) -> Tensor:
        return torch.where(offset == 5, torch.where(tokens == 3, 4, 3), tokens)

    text, passes, _ = scripted(answers({5: 3}, swing), TokenEditing(), gen_length=8)
    assert [text[5], passes] == [4, 3]

    def turn(offset: Tensor, tokens: Tensor) -> Tensor:
        return torch.where(offset == 5, (tokens + 1) % 6, tokens)  # six tokens, one after the other

    for post in (1, 4, 16):
        text, passes, _ = scripted(answers({5: 3}, turn), TokenEditing(post_steps=post), gen_length=8)
        assert [text[5], passes] == [(3 + post) % 6, 1 + post]


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_editing_at_the_end_of_a_text(cache: str) -> None:
    settings = {"cache": cache, "end_of_text": "committed", "gen_length": 24}
    text, passes, blocks = scripted(answers({2: 3, 10: END}, None), TokenEditing(), **settings)
    assert text[:10] == list(range(10, 20))
    assert text[11:] == [END] * 13  # the end that was committed stays, though a token came in its place
    assert [text[10], passes] == [20, 3 + 3]
    assert sum(blocks.lengths) == 11

    def ends(offset: Tensor, tokens: Tensor) -> Tensor:
        return torch.where(offset == 10, END, tokens)

    text, passes, blocks = scripted(answers({}, ends), TokenEditing(), **settings)
    assert text == [*range(10, 20), *[END] * 14]  # an edit may end the text
    assert passes == 2 + 3
    assert sum(blocks.lengths) == 11


def test_only_decided_positions_of_the_text_are_edited() -> None:
    class Eager(TokenEditing):
        def edit(self, stats: RowStats, state: Any) -> Tensor:
            super().edit(stats, state)
            return torch.ones_like(state.undecided)

    masked, script = [], answers({2: END})

    def watched(offset: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        masked.append(int((tokens == MASK).sum()))
        return script(offset, tokens)

    settings = {"gen_length": 8, "end_of_text": "committed", "cache": "none"}
    text, _, _ = scripted(watched, Eager(0.95, 0.95), **settings)
    assert masked == [8, 7, 6, 0]  # one a step by the quota, then the pass of edits
    assert text == [10, 11, 12, *[END] * 5]


# -- adaptive blocks ---------------------------------------------------------------------------------------------------

DOT = 7


def dots(confidences: dict[int, float]) -> Script:
    """A delimiter at these offsets, with these confidences; the rest is sure."""

    def script(offset: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        ids, confidence = torch.full(tokens.shape, 3), torch.full(tokens.shape, 0.99)
        for at, value in confidences.items():
            ids[offset == at], confidence[offset == at] = DOT, value
        return ids, confidence

    return script


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize(
    ("window", "least", "found", "expected"),
    [
        (0.5, 4, {2: 0.99, 10: 0.8, 20: 0.4, 22: 0.6, 26: 0.2}, [11, 12, 8, 1]),  # too early, best, surer, unsure
        (0.5, 3, {2: 0.99, 10: 0.8}, [3, 8, 8, 8, 5]),
        (0.5, 1, {0: 0.95, 15: 0.9, 16: 0.95}, [1, 16, 8, 7]),  # the window's last position counts
        (0.25, 1, {8: 0.95}, [8, 1, 8, 8, 7]),  # the first behind it does not
        (0.125, 1, {3: 0.9, 12: 0.9}, [4, 8, 1, 8, 8, 3]),  # a window that is less than a block
        (0.0, 1, {3: 0.9}, [8] * 4),
        (1.0, 1, {31: 0.95}, [32]),
    ],
)
def test_blocks_end_at_delimiters(
    cache: str, window: float, least: int, found: dict[int, float], expected: list[int]
) -> None:
    policy = AdaBlock(0.3, 0.3, window, least, delimiters=[DOT, 29])
    _, passes, blocks = scripted(dots(found), policy, gen_length=32, cache=cache)
    assert blocks.lengths == expected
    unsure = sum(0.2 <= value < 0.3 for value in found.values())
    assert passes == len(expected) + unsure  # a confidence below the threshold falls by the quota, alone


def test_a_quota_does_not_reach_over_the_block() -> None:
    policy = AdaBlock(0.995, 0.3, 0.5, 1, delimiters=[DOT])
    _, passes, blocks = scripted(dots({4: 0.9, 9: 0.9}), policy, gen_length=16, steps=8)
    assert blocks.lengths == [5, 5, 6]
    assert passes == 3 + 3 + 3


def test_delimiters_must_be_known(demo_model: LLaDA) -> None:
    settings: dict[str, Any] = {"gen_length": 8, "block_length": 8}
    with pytest.raises(ValueError, match="delimiters: 60 given; ids 0 to 59 allowed"):
        decode(tiny_model(), PROMPTS, policy=AdaBlock(delimiters=[60]), **settings)
    with pytest.raises(ValueError, match="has no tokenizer; use token ids"):
        decode(tiny_model(), PROMPTS, policy="adablock", **settings)
    with pytest.raises(ValueError, match="the tokenizer has none of them as a single token"):
        decode(demo_model, [[5]], policy=AdaBlock(delimiters=["no such token, surely"]), **settings)
    policy = AdaBlock(delimiters=["no such token, surely", ".", 3]).check(demo_model, block_length=8, cache="dual")
    assert 3 in policy._ids
    assert len(policy._ids) >= 2
    assert {demo_model.tokenizer.decode(i).strip() for i in policy._ids if i != 3} == {"."}


def test_a_rule_serves_models_with_other_delimiters_at_once() -> None:
    """An iterator that has not begun when the same object decodes with the other model."""

    class Tokenizer:
        unk_token_id = None

        def __init__(self, token: int) -> None:
            self.token = token

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [self.token]}

        def convert_tokens_to_ids(self, text: str) -> int:
            return self.token

    first, second = ending_model(5), ending_model(6)
    first._tokenizer, second._tokenizer = Tokenizer(15), Tokenizer(33)
    settings = {"gen_length": 16, "block_length": 8}
    policy = AdaBlock(0.5, 0.0, 1.0, 1, delimiters=["\n"])
    want = decode(first, [[3, 4, 5]], policy=policy, **settings)
    with Engine(first, max_batch=1, max_length=32) as engine:
        results = engine.generate_many([[3, 4, 5]], policy=policy, **settings)
        decode(second, [[3, 4, 5]], policy=policy, **settings)
        assert torch.equal(next(results).sequence, want.sequences[0])


# -- explore, exploit --------------------------------------------------------------------------------------------------


def test_exploring_takes_what_is_least_known() -> None:
    block = make_block([[1, 1, 0, 1]], [3])
    unsure = {"log_odds": odds_of(0.6, 0.5, 0.99, 0.7), "entropy": [[0.8, 1.2, 9.0, 0.7]]}
    assert committed(ExploreExploit(), make_stats(block, **unsure), block) == [[1]]
    sure = unsure | {"log_odds": odds_of(0.96, 0.5, 0.99, 0.7)}
    assert committed(ExploreExploit(enough=1), make_stats(block, **sure), block) == [[0]]
    assert committed(ExploreExploit(), make_stats(block, **sure), block) == [[0, 1]]
    sure["log_odds"] = odds_of(0.96, 0.5, 0.99, 0.97)
    assert committed(ExploreExploit(enough=2), make_stats(block, **sure), block) == [[0, 3]]


@pytest.mark.parametrize("cache", CACHES)
def test_blocks_that_were_decided_early_cost_nothing(cache: str) -> None:
    """Sure of block 2, 3 and 5 of five: after block 1, the next pass is of 4; block 2 fell in the first."""

    def script(offset: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        sure = torch.isin(offset // 4, torch.tensor([1, 2, 4]))
        return torch.full(tokens.shape, 3), torch.where(sure, 0.99, 0.5)

    for blocks, expected, passes in ((1, [4] * 5, 4 + 1 + 1 + 4 + 1), (2, [8, 4, 8], 1 + 4 + 1 + 1 + 4)):
        policy = ExploreExploit(blocks=blocks)
        _, found, heard = scripted(script, policy, gen_length=20, block_length=4, cache=cache)
        assert heard.lengths == expected
        assert found == passes
    _, found, heard = scripted(script, ExploreExploit(blocks=3), gen_length=20, block_length=4, cache=cache)
    assert heard.lengths == [12, 8]
    assert found == 1 + 4 + 1 + 4

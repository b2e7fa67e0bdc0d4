"""Fast-dLLM v2: its checkpoints, and its decoding against float64 numpy code that follows the published loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fast_dllm
import pytest
import torch
from fast_dllm import RAW, SPECIAL, Written
from torch import Tensor

from dllm_engine import Engine, LLaDA, LLaDAConfig, decode
from dllm_engine.buffers import Buffers
from dllm_engine.forward import Forward
from dllm_engine.likelihood import log_likelihood
from dllm_engine.policies import FreeDave, Policy, Threshold
from dllm_engine.state import BlockState, DecodeState
from dllm_engine.stats import RowStats

# their lengths end in, at the end of and behind blocks of 16, and of parts of 4 and 8, columns
PROMPTS = [[7, 3, 22, 41, 18, 30], [12], [5] * 16, [9, 8, 7, 6, 5, 14, 13, 12, 44, 11, 10], [33] * 32, [4, 19] * 10]
WIDTH = max(map(len, PROMPTS))
TENSORS = dict[str, Tensor]


@pytest.fixture(scope="module")
def tensors() -> TENSORS:
    return {name: t.clone() for name, t in fast_dllm.reference(seed=1).state_dict().items()}


@pytest.fixture(scope="module")
def checkpoint(tensors: TENSORS, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fast_dllm.write(tensors, tmp_path_factory.mktemp("fast-dllm") / "model")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> LLaDA:
    return LLaDA.from_pretrained(checkpoint, device="cpu")


@pytest.fixture(scope="module")
def written(tensors: TENSORS) -> Written:
    return Written(tensors)


# -- files ------------------------------------------------------------------------------------------------------------


def test_published_sizes() -> None:
    """Efficient-Large-Model/Fast_dLLM_v2_1.5B."""
    published = RAW | {
        "bd_size": 32, "eos_token_id": 151645, "hidden_size": 1536, "intermediate_size": 8960,
        "layer_types": ["full_attention"] * 28, "max_position_embeddings": 32768, "num_attention_heads": 12,
        "num_hidden_layers": 28, "vocab_size": 151936, "mask_token_id": 151665,
    }  # fmt: skip
    config = LLaDAConfig.from_dict(published)
    assert (config.block_size, config.block_length, config.shifted, config.include_qkv_bias) == (32, 8, True, True)
    assert (config.head_dim, config.rotary_dim, config.qk_norm, config.num_experts) == (128, 128, False, 0)
    assert (config.d_model, config.n_kv_heads, config.mlp_hidden_size, config.weight_tying) == (1536, 2, 8960, True)
    short = {key: value for key, value in published.items() if key not in ("bd_size", "use_sliding_window")}
    assert LLaDAConfig.from_dict(short) == config
    assert LLaDAConfig.from_dict(published | {"bd_size": 12}).block_length == 4
    rope = {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}  # as transformers 5 writes it
    assert LLaDAConfig.from_dict({k: v for k, v in published.items() if k != "rope_theta"} | rope) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "rope_scaling is {"),
        ({"use_sliding_window": True}, "use_sliding_window is True; supported: False"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "supported: 'full_attention' for each"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: 'silu'"),
        ({"bd_size": 0}, "bd_size is 0; it must be at least 1"),
        ({"bd_size": "8"}, "bd_size is '8'; a whole number is needed"),
    ],
    ids=str,
)
def test_what_is_not_computed_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLaDAConfig.from_dict(RAW | {"mask_token_id": 59} | changes)


def test_a_checkpoint_as_it_is_published(model: LLaDA) -> None:
    assert (model.mask_id, model.end_ids, model.fill_id, model.vocab_size) == (59, (2, 1), 2, 61)
    assert SPECIAL["|<MASK>|"] == model.mask_id
    assert "lm_head.weight" not in dict(model.named_parameters())
    out = decode(model, [[5, 6]], gen_length=8, policy="topk")
    assert (out.settings["block_length"], out.settings["cache"]) == (8, "dual")


def test_a_checkpoint_without_a_mask_token_is_refused(tensors: TENSORS, tmp_path: Path) -> None:
    directory = fast_dllm.write(tensors, tmp_path / "model")
    made = (directory / "tokenizer.json").read_text(encoding="utf-8").replace("|<MASK>|", "<MASK>")
    (directory / "tokenizer.json").write_text(made, encoding="utf-8")
    with pytest.raises(ValueError, match="key 'mask_token_id' is missing"):
        LLaDA.from_pretrained(directory, device="cpu")


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False, "bd_size": 8}], ids=str)
def test_logits_are_those_of_qwen2_under_such_a_mask(tmp_path: Path, changes: dict[str, Any]) -> None:
    raw = RAW | changes
    other = fast_dllm.reference(raw, seed=2)
    directory = fast_dllm.write(other.state_dict(), tmp_path / "model", raw)
    ids = torch.randint(0, 60, (2, 45), generator=torch.Generator().manual_seed(2))
    expected = fast_dllm.logits_of(other, ids, raw["bd_size"])
    assert float(expected.std()) > 1
    loaded = LLaDA.from_pretrained(directory, device="cpu")
    assert torch.allclose(loaded(ids), expected, atol=2e-4)
    padded, mask = torch.cat((torch.full((2, 3), 1), ids), dim=1), torch.ones(2, 48)
    mask[:, :3] = 0
    # the first column has its own row's logits, but behind padding that of padding
    assert torch.allclose(loaded(padded, mask)[:, 4:], expected[:, 1:], atol=2e-4)


def test_a_loaded_module_is_shared(checkpoint: Path, model: LLaDA) -> None:
    """The directory that it was loaded from tells which token is the mask."""
    other = fast_dllm.reference(seed=1)
    other.config._name_or_path = str(checkpoint)
    other.config.to_dict = lambda: dict(RAW)
    shared = LLaDA.from_transformers(other)
    assert (shared.mask_id, shared.wte.weight.data_ptr()) == (59, other.model.embed_tokens.weight.data_ptr())
    settings: dict[str, Any] = {"gen_length": 16, "policy": Threshold(0.25)}
    assert torch.equal(decode(shared, PROMPTS, **settings).sequences, decode(model, PROMPTS, **settings).sequences)


# -- decoding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", [4, 20, 40])
def test_the_written_code_computes_what_qwen2_does(tensors: TENSORS, written: Written, column: int) -> None:
    """A column's logits, from cached keys of the blocks before its own."""
    ids = torch.randint(0, 60, (1, 48), generator=torch.Generator().manual_seed(column))
    model, raw = fast_dllm.reference(seed=1), RAW
    cache = torch.zeros(raw["num_hidden_layers"], 2, raw["num_key_value_heads"], 48, written.dim).double().numpy()
    for first in range(0, 48, 16):
        rows = written.block(ids[0].tolist(), first, cache, first + 16)
        if first <= column - 1 < first + 16:
            found = torch.from_numpy(rows[column - 1 - first]).float()
    assert torch.allclose(found, fast_dllm.logits_of(model, ids, 16)[0, column], atol=1e-4)


@pytest.mark.parametrize("cache", ["none", "dual"])
@pytest.mark.parametrize(("block_length", "gen_length"), [(4, 20), (8, 24), (16, 32), (1, 18)])
def test_every_token_and_pass_is_that_of_the_float64_code(
    model: LLaDA, written: Written, block_length: int, gen_length: int, cache: str
) -> None:
    for threshold in (1.0, 0.25):
        settings = {"block_length": block_length, "policy": Threshold(threshold), "end_of_text": "off"}
        out = decode(model, PROMPTS, gen_length=gen_length, cache=cache, **settings)
        for row, passes, prompt in zip(out.sequences.tolist(), out.sequence_passes, PROMPTS, strict=True):
            expected = written.decode(prompt, gen_length, block_length, threshold)
            assert row[WIDTH - len(prompt) :] == prompt + expected
            assert int(passes) == written.passes


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_an_end_of_text_hides_what_is_behind_it(checkpoint: Path, written: Written, cache: str) -> None:
    model = LLaDA.from_pretrained(checkpoint, device="cpu")
    prompts, told = [[*prompt, 2, 31] for prompt in PROMPTS], set()
    free = [written.decode(prompt, 32, 8, 0.25) for prompt in prompts]
    for end in {row[-len(prompt) % 16] for row, prompt in zip(free, prompts, strict=True)} - {2}:
        model.end_ids = (2, end)
        out = decode(model, prompts, gen_length=32, policy=Threshold(0.25), cache=cache)
        for row, count, passes, prompt in zip(
            out.sequences[:, -32:].tolist(), out.generated_tokens, out.sequence_passes, prompts, strict=True
        ):
            expected = written.decode(prompt, 32, 8, 0.25, end_ids=(2, end))
            assert row == expected
            assert int(passes) == written.passes
            at = next((i for i, token in enumerate(expected) if token in (2, end)), 32)
            assert int(count) == at
            told.add((len(prompt) + at) % 16 if at < 32 else -1)
    assert 0 in told, "a text that ends with the first column of a block"
    assert len(told) > 3


def test_each_model_call(model: LLaDA, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns computed, with and without a cache: the prompt once, a block when it is done, else the model's block."""
    made: list[int] = []
    hidden_states = LLaDA.hidden_states

    def noted(self: LLaDA, tokens: Tensor, *more: Any) -> Any:
        made.append(tokens.shape[1])
        return hidden_states(self, tokens, *more)

    monkeypatch.setattr(LLaDA, "hidden_states", noted)
    settings: dict[str, Any] = {"policy": "topk", "steps": 6, "gen_length": 24, "end_of_text": "off"}
    decode(model, [[3] * 19], **settings)  # five columns, eight, the next block's first, seven, four of eight more
    assert made == [32, 16, 16, 16, 16, 16, 16, 16, 16]
    made.clear()
    decode(model, [[3] * 16], **settings)
    assert made == [16] * 8
    made.clear()
    decode(model, [[3] * 16], cache="none", **settings)
    assert made == [16, 32, 32, 32, 32, 32, 48, 48]


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_texts_that_end_within_different_parts_of_a_block(model: LLaDA, cache: str) -> None:
    """Rows that the longest part of a block has and the shortest text has not."""
    prompts = torch.tensor([[5] * 24, [7] * 24])
    state = DecodeState(
        prompts, torch.zeros(2, dtype=torch.int64), gen_length=16, block_length=8, steps=None, seeds=[0, 0],
        mask_id=59, fill_id=2, alignment=16,
    )  # fmt: skip
    forward = Forward(model, state, Buffers(torch.device("cpu")), cache=cache, cfg_scale=0.0, reach=8)
    with torch.inference_mode():
        forward([0, 1], [24, 24], [32, 32], refresh=True, width=8)
        _, both = forward([0, 1], [24, 16], [26, 24], refresh=False, width=8)
        for row, start, end, count in ((0, 24, 26, 2), (1, 16, 24, 8)):
            _, alone = forward([0, 1], [start] * 2, [end] * 2, refresh=False, width=count)
            assert torch.allclose(both[row, :count], alone[row], atol=1e-5)


class Watches(Threshold):
    """Notes what it sees."""

    reads_decided = True

    def begin(self, state: DecodeState) -> None:
        self.seen: list[tuple[int, int, int, float]] = []

    def select(self, stats: RowStats, state: BlockState) -> Tensor:
        for row, columns in enumerate(state.columns.tolist()):
            predicted = int(state.predicted[row].ge(0).sum()), int(stats.token[row, 0])
            self.seen.append((columns[0], int(state.step_in_block[row]), *predicted))
        return super().select(stats, state)


def test_a_rule_sees_opened_blocks_as_new_and_what_their_first_column_was_decided_by(model: LLaDA) -> None:
    policy = Watches(0.25)
    out = decode(model, [[33] * 16], gen_length=32, policy=policy, end_of_text="off")
    tokens = out.sequences[0].tolist()
    begun = [seen for seen in policy.seen if seen[1] == 0]
    assert [column for column, *_ in begun] == [16, 24, 32, 40]
    assert [predicted for _, _, predicted, _ in begun] == [1, 0, 1, 0]
    for column, _, _, token in policy.seen:
        if column % 16 == 0:
            assert token == tokens[column]


def test_a_rule_sees_the_same_with_and_without_a_cache(model: LLaDA) -> None:
    """The block's first column, too, where it is the prompt's: the last row of the block before predicts it."""
    found = []
    for cache in ("none", "dual"):
        decode(model, [[9] * 16], policy=(policy := Watches(0.25)), gen_length=16, cache=cache)  # leaves its own row
        decode(model, [[4, 19] * 10], policy=policy, gen_length=16, end_of_text="off", cache=cache)
        found.append(policy.seen)
    assert found[0] == found[1]
    assert {column for column, *_ in found[0]} == {16, 24, 32}


def test_guidance_and_temperature_go_with_it(model: LLaDA) -> None:
    for extra in ({"cfg_scale": 0.6}, {"temperature": 0.8}):
        settings: dict[str, Any] = {"gen_length": 24, "policy": Threshold(0.3)} | extra
        out = decode(model, PROMPTS, seed=list(range(6)), **settings)
        again = decode(model, PROMPTS, seed=list(range(6)), cache="none", **settings)
        assert torch.equal(out.sequences, again.sequences)
        for i, prompt in enumerate(PROMPTS):
            alone = decode(model, [prompt], seed=i, **settings)
            assert torch.equal(alone.sequences[0, -24:], out.sequences[i, -24:])


@pytest.mark.parametrize("policy", [Threshold(0.25), FreeDave(4)], ids=str)
def test_prompts_that_come_and_go(model: LLaDA, policy: Policy) -> None:
    """Rows are in every phase: sequences of other prompts, first columns, parts of blocks."""
    prompts = PROMPTS * 2
    expected = decode(model, prompts, gen_length=24, policy=policy)
    with Engine(model, max_batch=3, max_length=WIDTH + 24) as engine:
        memory = engine.nbytes
        for one in engine.generate_many(prompts, gen_length=24, policy=policy):
            assert one.sequence.tolist() == [*prompts[one.index], *expected.sequences[one.index, -24:].tolist()]
            assert one.passes == int(expected.sequence_passes[one.index])
        assert engine.nbytes < memory + 100, "what it was made for has room for whole blocks"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_length": 32, "gen_length": 32}, "block_length: 32 given; it must divide the model's block size 16"),
        ({"block_length": 3}, "block_length: 3 given; it must divide gen_length 16"),
        ({"block_length": 6, "gen_length": 12}, "block_length: 6 given; it must divide the model's block size 16"),
        ({"cache": "dual/8"}, "cache: 'dual/8' given; a block-causal model's cache is never refreshed"),
        ({"end_of_text": "predicted"}, "end_of_text: 'predicted' given; a block-causal model has no predictions right"),
        ({"policy": "ete"}, "policy: ExploreExploit given; a block-causal model"),
        ({"gen_length": 488}, r"gen_length: a prompt of 32 tokens \+ 488 exceeds the model's max_sequence_length 512$"),
    ],
    ids=str,
)
def test_what_does_not_go_with_it_is_refused(model: LLaDA, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(model, PROMPTS, **({"gen_length": 16} | settings))


def test_a_likelihood_is_refused(model: LLaDA) -> None:
    with pytest.raises(ValueError, match="model: a block-causal one given"):
        log_likelihood(model, [[3]], [[4]])


def test_a_first_column_without_a_valid_token_is_told(checkpoint: Path) -> None:
    model = LLaDA.from_pretrained(checkpoint, device="cpu")
    model.lm_head.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="no valid token for sequence 0 at position 16:"):
        decode(model, [[5] * 16], gen_length=16)

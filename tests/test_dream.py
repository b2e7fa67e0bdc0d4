"""Dream: rows that predict the column behind theirs, against transformers' Qwen2 and decoding in float64 numpy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import naive
import pytest
import torch
from dreams import GENERATION, RAW, Written, logits_of, reference, write
from safetensors.torch import load_file, save_file
from torch import Tensor

from dllm_engine import Engine, LLaDA, LLaDAConfig, decode
from dllm_engine.likelihood import log_likelihood
from dllm_engine.tokenizer import encode_prompt, load_tokenizer

IDS = torch.tensor([[3, 4, 40, 12, 50, 260, 260, 7], [9, 260, 22, 31, 260, 2, 8, 260]])
PROMPTS = [[3, 4, 40, 12], [9, 22, 31, 2, 8, 50, 17], [11]]
BASE: dict[str, Any] = {"gen_length": 24, "block_length": 8, "end_of_text": "off"}


@pytest.fixture(scope="module")
def truth() -> Any:
    return reference()


@pytest.fixture(scope="module")
def checkpoint(truth: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(truth.state_dict(), tmp_path_factory.mktemp("dream") / "model")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> LLaDA:
    return LLaDA.from_pretrained(checkpoint, device="cpu")


@pytest.fixture(scope="module")
def ending(checkpoint: Path) -> LLaDA:
    """With an end id that comes up now and then."""
    model = LLaDA.from_pretrained(checkpoint, device="cpu")
    model.lm_head[256] = model.lm_head[60] * 1.3
    return model


@pytest.fixture(scope="module")
def written(checkpoint: Path) -> Written:
    return Written(load_file(checkpoint / "model.safetensors"))


@pytest.mark.parametrize(
    "changes", [{}, {"num_key_value_heads": 4}, {"tie_word_embeddings": True}, {"num_key_value_heads": 1}], ids=str
)
def test_logits_are_those_of_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    raw = RAW | changes
    other = reference(raw, seed=3)
    expected = logits_of(other, IDS)
    loaded = LLaDA.from_pretrained(write(other.state_dict(), tmp_path / "model", raw), device="cpu")
    assert torch.allclose(loaded(IDS), expected, atol=1e-4)
    assert float(expected.std()) > 1
    padded = torch.cat((torch.full((2, 3), 256), IDS), dim=1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    assert torch.allclose(loaded(padded, mask)[:, 4:], expected[:, 1:], atol=1e-4)


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("threshold", [2.0, 0.5, 0.2])
def test_a_decode_is_the_one_spelled_out(model: LLaDA, written: Written, cache: str, threshold: float) -> None:
    expected = [written.decode(prompt, 24, 8, cache, threshold) for prompt in PROMPTS]
    policy = "topk" if threshold > 1 else f"threshold={threshold}"
    for prompt, answer in zip(PROMPTS, expected, strict=True):
        alone = decode(model, [prompt], policy=policy, cache=cache, **BASE)
        assert alone.sequences[0].tolist() == prompt + answer
    together = decode(model, PROMPTS, policy=policy, cache=cache, **BASE)
    assert together.sequences[:, -24:].tolist() == expected


def test_caches_differ_where_they_may(written: Written) -> None:
    """So that the test above can fail."""
    found = [written.decode(PROMPTS[1], 24, 8, cache, 2.0) for cache in ("none", "prefix", "dual")]
    assert found[0] != found[1] != found[2] != found[0]


def test_a_decode_writes_what_the_naive_loop_does(truth: Any, model: LLaDA) -> None:
    class Slow(SimpleNamespace):
        def __call__(self, ids: Tensor) -> Tensor:
            return logits_of(truth, ids)

    slow = Slow(mask_id=260, fill_id=256, vocab_size=261)
    for extra in ({}, {"temperature": 0.7, "seed": 5}, {"cfg_scale": 0.8}):
        expected = naive.generate(slow, PROMPTS[1], steps=16, gen_length=16, block_length=8, **extra)
        settings: dict[str, Any] = {"policy": "topk", "cache": "none", "end_of_text": "off", **extra}
        out = decode(model, [PROMPTS[1]], steps=16, gen_length=16, block_length=8, **settings)
        assert out.sequences[0].tolist() == expected


@pytest.mark.parametrize("cache", ["none", "prefix", "dual", "dual/3"])
@pytest.mark.parametrize("extra", [{}, {"cfg_scale": 0.8}, {"end_of_text": "predicted"}], ids=str)
def test_a_prompt_gets_in_a_stream_what_it_gets_alone(ending: LLaDA, cache: str, extra: dict[str, Any]) -> None:
    """Rows that end at different times, and prompts that take their places."""
    prompts = [[(7 * i + j) % 250 for j in range(1 + i % 4)] for i in range(7)]
    settings: dict[str, Any] = BASE | {"policy": "threshold=0.4", "end_of_text": "committed", **extra}
    found = list(Engine(ending, max_batch=3, max_length=40, cache=cache).generate_many(prompts, **settings))
    assert len(found) == 7
    assert 0 < sum(one.generated_tokens < 24 for one in found) < 7
    for one in found:
        alone = decode(ending, [prompts[one.index]], cache=cache, **settings)
        assert torch.equal(one.sequence, alone.sequences[0])
        assert one.passes == alone.forward_passes


def test_what_its_files_say(model: LLaDA) -> None:
    assert (model.mask_id, model.fill_id, model.end_ids, model.vocab_size) == (260, 256, (256, 258), 261)
    assert model.config.shifted
    assert model.config.include_qkv_bias
    assert model.generation_defaults == {"temperature": GENERATION["temperature"]}
    ids = encode_prompt(model.tokenizer, "It's 12 × 4.\n\n <|mask|>", chat=False)
    assert ids[-1] == 260
    assert model.tokenizer.decode(ids) == "It's 12 × 4.\n\n <|mask|>"
    chat = encode_prompt(model.tokenizer, "Hi", chat=None)
    assert chat[0] == 257
    assert model.tokenizer.decode(chat) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_its_tokenizer_is_loaded_once(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Qwen2TokenizerFast

    calls, load = [], Qwen2TokenizerFast.from_pretrained
    monkeypatch.setattr(Qwen2TokenizerFast, "from_pretrained", lambda *a, **k: calls.append(a) or load(*a, **k))
    model = LLaDA.from_pretrained(checkpoint, device="cpu")
    assert model.tokenizer is model.tokenizer
    assert len(calls) == 1


def test_its_mask_may_be_known_to_the_tokenizer_alone(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    raw = {key: value for key, value in RAW.items() if key != "mask_token_id"}
    (tmp_path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    assert LLaDA.from_pretrained(tmp_path, device="cpu").mask_id == 260


@pytest.mark.parametrize("fast", [False, True])
def test_dreamon_is_refused(checkpoint: Path, tmp_path: Path, fast: bool) -> None:
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings["added_tokens_decoder"]["261"] = settings["added_tokens_decoder"]["260"] | {"content": "<|expand|>"}
    file.write_text(json.dumps(settings), encoding="utf-8")
    if fast:
        load_tokenizer(tmp_path).save_pretrained(tmp_path)
        assert (tmp_path / "tokenizer.json").exists()
    (tmp_path / "model.safetensors").unlink()  # which nobody should have to wait for
    with pytest.raises(ValueError, match=r"a DreamOn, whose <\|expand\|> lengthens the canvas"):
        LLaDA.from_pretrained(tmp_path, device="cpu")


def test_a_loaded_module_is_shared(truth: Any, model: LLaDA) -> None:
    truth.config.to_dict = lambda: RAW  # what DreamModel's config says, whose tensors have these names too
    shared = LLaDA.from_transformers(truth, vocab_size=261)
    assert shared.lm_head.data_ptr() == truth.lm_head.weight.data_ptr()
    assert shared.blocks[1].k_proj.bias.data_ptr() == truth.model.layers[1].self_attn.k_proj.bias.data_ptr()
    expected = decode(model, PROMPTS, policy="threshold=0.5", **BASE).sequences
    assert torch.equal(decode(shared, PROMPTS, policy="threshold=0.5", **BASE).sequences, expected)
    assert Engine.kept(truth) is Engine.kept(truth)


@pytest.mark.parametrize("context", [[], [7, 3, 260, 41]], ids=["alone", "behind a context"])
def test_likelihood_of_one_token(truth: Any, model: LLaDA, context: list[int]) -> None:
    """One mask: exact. Without a context the first column has its own row's logits, as in Dream's evaluation."""
    expected = logits_of(truth, torch.tensor([[*context, 260]]))[0, -1].log_softmax(-1)
    for token in (5, 30, 255):
        (found,) = log_likelihood(model, [context], [[token]])
        assert found.value == pytest.approx(float(expected[token]), abs=1e-4)


def test_likelihood_averages_every_mask(truth: Any, model: LLaDA) -> None:
    context, (one, two) = [7, 3, 41], (5, 30)

    def loss(first: int, second: int, column: int, token: int) -> float:
        logits = logits_of(truth, torch.tensor([[*context, first, second]]))
        return -float(logits[0, 3 + column].log_softmax(-1)[token])

    both = (loss(260, 260, 0, one) + loss(260, 260, 1, two)) / 2
    either = (loss(260, two, 0, one) + loss(one, 260, 1, two)) / 2
    (found,) = log_likelihood(model, [context], [[one, two]])
    assert found.value == pytest.approx(-(both + either), abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["DreamForCausalLM"]},
            r"architectures is \['DreamForCausalLM'\]; supported: \['DreamModel'\]",
        ),
        ({"block_size": 32}, "block_size is 32; supported: None"),
        ({"num_experts": 8}, "num_experts is 8; supported: None or 0"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "rope_scaling is {"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_parameters is {'rope_type': 'yarn'"),
        ({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}, "supported: rope_type 'default', all"),
        ({"use_mrope": True}, "use_mrope is True"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: 'silu'"),
        ({"intermediate_size": None}, "key 'intermediate_size' is missing"),
        ({"hidden_size": None}, "key 'hidden_size' is missing"),
        ({"rope_theta": None}, "key 'rope_theta' is missing"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'; true or false is needed"),
        ({"model_type": "dream"}, "model_type is 'dream'; this engine runs 'llada', 'lladamoe', 'Dream', "),
        ({"model_type": "qwen2"}, "model_type is 'qwen2'"),
    ],
    ids=str,
)
def test_what_is_not_computed_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLaDAConfig.from_dict(RAW | changes)


def test_a_config_as_transformers_5_writes_it() -> None:
    raw = {key: value for key, value in RAW.items() if key not in ("rope_theta", "rope_scaling", "tie_word_embeddings")}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}
    assert LLaDAConfig.from_dict(raw | rope) == LLaDAConfig.from_dict(RAW)


def test_tensors_that_are_missing_or_differ_are_named(checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    bias = "model.layers.1.self_attn.k_proj.bias"
    save_file({name: t for name, t in tensors.items() if name != bias}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"1 tensors missing, the first is {bias}"):
        LLaDA.from_pretrained(tmp_path)
    save_file(tensors | {"model.layers.1.self_attn.o_proj.bias": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"no place for, the first: model.layers.1.self_attn.o_proj.bias"):
        LLaDA.from_pretrained(tmp_path)
    save_file({name: t for name, t in tensors.items() if name != "lm_head.weight"}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"tie_word_embeddings false, but lm_head.weight \(the LM head\) is not"):
        LLaDA.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(RAW | {"tie_word_embeddings": True}), encoding="utf-8")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="tie_word_embeddings true, but the stored LM head differs"):
        LLaDA.from_pretrained(tmp_path)

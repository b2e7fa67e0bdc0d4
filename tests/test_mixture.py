"""LLaDA-MoE: transformers' Qwen3-MoE, seen by no causal mask, computes the same, in code of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import naive
import pytest
import torch
from conftest import tiny_config
from mixtures import MASK, RAW, logits_of, reference, write
from safetensors.torch import load_file, save_file
from torch import Tensor

from dllm_engine import LLaDA, LLaDAConfig, decode
from dllm_engine.layers import Mixture

IDS = torch.tensor([[3, 4, 40, 12, 50, 59, 59, 7], [9, 59, 22, 31, 59, 2, 8, 59]])


@pytest.fixture(scope="module")
def truth() -> Any:
    return reference()


@pytest.fixture(scope="module")
def checkpoint(truth: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(truth, tmp_path_factory.mktemp("mixture") / "model")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> LLaDA:
    return LLaDA.from_pretrained(checkpoint, device="cpu")


@pytest.mark.parametrize(
    "changes", [{}, {"num_key_value_heads": 2}, {"num_experts_per_tok": 1}, {"num_experts_per_tok": 6}], ids=str
)
def test_logits_are_those_of_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    raw = RAW | changes
    other = reference(raw, seed=3)
    expected = logits_of(other, IDS)
    loaded = LLaDA.from_pretrained(write(other, tmp_path / "model", raw), device="cpu")
    assert torch.allclose(loaded(IDS), expected, atol=1e-4)
    assert float(expected.std()) > 1


def test_what_the_tokenizer_alone_knows(model: LLaDA) -> None:
    assert (model.mask_id, model.end_ids, model.vocab_size) == (MASK, (1, 2), 61)


def test_end_ids_come_from_the_tokenizer_if_the_config_has_none(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    raw = {key: value for key, value in RAW.items() if key != "eos_token_id"}
    (tmp_path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    # its tokenizer says of no token that it is eos
    assert LLaDA.from_pretrained(tmp_path, device="cpu").end_ids == (2,)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}', encoding="utf-8")
    assert LLaDA.from_pretrained(tmp_path, device="cpu").end_ids == (1, 2)


def test_a_decode_writes_what_the_naive_loop_does(truth: Any, model: LLaDA) -> None:
    facts = {"mask_id": MASK, "fill_id": 1, "vocab_size": 61}

    class Slow(SimpleNamespace):
        def __call__(self, ids: Tensor) -> Tensor:
            return logits_of(truth, ids)

    prompts = [[3, 4, 40, 12], [9, 22, 31, 2, 8, 50, 17]]
    sizes = {"steps": 16, "gen_length": 16, "block_length": 8}
    expected = [naive.generate(Slow(**facts), prompt, **sizes) for prompt in prompts]
    out = decode(model, prompts, **sizes, policy="topk", cache="none", end_of_text="off")
    for row, whole in zip(out.sequences.tolist(), expected, strict=True):
        assert row[-16:] == whole[-16:]


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_batch_gives_each_what_it_gets_alone(model: LLaDA, cache: str) -> None:
    prompts = [[3, 4, 40, 12], [9, 22, 31, 2, 8, 50, 17], [11]]
    settings: dict[str, Any] = {"gen_length": 32, "block_length": 8, "policy": "threshold=0.5", "cache": cache}
    together = decode(model, prompts, **settings)
    for row, prompt in zip(together.sequences, prompts, strict=True):
        alone = decode(model, [prompt], **settings)
        assert torch.equal(row[-32:], alone.sequences[0, -32:])


def random_mixture(dtype: torch.dtype = torch.float32) -> tuple[Mixture, Tensor]:
    mixture = Mixture(LLaDAConfig.from_dict(RAW | {"mask_token_id": MASK})).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in mixture.parameters():
        parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
    return mixture.to(dtype), torch.randn(40, 32, generator=generator).to(dtype)


WAYS = ["_one_by_one", "_all", *(["_grouped"] if hasattr(torch.nn.functional, "grouped_mm") else [])]


@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_the_formula(way: str) -> None:
    mixture, rows = random_mixture()
    shares, experts = mixture.gate(rows).softmax(-1).topk(2)
    out = getattr(mixture, way)(rows, shares, experts)
    weights = [p.double() for p in (mixture.gate.weight, mixture.gate_up, mixture.down)]
    for row, given in zip(out, rows.double(), strict=True):
        likes = torch.exp(weights[0] @ given)
        expected = torch.zeros(32, dtype=torch.float64)
        for e in likes.argsort(descending=True)[:2]:
            gate, up = (weights[1][e] @ given).split(24)
            expected += likes[e] / likes.sum() * (weights[2][e] @ (gate / (1 + torch.exp(-gate)) * up))
        assert torch.allclose(row.double(), expected, atol=1e-5)


@pytest.mark.parametrize("way", WAYS[:2])
def test_what_overflows_in_an_expert_stays_with_its_rows(way: str) -> None:
    mixture, rows = random_mixture(torch.float16)
    shares, experts = mixture.gate(rows).softmax(-1, dtype=torch.float32).topk(2)
    mixture.down[0] = 6e4
    out = getattr(mixture, way)(rows, shares.half(), experts)
    chose = (experts == 0).any(1)
    assert 0 < int(chose.sum()) < len(rows)
    assert out[~chose].isfinite().all()
    assert not out[chose].isfinite().all()


def test_hooks_in_a_mixture_are_run(checkpoint: Path) -> None:
    loaded, seen = LLaDA.from_pretrained(checkpoint, device="cpu"), []
    assert not loaded.altered()
    assert all(joined is not None and joined.gate_up is None for joined in loaded.joined_weights())
    loaded.blocks[0].experts.register_forward_hook(lambda *_: seen.append(1))
    assert loaded.altered()
    decode(loaded, [[3, 4]], gen_length=8, block_length=8)
    assert seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_follows_the_checkpoint(truth: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    loaded = LLaDA.from_pretrained(write(truth, tmp_path / "model", dtype=dtype), device="cpu")
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    out = decode(loaded, [[3, 4, 40], [9]], gen_length=16, block_length=8, policy="threshold=0.5")
    assert out.generated_tokens.tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe_layer_freq": [0, 1]}, r"moe_layer_freq is \[0, 1\]; supported: 1 for each layer"),
        ({"moe_layer_freq": [1]}, r"moe_layer_freq is \[1\]"),
        ({"moe_layer_freq": None}, "key 'moe_layer_freq' is missing"),
        ({"shared_expert_intermediate_size": 24}, "shared_expert_intermediate_size is 24; supported: None"),
        ({"moe_router_enable_expert_bias": True}, "moe_router_enable_expert_bias is True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling is {"),
        ({"routed_scaling_factor": 2.5}, "routed_scaling_factor is 2.5"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True; supported: False"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok is 7; 1 to num_experts, 6, is needed"),
        ({"num_experts_per_tok": None}, "key 'num_experts_per_tok' is missing"),
        ({"expert_intermediate_size": None}, "key 'expert_intermediate_size' is missing"),
        ({"hidden_size": "big"}, "hidden_size is 'big'; a whole number is needed"),
        ({"qk_layernorm": "yes"}, "qk_layernorm is 'yes'; true or false is needed"),
        ({"model_type": "llada2_moe_veomni"}, "model_type is 'llada2_moe_veomni'"),
        ({"mask_token_id": None}, "key 'mask_token_id' is missing"),
    ],
    ids=str,
)
def test_what_is_not_computed_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLaDAConfig.from_dict(RAW | {"mask_token_id": MASK} | changes)


def test_tensors_that_are_missing_or_unknown_are_named(checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in ("config.json", "tokenizer.json"):
        (broken / file).write_bytes((checkpoint / file).read_bytes())
    up = "model.layers.1.mlp.experts.3.up_proj.weight"
    save_file({name: t for name, t in tensors.items() if name != up}, broken / "model.safetensors")
    with pytest.raises(ValueError, match=rf"1 tensors missing, the first is {up}"):
        LLaDA.from_pretrained(broken)
    save_file(
        tensors | {"model.layers.0.mlp.shared_expert.up_proj.weight": torch.ones(2)}, broken / "model.safetensors"
    )
    with pytest.raises(ValueError, match=r"no place for, the first: model.layers.0.mlp.shared_expert"):
        LLaDA.from_pretrained(broken)
    save_file(tensors | {up: torch.ones(2, 2)}, broken / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{up} has shape \[2, 2\], config.json needs \[24, 32\]"):
        LLaDA.from_pretrained(broken)


def test_without_a_mask_token_anywhere_it_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((checkpoint / file).read_bytes())
    with pytest.raises(ValueError, match="'mask_token_id' is missing"):
        LLaDA.from_pretrained(tmp_path)


def test_another_architecture_is_refused_before_its_tokenizer_is_looked_at(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}', encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text("not one", encoding="utf-8")
    with pytest.raises(ValueError, match="model_type is 'qwen3'"):
        LLaDA.from_pretrained(tmp_path)


def test_a_module_of_transformers_is_refused() -> None:
    class Module(torch.nn.Module):
        config = SimpleNamespace(to_dict=lambda: RAW)

    with pytest.raises(ValueError, match=r"Module is a mixture of experts.*LLaDA\.from_pretrained"):
        LLaDA.from_transformers(Module())


def test_a_dense_config_is_read_as_before() -> None:
    config = LLaDAConfig.from_dict(tiny_config())
    assert (config.num_experts, config.num_experts_per_tok, config.qk_norm) == (0, 0, False)

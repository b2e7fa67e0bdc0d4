"""Configs, tokenizers and weights of LLaDA2 and SDAR: what is read, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from block_causal import IDS, named, published, reference, write
from block_causal import RAW_LLADA2 as LLADA2
from block_causal import RAW_SDAR as SDAR
from block_causal import RAW_SDAR_MOE as SDAR_MOE
from safetensors.torch import load_file, save_file
from torch import Tensor

from dllm_engine import LLaDA, LLaDAConfig
from dllm_engine.config import Routing
from dllm_engine.tokenizer import load_tokenizer, read_facts


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("block-causal")
    raws = (SDAR, SDAR_MOE, LLADA2)
    return {raw["model_type"]: write(published(reference(raw), raw), place / raw["model_type"], raw) for raw in raws}


def changed(checkpoint: Path, place: Path, tensors: dict[str, Tensor | None] | None = None, **raw: Any) -> Path:
    """A copy with other tensors and keys; None: without it."""
    directory = Path(shutil.copytree(checkpoint, place, dirs_exist_ok=True))
    kept = load_file(directory / "model.safetensors") | (tensors or {})
    save_file({name: t for name, t in kept.items() if t is not None}, directory / "model.safetensors")
    settings = json.loads((directory / "config.json").read_text(encoding="utf-8")) | raw
    settings = {key: value for key, value in settings.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    return directory


def test_published_sizes() -> None:
    """inclusionAI/LLaDA2.0-mini and JetLM/SDAR-1.7B-Chat."""
    mini = LLADA2 | {
        "hidden_size": 2048, "num_hidden_layers": 20, "num_attention_heads": 16, "num_key_value_heads": 4,
        "head_dim": 128, "intermediate_size": 5120, "moe_intermediate_size": 512, "num_experts": 256,
        "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "vocab_size": 157184, "rotary_dim": 64,
        "max_position_embeddings": 32768, "mask_token_id": 156895, "eos_token_id": 156892,
    }  # fmt: skip
    config = LLaDAConfig.from_dict(mini)
    assert (config.head_dim, config.rotary_dim, config.block_size) == (128, 64, 32)
    assert (config.mlp_hidden_size, config.shared_hidden_size) == (512, 512)
    assert (config.dense_layers, config.dense_hidden_size) == (1, 5120)
    assert config.routing == Routing(groups=8, kept=4, scale=2.5)
    assert (config.qk_norm, config.norm_topk_prob, config.shifted, config.include_qkv_bias) == (
        True,
        True,
        False,
        False,
    )
    sdar = SDAR | {
        "hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 6144, "vocab_size": 151936, "mask_token_id": 151669,
        "eos_token_id": 151643,
    }  # fmt: skip
    config = LLaDAConfig.from_dict(sdar)
    assert (config.head_dim, config.rotary_dim, config.block_size, config.qk_norm) == (128, 128, 4, True)
    assert (config.num_experts, config.dense_layers, config.routing, config.shifted) == (0, 0, None, False)


def without(raw: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if key not in keys}


def test_keys_that_may_be_missing() -> None:
    flags = [key for key, value in LLADA2.items() if isinstance(value, bool)]
    short = without(LLADA2, *flags, "score_function", "router_dtype", "rope_scaling", "rotary_dim", "pad_token_id")
    full = LLaDAConfig.from_dict(LLADA2 | IDS)
    assert LLaDAConfig.from_dict(short | IDS) == full
    assert LLaDAConfig.from_dict(without(LLADA2, "partial_rotary_factor", "routed_scaling_factor") | IDS) == full
    assert LLaDAConfig.from_dict(without(LLADA2, "num_shared_experts") | IDS).shared_hidden_size == 0
    assert LLaDAConfig.from_dict(without(SDAR, "block_size", "tie_word_embeddings")) == LLaDAConfig.from_dict(SDAR)
    assert LLaDAConfig.from_dict(without(SDAR, "head_dim")).head_dim == 8
    assert not LLaDAConfig.from_dict(without(SDAR_MOE, "norm_topk_prob")).norm_topk_prob
    no_dense = without(LLADA2, "intermediate_size") | IDS | {"first_k_dense_replace": 0}
    assert LLaDAConfig.from_dict(no_dense).dense_hidden_size == 0
    assert LLaDAConfig.from_dict(SDAR | {"block_size": 64}).block_size == 64


@pytest.mark.parametrize("raw", [SDAR, SDAR_MOE, LLADA2 | IDS], ids=lambda raw: raw["model_type"])
def test_a_config_as_transformers_5_writes_it(raw: dict[str, Any]) -> None:
    rope = {"rope_type": "default", "rope_theta": raw["rope_theta"]}
    if "partial_rotary_factor" in raw:
        raw, rope["partial_rotary_factor"] = raw | {"partial_rotary_factor": 0.25}, 0.25
    short = without(raw, "rope_theta", "rope_scaling", "partial_rotary_factor")
    assert LLaDAConfig.from_dict(short | {"rope_parameters": rope}) == LLaDAConfig.from_dict(raw)


@pytest.mark.parametrize(
    ("raw", "changes", "message"),
    [
        (LLADA2, {"norm_head": True}, "norm_head is True; supported: False or None"),
        (LLADA2, {"use_bias": True}, "use_bias is True; supported: False"),
        (LLADA2, {"use_qkv_bias": True}, "use_qkv_bias is True; supported: False"),
        (LLADA2, {"use_qk_norm": False}, "use_qk_norm is False; supported: True"),
        (LLADA2, {"use_rmsnorm": False}, "use_rmsnorm is False; supported: True"),
        (LLADA2, {"rope_scaling": {"type": "yarn", "factor": 4}}, "rope_scaling is {"),
        (LLADA2, {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters is {'rope_type': 'yarn'}; supported"),
        (LLADA2, {"score_function": "softmax"}, "score_function is 'softmax'; supported: 'sigmoid'"),
        (LLADA2, {"norm_topk_prob": False}, "norm_topk_prob is False; supported: True"),
        (LLADA2, {"use_sliding_window": True}, "use_sliding_window is True; supported: False"),
        (LLADA2, {"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: 'silu'"),
        (LLADA2, {"model_type": "llada2_moe_veomni"}, "'llada2_moe_veomni'; this engine runs .*'llada2_moe', 'sdar'"),
        (LLADA2, {"n_group": 3}, "n_group is 3, topk_group 2; equal groups of at least 2 of num_experts, 8, are"),
        (LLADA2, {"n_group": 8, "topk_group": 4}, "n_group is 8, topk_group 4; equal groups of at least 2"),
        (LLADA2, {"n_group": 0}, "n_group is 0, topk_group 2"),
        (LLADA2, {"topk_group": 5}, "n_group is 4, topk_group 5"),
        (LLADA2, {"topk_group": 0}, "n_group is 4, topk_group 0"),
        (LLADA2, {"topk_group": 1}, "topk_group 1; .* and num_experts_per_tok, 3, in those kept"),
        (LLADA2, {"num_experts_per_tok": 9}, "num_experts_per_tok is 9; 1 to num_experts, 8, is needed"),
        (LLADA2, {"num_experts": None}, "key 'num_experts' is missing"),
        (LLADA2, {"moe_intermediate_size": None}, "key 'moe_intermediate_size' is missing"),
        (LLADA2, {"intermediate_size": None}, "key 'intermediate_size' is missing"),
        (LLADA2, {"partial_rotary_factor": 0.2}, "partial_rotary_factor is 0.2; up to 1 and, of head_dim, 16, an even"),
        (LLADA2, {"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5; up to 1"),
        (LLADA2, {"partial_rotary_factor": 0}, "partial_rotary_factor is 0.0; up to 1"),
        (LLADA2, {"partial_rotary_factor": "half"}, "partial_rotary_factor is 'half'; a finite number is needed"),
        (LLADA2, {"mask_token_id": None}, "key 'mask_token_id' is missing"),
        (SDAR, {"attention_bias": True}, "attention_bias is True; supported: False"),
        (SDAR, {"rope_scaling": {"type": "yarn", "factor": 4}}, "rope_scaling is {"),
        (SDAR, {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}, "supported: .* all rotated"),
        (SDAR, {"use_sliding_window": True}, "use_sliding_window is True"),
        (SDAR, {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (SDAR, {"block_size": 0}, "block_size is 0; it must be at least 1"),
        (SDAR, {"block_size": 2.5}, "block_size is 2.5; a whole number is needed"),
        (SDAR, {"head_dim": 15}, "head_dim is 15; it or d_model 32 over n_heads 4 must be a whole, even head size"),
        (SDAR, {"head_dim": None, "num_attention_heads": 6}, "head_dim is None; it or d_model 32 over n_heads 6 must"),
        (SDAR_MOE, {"decoder_sparse_step": 2}, "decoder_sparse_step is 2; supported: 1"),
        (SDAR_MOE, {"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\]; supported: \[\]"),
        (SDAR_MOE, {"num_experts": None}, "key 'num_experts' is missing"),
        (SDAR_MOE, {"norm_topk_prob": "yes"}, "norm_topk_prob is 'yes'; true or false is needed"),
    ],
    ids=lambda value: str(value)[:50] if "architectures" not in value else value["model_type"],
)  # fmt: skip
def test_what_is_not_computed_is_refused(raw: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLaDAConfig.from_dict(IDS | raw | changes)


@pytest.mark.parametrize("family", ["sdar", "sdar_moe", "llada2_moe"])
def test_what_the_tokenizer_alone_knows(checkpoints: dict[str, Path], tmp_path: Path, family: str) -> None:
    directory = changed(checkpoints[family], tmp_path, mask_token_id=None, eos_token_id=None)
    model = LLaDA.from_pretrained(directory, device="cpu")
    end, turn, mask = named({"model_type": family}).values()
    assert (model.mask_id, model.end_ids, model.fill_id, model.vocab_size) == (mask, (end, turn), end, 61)
    assert model.tokenizer("w5")["input_ids"] == [5]


def test_a_mask_that_is_named_beside_the_tokenizer_comes_first(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    directory = changed(checkpoints["sdar"], tmp_path, mask_token_id=None)
    (directory / "special_tokens_map.json").write_text('{"mask_token": {"content": "w40"}}', encoding="utf-8")
    assert read_facts(directory).mask_id == 40
    assert LLaDA.from_pretrained(directory, device="cpu").mask_id == 40


@pytest.mark.parametrize("fast", [False, True])
def test_sdars_own_tokenizer(tmp_path: Path, fast: bool) -> None:
    """Qwen2's class, with one special token more."""
    from tokenizers.pre_tokenizers import ByteLevel

    special = {"<|endoftext|>": 256, "<|im_end|>": 257, "<|MASK|>": 258}
    added = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    files: dict[str, Any] = {
        "vocab.json": {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))},
        "added_tokens.json": special,
        "special_tokens_map.json": {"eos_token": "<|im_end|>", "mask_token": {**added, "content": "<|MASK|>"}},
        "tokenizer_config.json": {
            "added_tokens_decoder": {str(i): {**added, "content": name} for name, i in special.items()},
            "eos_token": "<|im_end|>", "mask_token": "<|MASK|>", "pad_token": "<|endoftext|>",
            "tokenizer_class": "Qwen2Tokenizer", "unk_token": None,
        },
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    if fast:
        load_tokenizer(tmp_path).save_pretrained(tmp_path)
        assert (tmp_path / "tokenizer.json").exists()
    facts = read_facts(tmp_path)
    assert (facts.mask_id, facts.size, set(facts.end_ids)) == (258, 259, {257})
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer("It's 12 × 4.<|MASK|>")["input_ids"]
    assert ids[-1] == 258
    assert tokenizer.decode(ids) == "It's 12 × 4.<|MASK|>"


@pytest.mark.parametrize(
    ("family", "tensors", "message"),
    [
        ("sdar", {"model.layers.1.self_attn.k_norm.weight": None}, "1 tensors missing, the first is .*1.self_attn.k_n"),
        ("sdar", {"model.layers.1.self_attn.k_proj.bias": torch.ones(2)}, "no place for, the first: .*k_proj.bias"),
        ("sdar", {"model.layers.0.self_attn.q_proj.weight": torch.ones(32, 32)},
         r"q_proj.weight has shape \[32, 32\], config.json needs \[64, 32\]"),
        ("sdar", {"lm_head.weight": None}, r"tie_word_embeddings false, but lm_head.weight \(the LM head\) is not"),
        ("sdar_moe", {"model.layers.0.mlp.experts.5.up_proj.weight": None}, "the first is .*experts.5.up_proj.weight"),
        ("llada2_moe", {"model.layers.1.attention.query_key_value.weight": None},
         "1 tensors missing, the first is model.layers.1.attention.query_key_value.weight"),
        ("llada2_moe", {"model.layers.1.attention.query_key_value.weight": torch.ones(64, 32)},
         r"query_key_value.weight has shape \[64, 32\], config.json needs \[128, 32\]"),
        ("llada2_moe", {"model.layers.1.mlp.gate.expert_bias": None}, "the first is model.layers.1.mlp.gate.expert"),
        ("llada2_moe", {"model.layers.1.mlp.shared_experts.up_proj.weight": torch.ones(2, 2)},
         r"shared_experts.up_proj.weight has shape \[2, 2\], config.json needs \[24, 32\]"),
        ("llada2_moe", {"model.layers.0.mlp.up_proj.weight": torch.ones(2, 2)}, r"config.json needs \[48, 32\]"),
        ("llada2_moe", {"model.layers.0.attention.dense.bias": torch.ones(2)}, "no place for, .*attention.dense.bias"),
        ("llada2_moe", {"model.word_embeddings.weight": None}, "the first is model.word_embeddings.weight"),
    ],
)  # fmt: skip
def test_tensors_that_are_missing_or_differ_are_named(
    checkpoints: dict[str, Path], tmp_path: Path, family: str, tensors: dict[str, Tensor | None], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        LLaDA.from_pretrained(changed(checkpoints[family], tmp_path, tensors), device="cpu")


def test_tensors_beside_no_shared_experts_are_unknown(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no place for, the first: model.layers.1.mlp.shared_experts.down_proj"):
        LLaDA.from_pretrained(changed(checkpoints["llada2_moe"], tmp_path, num_shared_experts=0), device="cpu")

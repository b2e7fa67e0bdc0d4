"""Small LLaDA-MoE checkpoints, and a model of transformers that computes the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dllm_engine import LLaDA, LLaDAConfig

RAW: dict[str, Any] = {
    "architectures": ["LLaDAMoEModelLM"], "model_type": "llada", "vocab_size": 64, "hidden_size": 32,
    "dense_intermediate_size": 96, "expert_intermediate_size": 24, "shared_expert_intermediate_size": None,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "hidden_act": "silu",
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 50000, "partial_rotary_factor": 1,
    "rope_scaling": None, "attention_bias": False, "clip_qkv": None, "tie_word_embeddings": False,
    "num_experts": 6, "num_experts_per_tok": 2, "norm_topk_prob": None, "qk_layernorm": True, "moe_layer_freq": [1, 1],
    "moe_router_enable_expert_bias": False, "moe_router_score_function": "softmax", "routed_scaling_factor": 1,
    "router_num_group": None, "router_topk_group": None, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
MASK = 59
NAMED = {"<|endoftext|>": 1, "<|role_end|>": 2, "<|mask|>": MASK}


def reference(raw: dict[str, Any] = RAW, seed: int = 0) -> Any:
    """Random, and peaked enough that rounding decides nothing."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    config = transformers.Qwen3MoeConfig(
        vocab_size=raw["vocab_size"], hidden_size=raw["hidden_size"], num_hidden_layers=raw["num_hidden_layers"],
        num_attention_heads=raw["num_attention_heads"], num_key_value_heads=raw["num_key_value_heads"],
        head_dim=raw["hidden_size"] // raw["num_attention_heads"], rms_norm_eps=raw["rms_norm_eps"],
        max_position_embeddings=raw["max_position_embeddings"], moe_intermediate_size=raw["expert_intermediate_size"],
        num_experts=raw["num_experts"], num_experts_per_tok=raw["num_experts_per_tok"], norm_topk_prob=False,
        decoder_sparse_step=1, mlp_only_layers=[], tie_word_embeddings=False, attention_bias=False,
        rope_parameters={"rope_type": "default", "rope_theta": float(raw["rope_theta"])}, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.Qwen3MoeForCausalLM(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        scale, offset = (1.6 * parameter.shape[-1] ** -0.5, 0.0) if parameter.ndim > 1 else (0.2, 1.0)
        parameter.normal_(offset, scale, generator=generator)
    return model


def logits_of(model: Any, ids: Tensor) -> Tensor:
    everything = torch.zeros(len(ids), 1, ids.shape[1], ids.shape[1])
    return model(ids, attention_mask=everything, use_cache=False).logits


def write(model: Any, directory: Path, raw: dict[str, Any] = RAW, dtype: torch.dtype = torch.float32) -> Path:
    """The checkpoint under LLaDA-MoE's names, expert by expert, with a tokenizer that names the mask token."""
    return save({name: t.to(dtype).clone() for name, t in expert_by_expert(model).items()}, directory, raw)


def expert_by_expert(model: Any) -> dict[str, Tensor]:
    """The tensors of a model of transformers, which stacks those of its experts, as checkpoints have them."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for e, both in enumerate(tensor):
                for part, half in zip(("gate_proj", "up_proj"), both.chunk(2), strict=True):
                    tensors[name.replace("gate_up_proj", f"{e}.{part}.weight")] = half
        elif name.endswith("experts.down_proj"):
            tensors |= {name.replace("down_proj", f"{e}.down_proj.weight"): one for e, one in enumerate(tensor)}
        else:
            tensors[name] = tensor
    return tensors


def save_tokenizer(directory: Path, special: Mapping[str, int]) -> None:
    """61 tokens, words but for the special ones."""
    from tokenizers import AddedToken, Tokenizer  # which `make gpu` does without
    from tokenizers.models import WordLevel

    words = {f"w{i}": i for i in range(61) if i not in special.values()}
    made = Tokenizer(WordLevel({**words, **special}, unk_token="w0"))
    made.add_special_tokens([AddedToken(name, special=True) for name in special])
    made.save(str(directory / "tokenizer.json"))


def save(tensors: dict[str, Tensor], directory: Path, raw: dict[str, Any] = RAW) -> Path:
    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    save_tokenizer(directory, NAMED)
    return directory


def random_model(seed: int = 0, **changes: Any) -> LLaDA:
    """Without transformers."""
    model = LLaDA(LLaDAConfig.from_dict(RAW | {"mask_token_id": MASK} | changes)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 1.6 * parameter.shape[-1] ** -0.5, generator=generator)
    return model

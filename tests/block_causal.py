"""Small LLaDA2 and SDAR checkpoints, transformers' models of the same, and decoding spelled out in float64."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mixtures
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

# as LLaDA2's config.json, which names neither the mask token nor the end of text: its tokenizer does
RAW_LLADA2: dict[str, Any] = {
    "architectures": ["LLaDA2MoeModelLM"], "model_type": "llada2_moe", "vocab_size": 64, "hidden_size": 32,
    "intermediate_size": 48, "moe_intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "hidden_act": "silu", "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6, "rope_theta": 600000, "rope_scaling": None, "partial_rotary_factor": 0.5, "rotary_dim": 8,
    "use_qk_norm": True, "use_qkv_bias": False, "use_bias": False, "norm_head": False, "tie_word_embeddings": False,
    "use_sliding_window": False, "sliding_window": 4096, "num_experts": 8, "num_experts_per_tok": 3,
    "num_shared_experts": 1, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5,
    "score_function": "sigmoid", "norm_topk_prob": True, "moe_router_enable_expert_bias": True, "router_dtype": "fp32",
    "pad_token_id": 1,
}  # fmt: skip
IDS = {"mask_token_id": 59, "eos_token_id": 1}  # which it would have
NAMED_LLADA2 = {"<|endoftext|>": 1, "<|role_end|>": 2, "<|mask|>": 59}
RAW_SDAR: dict[str, Any] = {
    "architectures": ["SDARForCausalLM"], "model_type": "sdar", "vocab_size": 64, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "hidden_act": "silu", "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 1000000,
    "rope_scaling": None, "attention_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": False,
    "use_sliding_window": False, "sliding_window": None, "block_size": 4, "fuse_cross_entropy": True, "debug": False,
    "ep_size": 1, "bos_token_id": 3, "eos_token_id": 3, "pad_token_id": 3, "mask_token_id": 60,
}  # fmt: skip
NAMED_SDAR = {"<|endoftext|>": 3, "<|im_end|>": 4, "<|MASK|>": 60}
RAW_SDAR_MOE = RAW_SDAR | {
    "architectures": ["SDARMoeForCausalLM"], "model_type": "sdar_moe", "decoder_sparse_step": 1, "mlp_only_layers": [],
    "moe_intermediate_size": 24, "norm_topk_prob": True, "num_experts": 6, "num_experts_per_tok": 2,
}  # fmt: skip
SIZE = 61  # of all tokenizers


def named(raw: dict[str, Any]) -> dict[str, int]:
    """The tokenizer's special tokens: the end of text, the end of a turn, the mask."""
    return NAMED_LLADA2 if raw["model_type"] == "llada2_moe" else NAMED_SDAR


def reference(raw: dict[str, Any], seed: int = 0) -> Any:
    """Random, and peaked enough that rounding decides nothing."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    kind = {"sdar": "Qwen3", "sdar_moe": "Qwen3Moe", "llada2_moe": "Glm4Moe"}[raw["model_type"]]
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
        "rms_norm_eps max_position_embeddings tie_word_embeddings moe_intermediate_size num_experts "
        "num_experts_per_tok norm_topk_prob decoder_sparse_step mlp_only_layers n_group topk_group use_qk_norm "
        "routed_scaling_factor first_k_dense_replace"
    )
    settings = {name: raw[name] for name in names.split() if name in raw}
    rope = {"rope_type": "default", "rope_theta": float(raw["rope_theta"])}
    if kind == "Glm4Moe":
        settings |= {"n_routed_experts": settings.pop("num_experts"), "n_shared_experts": raw["num_shared_experts"]}
        settings |= {"num_mtp_layers": 0, "norm_topk_prob": raw["num_experts_per_tok"] > 1}
        rope["partial_rotary_factor"] = raw["partial_rotary_factor"]
    config = getattr(transformers, f"{kind}Config")(
        **settings, rope_parameters=rope, attention_bias=False, attn_implementation="eager"
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        scale, offset = (1.6 * max(tensor.shape[-1], 1) ** -0.5, 0.0) if tensor.ndim > 1 else (0.2, 1.0)
        tensor.normal_(0.0 if name.endswith("bias") else offset, scale, generator=generator)
    return model


def logits_of(model: Any, ids: Tensor, block_size: int) -> Tensor:
    block = torch.arange(ids.shape[1]) // block_size
    hidden = (block[None, :] > block[:, None])[None, None].expand(len(ids), 1, -1, -1)
    return model(ids, attention_mask=torch.zeros(hidden.shape).masked_fill(hidden, -1e30), use_cache=False).logits


def published(model: Any, raw: dict[str, Any]) -> dict[str, Tensor]:
    """A model's tensors under the names of checkpoints."""
    tensors = mixtures.expert_by_expert(model)
    if raw["tie_word_embeddings"]:
        del tensors["lm_head.weight"]
    if raw["model_type"] == "llada2_moe":
        tensors = {name: t for name, t in tensors.items() if t.numel()}  # no shared experts are some of size 0
        for i in range(raw["num_hidden_layers"]):
            attention = f"model.layers.{i}.self_attn"
            rows = [tensors.pop(f"{attention}.{part}_proj.weight") for part in "qkv"]
            tensors[f"{attention}.query_key_value.weight"] = torch.cat(rows)
        for old, new in {
            "embed_tokens": "word_embeddings", "self_attn.o_proj": "attention.dense", "self_attn": "attention",
            "q_norm": "query_layernorm", "k_norm": "key_layernorm", "e_score_correction_bias": "expert_bias",
        }.items():  # fmt: skip
            tensors = {name.replace(old, new): t for name, t in tensors.items()}
    return {name: t.clone() for name, t in tensors.items()}


def write(tensors: Mapping[str, Tensor], directory: Path, raw: dict[str, Any]) -> Path:
    directory.mkdir(parents=True)
    save_file(dict(tensors), directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    mixtures.save_tokenizer(directory, named(raw))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return directory


class Written:
    """Both families' layers and decoding of one sequence, in numpy and float64, without a cache."""

    def __init__(self, tensors: Mapping[str, Tensor], raw: dict[str, Any]) -> None:
        self.tensors = {name: t.double().numpy() for name, t in tensors.items()}
        self.raw, self.moe, self.mask = raw, raw["model_type"] == "llada2_moe", list(named(raw).values())[-1]

    def times(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.tensors[f"{name}.weight"].T

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        mean = (x * x).mean(-1, keepdims=True)
        return x / np.sqrt(mean + self.raw["rms_norm_eps"]) * self.tensors[f"{name}.weight"]

    def turn(self, x: np.ndarray) -> np.ndarray:
        """Of each head [H, L, Dh] the first elements, in halves."""
        size = self.raw["rotary_dim"] if self.moe else self.raw["head_dim"]
        angle = np.arange(x.shape[1])[:, None] / self.raw["rope_theta"] ** (np.arange(0, size, 2) / size)
        turned = (x[..., : size // 2] + 1j * x[..., size // 2 : size]) * np.exp(1j * angle)
        return np.concatenate((turned.real, turned.imag, x[..., size:]), -1)

    def attention(self, x: np.ndarray, layer: str, block_length: int) -> np.ndarray:
        heads, kv_heads, dim = (self.raw[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
        if self.moe:
            name, norms, out = f"{layer}.attention", ("query_layernorm", "key_layernorm"), "dense"
            rows = self.times(x, f"{name}.query_key_value")
        else:
            name, norms, out = f"{layer}.self_attn", ("q_norm", "k_norm"), "o_proj"
            rows = np.concatenate([self.times(x, f"{name}.{part}_proj") for part in "qkv"], -1)
        q, k, v = np.split(rows.reshape(len(x), -1, dim).transpose(1, 0, 2), (heads, heads + kv_heads))
        q, k = (self.turn(self.norm(part, f"{name}.{norm}")) for part, norm in zip((q, k), norms, strict=True))
        k, v = (part.repeat(heads // kv_heads, axis=0) for part in (k, v))
        block = np.arange(len(x)) // block_length
        scores = np.exp(q @ k.transpose(0, 2, 1) / np.sqrt(dim)) * (block <= block[:, None])
        seen = scores / scores.sum(-1, keepdims=True) @ v
        return self.times(seen.transpose(1, 0, 2).reshape(len(x), -1), f"{name}.{out}")

    def mlp(self, x: np.ndarray, name: str) -> np.ndarray:
        gate, up = (self.times(x, f"{name}.{part}_proj") for part in ("gate", "up"))
        return self.times(gate / (1 + np.exp(-gate)) * up, f"{name}.down_proj")

    def shares(self, token: np.ndarray, name: str) -> dict[int, float]:
        """What each chosen expert's output counts, best first."""
        scores = 1 / (1 + np.exp(-self.times(token, f"{name}.gate")))
        biased = scores + self.tensors[f"{name}.gate.expert_bias"]
        groups = np.split(np.arange(len(scores)), self.raw["n_group"])
        groups.sort(key=lambda group: -np.sort(biased[group])[-2:].sum())
        kept = np.concatenate(groups[: self.raw["topk_group"]])
        chosen = sorted(kept.tolist(), key=lambda e: -biased[e])[: self.raw["num_experts_per_tok"]]
        return {e: float(scores[e] / scores[chosen].sum() * self.raw["routed_scaling_factor"]) for e in chosen}

    def mixture(self, x: np.ndarray, name: str) -> np.ndarray:
        out = self.mlp(x, f"{name}.shared_experts")
        for row, token in enumerate(x):
            for e, share in self.shares(token, name).items():
                out[row] += share * self.mlp(token, f"{name}.experts.{e}")
        return out

    def logits(self, ids: Sequence[int], block_length: int) -> np.ndarray:
        """[L, V]: a column sees its own block and those before it."""
        embeddings = "model.word_embeddings" if self.moe else "model.embed_tokens"
        x = self.tensors[f"{embeddings}.weight"][list(ids)]
        for i in range(self.raw["num_hidden_layers"]):
            layer = f"model.layers.{i}"
            x = x + self.attention(self.norm(x, f"{layer}.input_layernorm"), layer, block_length)
            mlp = self.mixture if self.moe and i >= self.raw["first_k_dense_replace"] else self.mlp
            x = x + mlp(self.norm(x, f"{layer}.post_attention_layernorm"), f"{layer}.mlp")
        return self.times(self.norm(x, "model.norm"), embeddings if self.raw["tie_word_embeddings"] else "lm_head")

    def decode(
        self, prompt: Sequence[int], gen_length: int, block_length: int, threshold: float,
        quota: int = 1, end_ids: Sequence[int] = (),
    ) -> list[int]:  # fmt: skip
        """The answer: a step commits a block's ``quota`` best columns, and all that reach the threshold. What is behind
        an end of the text is seen by nobody.
        """
        total = -(-(len(prompt) + gen_length) // block_length) * block_length
        ids = [*prompt, *[self.mask] * (total - len(prompt))]
        open_, text = set(range(len(prompt), total)), total
        for end in range(len(prompt) // block_length * block_length + block_length, total + 1, block_length):
            while open_ & set(range(end)):
                logits = self.logits(ids[: min(end, text)], block_length)
                found = []
                for column in open_ & set(range(end)):
                    row = logits[column]
                    allowed = row[:SIZE].copy()
                    allowed[self.mask] = -np.inf
                    token = int(allowed.argmax())
                    confidence = float(np.exp(row[token] - row.max()) / np.exp(row - row.max()).sum())
                    found.append((-confidence, column, token))
                for place, (negative, column, token) in enumerate(sorted(found)):
                    if place < quota or -negative >= threshold:
                        ids[column] = token
                        open_.discard(column)
                ends = [c for c in range(len(prompt), end) if c not in open_ and ids[c] in end_ids]
                if ends:
                    text = ends[0] + 1
                    ids[text:] = [end_ids[0]] * (total - text)
                    open_ -= set(range(text, total))
        return ids[len(prompt) : len(prompt) + gen_length]

"""Small LLaDA2 and SDAR checkpoints, and block-causal decoding of one sequence spelled out in float64."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
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
SIZE = 61  # of both tokenizers


def named(raw: dict[str, Any]) -> dict[str, int]:
    """The tokenizer's special tokens: the end of text, the end of a turn, the mask."""
    return NAMED_LLADA2 if raw["model_type"] == "llada2_moe" else NAMED_SDAR


def shapes_of(raw: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    moe, width, dim = raw["model_type"] == "llada2_moe", raw["hidden_size"], raw["head_dim"]
    heads, kv_heads = raw["num_attention_heads"] * dim, raw["num_key_value_heads"] * dim
    embeddings = "model.word_embeddings" if moe else "model.embed_tokens"
    shapes: dict[str, tuple[int, ...]] = {embeddings: (raw["vocab_size"], width), "model.norm": (width,)}
    if not raw["tie_word_embeddings"]:
        shapes["lm_head"] = (raw["vocab_size"], width)
    for i in range(raw["num_hidden_layers"]):
        layer, mlps = f"model.layers.{i}", {"mlp": raw["intermediate_size"]}
        shapes |= {f"{layer}.{name}_layernorm": (width,) for name in ("input", "post_attention")}
        if moe:
            shapes[f"{layer}.attention.query_key_value"] = (heads + 2 * kv_heads, width)
            shapes[f"{layer}.attention.dense"] = (width, heads)
            shapes |= {f"{layer}.attention.{name}_layernorm": (dim,) for name in ("query", "key")}
        else:
            rows = {"q": (heads, width), "k": (kv_heads, width), "v": (kv_heads, width), "o": (width, heads)}
            shapes |= {f"{layer}.self_attn.{name}_proj": shape for name, shape in rows.items()}
            shapes |= {f"{layer}.self_attn.{name}_norm": (dim,) for name in "qk"}
        if moe and i >= raw["first_k_dense_replace"]:
            shapes[f"{layer}.mlp.gate"] = (raw["num_experts"], width)
            mlps = {f"mlp.experts.{e}": raw["moe_intermediate_size"] for e in range(raw["num_experts"])}
            mlps["mlp.shared_experts"] = raw["moe_intermediate_size"] * raw["num_shared_experts"]
        for name, size in mlps.items():
            shapes |= {f"{layer}.{name}.{part}_proj": (size, width) for part in ("gate", "up")}
            shapes[f"{layer}.{name}.down_proj"] = (width, size)
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def tensors_of(raw: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random, and peaked enough that rounding decides nothing."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes_of(raw).items():
        drawn = torch.randn(shape, generator=generator)
        tensors[name] = 1.6 * shape[-1] ** -0.5 * drawn if len(shape) > 1 else 1 + 0.2 * drawn
        if name.endswith("mlp.gate.weight"):
            tensors[name.replace("weight", "expert_bias")] = 0.3 * torch.randn(shape[0], generator=generator)
    return tensors


def write(tensors: Mapping[str, Tensor], directory: Path, raw: dict[str, Any]) -> Path:
    from tokenizers import AddedToken, Tokenizer  # which `make gpu` does without
    from tokenizers.models import WordLevel

    directory.mkdir(parents=True)
    save_file(dict(tensors), directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    special = named(raw)
    words = {f"w{i}": i for i in range(SIZE) if i not in special.values()}
    made = Tokenizer(WordLevel(words | special, unk_token="w0"))
    made.add_special_tokens([AddedToken(name, special=True) for name in special])
    made.save(str(directory / "tokenizer.json"))
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

"""Small Dream checkpoints, a model of transformers that computes the same, and decoding spelled out in float64."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mixtures
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

RAW: dict[str, Any] = {
    "architectures": ["DreamModel"], "auto_map": {"AutoModel": "modeling_dream.DreamModel"}, "model_type": "Dream",
    "attention_dropout": 0.0, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256, "mask_token_id": 260,
    "hidden_act": "silu", "hidden_size": 32, "intermediate_size": 48, "initializer_range": 0.02,
    "max_position_embeddings": 512, "max_window_layers": 2, "num_attention_heads": 4, "num_hidden_layers": 2,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 1000000.0,
    "sliding_window": None, "tie_word_embeddings": False, "use_cache": True, "use_mrope": False,
    "use_sliding_window": False, "vocab_size": 272,
}  # fmt: skip
SPECIAL = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258, "<|beginoftext|>": 259, "<|mask|>": 260}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# as Dream's generation_config.json: arguments of its own diffusion_generate
GENERATION = {
    "_from_model_config": True, "alg": "origin", "alg_temp": None, "bos_token_id": 256, "eos_token_id": 256,
    "eps": 0.001, "mask_token_id": None, "output_history": False, "pad_token_id": 256, "steps": 512,
    "temperature": 0.0, "top_k": None, "top_p": None, "transformers_version": "4.46.2",
}  # fmt: skip


def reference(raw: dict[str, Any] = RAW, seed: int = 0) -> Any:
    """Random, and peaked enough that rounding decides nothing."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    config = transformers.Qwen2Config(
        vocab_size=raw["vocab_size"], hidden_size=raw["hidden_size"], intermediate_size=raw["intermediate_size"],
        num_hidden_layers=raw["num_hidden_layers"], num_attention_heads=raw["num_attention_heads"],
        num_key_value_heads=raw["num_key_value_heads"], rms_norm_eps=raw["rms_norm_eps"],
        max_position_embeddings=raw["max_position_embeddings"], tie_word_embeddings=raw["tie_word_embeddings"],
        rope_parameters={"rope_type": "default", "rope_theta": raw["rope_theta"]}, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config).eval().requires_grad_(False)
    randomise(model, seed)
    return model


def randomise(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        scale, offset = (1.6 * parameter.shape[-1] ** -0.5, 0.0) if parameter.ndim > 1 else (0.3, 1.0)
        parameter.data.normal_(0.0 if name.endswith("bias") else offset, scale, generator=generator)


def logits_of(model: Any, ids: Tensor) -> Tensor:
    """Every column sees every other; each row's logits are those of the column behind it."""
    logits = mixtures.logits_of(model, ids)
    return torch.cat((logits[:, :1], logits[:, :-1]), dim=1)


def write(tensors: Mapping[str, Tensor], directory: Path, raw: dict[str, Any] = RAW) -> Path:
    """The checkpoint as Dream's are published: no ``tokenizer.json``, and a tokenizer class of its own code."""
    from tokenizers.pre_tokenizers import ByteLevel  # which `make gpu` does without

    directory.mkdir(parents=True)
    tied = {"lm_head.weight"} if raw["tie_word_embeddings"] else set()
    kept = {name: tensor.clone() for name, tensor in tensors.items() if name not in tied}
    save_file(kept, directory / "model.safetensors")
    added = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    files: dict[str, Any] = {
        "config.json": raw,
        "generation_config.json": GENERATION,
        "vocab.json": {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))},
        "added_tokens.json": SPECIAL,
        "special_tokens_map.json": {"eos_token": "<|endoftext|>", "mask_token": "<|mask|>"},
        "tokenizer_config.json": {
            "added_tokens_decoder": {str(i): added | {"content": name} for name, i in SPECIAL.items()},
            "additional_special_tokens": ["<|beginoftext|>", "<|mask|>"],
            "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
            "bos_token": "<|beginoftext|>", "chat_template": TEMPLATE, "eos_token": "<|endoftext|>",
            "mask_token": "<|mask|>", "pad_token": "<|endoftext|>", "tokenizer_class": "DreamTokenizer",
            "unk_token": None,
        },
    }  # fmt: skip
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content), encoding="utf-8")
    (directory / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    return directory


class Written:
    """Dream's layers and block-wise decoding of one sequence, in numpy and float64, with a cache that is two arrays."""

    def __init__(self, tensors: dict[str, Tensor], raw: dict[str, Any] = RAW) -> None:
        self.tensors = {name: t.double().numpy() for name, t in tensors.items()}
        self.raw, self.dim = raw, raw["hidden_size"] // raw["num_attention_heads"]

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        mean = (x * x).mean(-1, keepdims=True)
        return x / np.sqrt(mean + self.raw["rms_norm_eps"]) * self.tensors[f"{name}.weight"]

    def heads(self, x: np.ndarray, name: str, at: np.ndarray | None = None) -> np.ndarray:
        """[H, S, Dh], turned by the columns ``at``."""
        x = x @ self.tensors[f"{name}.weight"].T + self.tensors[f"{name}.bias"]
        x = x.reshape(len(x), -1, self.dim).transpose(1, 0, 2)
        if at is None:
            return x
        angle = at[:, None] / self.raw["rope_theta"] ** (np.arange(0, self.dim, 2) / self.dim)
        turned = (x[..., : self.dim // 2] + 1j * x[..., self.dim // 2 :]) * np.exp(1j * angle)
        return np.concatenate((turned.real, turned.imag), -1)

    def logits(self, ids: list[int], at: np.ndarray, cache: np.ndarray) -> np.ndarray:
        """Of the columns ``at``, whose keys and values in ``cache`` [layers, 2, H_kv, L, Dh] are made new."""
        group = self.raw["num_attention_heads"] // self.raw["num_key_value_heads"]
        x = self.tensors["model.embed_tokens.weight"][np.array(ids)[at]]
        for i in range(self.raw["num_hidden_layers"]):
            layer = f"model.layers.{i}"
            h = self.norm(x, f"{layer}.input_layernorm")
            q, k, v = (
                self.heads(h, f"{layer}.self_attn.{name}_proj", at if name in "qk" else None)
                for name in ("q", "k", "v")
            )
            cache[i, 0][:, at], cache[i, 1][:, at] = k, v
            keys, values = cache[i].repeat(group, axis=1)
            scores = np.exp(q @ keys.transpose(0, 2, 1) / np.sqrt(self.dim))
            seen = scores / scores.sum(-1, keepdims=True) @ values
            x = x + seen.transpose(1, 0, 2).reshape(len(at), -1) @ self.tensors[f"{layer}.self_attn.o_proj.weight"].T
            h = self.norm(x, f"{layer}.post_attention_layernorm")
            gate, up = (h @ self.tensors[f"{layer}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
            x = x + (gate / (1 + np.exp(-gate)) * up) @ self.tensors[f"{layer}.mlp.down_proj.weight"].T
        return self.norm(x, "model.norm") @ self.tensors["lm_head.weight"].T

    def decode(self, prompt: list[int], gen_length: int, block_length: int, cache: str, threshold: float) -> list[int]:
        """The answer, and a look at every surprise: the best position of a step, and all above the threshold."""
        mask, size = self.raw["mask_token_id"], 261
        ids = prompt + [mask] * gen_length
        open_ = set(range(len(prompt), len(ids)))
        kept = np.zeros((self.raw["num_hidden_layers"], 2, self.raw["num_key_value_heads"], len(ids), self.dim))
        for start in range(len(prompt), len(ids), block_length):
            end, fresh = start + block_length, True
            while open_ & set(range(start, end)):
                # the row before a block predicts its first column, so it is always among those computed
                first = 0 if fresh or cache == "none" else start - 1
                last = end if cache == "dual" and not fresh else len(ids)
                logits, fresh = self.logits(ids, np.arange(first, last), kept), False
                found = []
                for column in sorted(open_ & set(range(start, end))):
                    row = logits[column - 1 - first]
                    allowed = row[:size].copy()
                    allowed[mask] = -np.inf
                    token = int(allowed.argmax())
                    found.append((float(np.exp(row[token] - row.max()) / np.exp(row - row.max()).sum()), column, token))
                best = max(found)[1]
                for confidence, column, token in found:
                    if column == best or confidence >= threshold:
                        ids[column] = token
                        open_.discard(column)
        return ids[len(prompt) :]

"""A small Fast-dLLM v2 checkpoint and its decoding spelled out in float64, block after block as its code has it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import block_causal
import dreams
import mixtures
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

# as Fast-dLLM v2's config.json, which names no mask token: its tokenizer has one
RAW: dict[str, Any] = {
    "architectures": ["Fast_dLLM_QwenForCausalLM"], "model_type": "Fast_dLLM_Qwen", "attention_dropout": 0.0,
    "auto_map": {"AutoModelForCausalLM": "modeling.Fast_dLLM_QwenForCausalLM"}, "bd_size": 16, "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 48,
    "layer_types": ["full_attention", "full_attention"], "max_position_embeddings": 512, "max_window_layers": 2,
    "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
    "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": True,
    "torch_dtype": "float32", "use_cache": True, "use_sliding_window": False, "vocab_size": 64,
}  # fmt: skip
SPECIAL = {"<|endoftext|>": 1, "<|im_end|>": 2, "|<MASK>|": 59}
SIZE = 61  # of the tokenizer


def reference(raw: dict[str, Any] = RAW, seed: int = 0) -> Any:
    return dreams.reference(raw, seed)


def logits_of(model: Any, ids: Tensor, block_size: int) -> Tensor:
    """Each row's logits are those of the column behind it."""
    logits = block_causal.logits_of(model, ids, block_size)
    return torch.cat((logits[:, :1], logits[:, :-1]), dim=1)


def write(tensors: Mapping[str, Tensor], directory: Path, raw: dict[str, Any] = RAW) -> Path:
    directory.mkdir(parents=True)
    tied = {"lm_head.weight"} if raw["tie_word_embeddings"] else set()
    save_file({name: t.clone() for name, t in tensors.items() if name not in tied}, directory / "model.safetensors")
    mixtures.save_tokenizer(directory, SPECIAL)
    for name, content in {
        "config.json": raw,
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": [2, 1], "pad_token_id": 1},
        "tokenizer_config.json": {
            "chat_template": dreams.TEMPLATE, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    }.items():  # fmt: skip
        (directory / name).write_text(json.dumps(content), encoding="utf-8")
    return directory


class Written(dreams.Written):
    """Its layers are Dream's. Keys are cached where its code does, when a block is decided: no mask is needed."""

    def __init__(self, tensors: dict[str, Tensor], raw: dict[str, Any] = RAW) -> None:
        super().__init__(tensors, raw)
        self.size = raw["bd_size"]

    def block(self, ids: Sequence[int], first: int, cache: np.ndarray, end: int | None = None) -> np.ndarray:
        """The logits of the rows of the block of columns from ``first`` on."""
        end = min(first + self.size, end or len(ids))
        return self.logits([*ids], np.arange(first, end), cache[:, :, :, :end])

    def surest(self, row: np.ndarray) -> tuple[float, int]:
        allowed = row[:SIZE].copy()
        allowed[SPECIAL["|<MASK>|"]] = -np.inf
        token = int(allowed.argmax())
        return float(np.exp(row[token] - row.max()) / np.exp(row - row.max()).sum()), token

    def decode(  # type: ignore[override]
        self, prompt: Sequence[int], gen_length: int, block_length: int, threshold: float, end_ids: Sequence[int] = ()
    ) -> list[int]:
        """The first column of a block that the prompt does not reach into is decided by the row before it; every other
        step decides, of the first part of ``block_length`` that is not decided, the surest column and all above the
        threshold. What is behind an end of the text is seen by nobody.
        """
        total, size = len(prompt) + gen_length, self.size
        ids = [*prompt, *[SPECIAL["|<MASK>|"]] * (-(-total // size) * size - len(prompt))]
        open_ = set(range(len(prompt), -(-total // block_length) * block_length))
        heads = self.raw["num_key_value_heads"]
        cache = np.zeros((self.raw["num_hidden_layers"], 2, heads, len(ids), self.dim))
        text, row = len(ids), np.empty(0)
        self.passes = 0

        def put(column: int, token: int) -> None:
            ids[column] = token
            open_.discard(column)

        def end_text() -> int:
            ends = [c for c in range(len(prompt), text) if c not in open_ and ids[c] in end_ids]
            if not ends:
                return text
            open_.difference_update(range(ends[0] + 1, len(ids)))
            return ends[0] + 1

        for first in range(0, len(ids), size):
            if first >= len(prompt):
                if not open_:
                    break
                put(first, self.surest(row)[1])
                text = end_text()
                self.passes += 1
            for start in range(first, first + size, block_length):
                while part := open_ & set(range(start, start + block_length)):
                    logits = self.block(ids, first, cache, text)
                    found = [(*self.surest(logits[column - 1 - first]), column) for column in sorted(part)]
                    most = max(confidence for confidence, _, _ in found)
                    best = next(column for confidence, _, column in found if confidence == most)
                    for confidence, token, column in found:
                        if column == best or confidence >= threshold:
                            put(column, token)
                    text = end_text()
                    self.passes += 1
            row = self.block(ids, first, cache)[-1]
        text = text if text < len(ids) else total
        filled = [*ids[:text], *[end_ids[0] if end_ids else 0] * (total - text)]
        return filled[len(prompt) : total]

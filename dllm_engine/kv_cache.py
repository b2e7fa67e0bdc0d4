"""Block-wise KV cache: one allocation a decode, keys after RoPE, rows written in place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_engine.config import LLaDAConfig


class KVCache:
    """Keys and values of every column of every sequence.

    ``prefix`` and ``dual`` (Fast-dLLM, arXiv 2505.22618) differ only in the columns that a block call recomputes.

    Attributes:
        keys, values: [layers, B, H_kv, L + 1, Dh]. The last column takes the writes of rows that belong nowhere
            (right of a ragged call); it is never read.
    """

    def __init__(self, config: LLaDAConfig, batch: int, length: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.n_layers, batch, config.n_kv_heads, length + 1, config.head_dim)
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))

    def bind(self, sequences: Tensor, columns: Tensor, end: int) -> list[LayerCache]:
        """One `LayerCache` a layer: ``sequences`` [B'] (ascending) at ``columns`` [B', S] see columns < ``end``."""
        return [LayerCache(k, v, sequences, columns, end) for k, v in zip(self.keys, self.values, strict=True)]


@dataclass(frozen=True)
class LayerCache:
    keys: Tensor
    values: Tensor
    sequences: Tensor
    columns: Tensor
    end: int

    def write(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [B', H_kv, S, Dh] at the bound columns; return all that may be seen, [B', H_kv, end, Dh]."""
        where = self.sequences[:, None], slice(None), self.columns
        self.keys[where], self.values[where] = k.transpose(1, 2), v.transpose(1, 2)
        keys, values = self.keys[:, :, : self.end], self.values[:, :, : self.end]
        if len(self.sequences) == len(keys):  # all of them, in order: views, nothing is copied
            return keys, values
        return keys[self.sequences], values[self.sequences]

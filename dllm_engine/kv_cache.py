"""Block-wise KV cache: one allocation an engine, keys after RoPE, rows written in place."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dllm_engine.config import LLaDAConfig


class KVCache:
    """Keys and values of every column of every slot; a slot is the cache of one sequence.

    ``prefix`` and ``dual`` (Fast-dLLM, arXiv 2505.22618) differ only in the columns that a block call recomputes: both
    are views of the same bytes.

    Attributes:
        data: [layers, 2, rows, H_kv, L + 1, Dh], keys before values; a slot is one row, two with guidance. The last
            column takes the writes of block rows that lie behind a ragged call's end; it is never read.
    """

    def __init__(self, data: Tensor) -> None:
        self.data = data
        self.layers = [layer.unbind(0) for layer in data]

    @staticmethod
    def shape(config: LLaDAConfig, rows: int, length: int) -> tuple[int, ...]:
        """Of `data` for ``rows`` sequences of ``length`` columns."""
        return config.n_layers, 2, rows, config.n_kv_heads, length + 1, config.head_dim

    @staticmethod
    def bytes_per_token(config: LLaDAConfig, dtype: torch.dtype) -> int:
        """Bytes that one column of one sequence takes (twice as many with guidance)."""
        return 2 * config.n_layers * config.n_kv_heads * config.head_dim * dtype.itemsize

    def swap(self, one: slice, other: slice) -> None:
        """Exchange the rows of two slots: the other's sequence may only be waiting."""
        for layer in self.data:
            kept = layer[:, other].clone()
            layer[:, other] = layer[:, one]
            layer[:, one] = kept

    def whole(self, rows: list[int], seen: slice) -> list[LayerCache]:
        """For a call that computes all columns ``seen`` of some rows: it sees its own keys, nothing is read back."""
        consecutive = rows == list(range(rows[0], rows[0] + len(rows)))
        index = None if consecutive else torch.tensor(rows, device=self.data.device)
        at = slice(rows[0], rows[0] + len(rows)) if consecutive else slice(None)
        return [LayerCache(k[at, :, seen], v[at, :, seen], None, index, None) for k, v in self.layers]

    def block(self, count: int, columns: slice | Tensor, seen: slice) -> list[LayerCache]:
        """For a call of the first ``count`` rows at some of their columns (a slice, or int64 [count, S]), which sees
        ``seen``, written before or now: views, nothing is copied.
        """
        rows = None if isinstance(columns, slice) else torch.arange(count, device=self.data.device)[:, None]
        at = (slice(count), slice(None), columns if isinstance(columns, slice) else slice(None))
        index = None if isinstance(columns, slice) else columns
        return [LayerCache(k[at], v[at], index, rows, (k[:count, :, seen], v[:count, :, seen])) for k, v in self.layers]


class LayerCache(NamedTuple):
    """One layer of one call.

    Attributes:
        keys, values: where they go, [rows, H_kv, columns, Dh].
        columns: int64 [B', S] if every sequence has columns of its own, with ``rows`` [B', 1].
        rows: without ``columns``, int64 [B'], the rows written if they are not just all of ``keys``.
        seen: what the queries see; None: the keys and values of the call itself.
    """

    keys: Tensor
    values: Tensor
    columns: Tensor | None
    rows: Tensor | None
    seen: tuple[Tensor, Tensor] | None

    def write(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [B', H_kv, S, Dh]; return the keys and values that may be seen."""
        if self.columns is not None:
            where = self.rows, slice(None), self.columns
            self.keys[where], self.values[where] = k.transpose(1, 2), v.transpose(1, 2)
        elif self.rows is not None:
            self.keys.index_copy_(0, self.rows, k)
            self.values.index_copy_(0, self.rows, v)
        else:
            self.keys.copy_(k)
            self.values.copy_(v)
        return (k, v) if self.seen is None else self.seen

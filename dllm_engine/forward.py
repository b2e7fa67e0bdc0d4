"""One model call: which rows are queries, which keys are seen, and the hidden states of the block rows."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_engine.kv_cache import KVCache
from dllm_engine.model import LLaDA
from dllm_engine.state import DecodeState

CACHES = ("none", "prefix", "dual")


class Forward:
    """Runs the transformer over some sequences of a `DecodeState`.

    A *refresh* computes every row of its sequences (with cache ``"none"`` every call does); a *block call* computes the
    block and, with ``"prefix"``, all that is right of it, against cached keys. Columns from a sequence's ``active_end``
    on, and its padding, are no keys. Guidance doubles the batch: the second half has all prompt tokens masked and
    cache rows of its own.
    """

    def __init__(self, model: LLaDA, state: DecodeState, *, cache: str, cfg_scale: float) -> None:
        self.model, self.state, self.cache, self.cfg_scale = model, state, cache, cfg_scale
        self.guided = cfg_scale > 0
        batch = state.batch * (2 if self.guided else 1)
        self.kv = None
        if cache != "none":
            self.kv = KVCache(model.config, batch, state.length, model.dtype, model.device)
        self.padded = bool(state.padding.any())  # host: once per decode, before the first call

    def __call__(
        self, sequences: Tensor, *, refresh: bool, width: int, first: int, shortest: int, longest: int
    ) -> Tensor:
        """Final hidden states of the first ``width`` block rows of each sequence.

        Args:
            sequences: int64 [B']. refresh: see the class.
            first, shortest, longest: least block start, least and greatest ``active_end`` of the sequences; the host
                knows them already.

        Returns:
            [B', width, D]; float32 with guidance, else the model's dtype.
        """
        state, every = self.state, torch.arange(longest, device=sequences.device)
        start = state.block_start[sequences, None]
        whole = refresh or self.kv is None
        if whole:
            columns = every.expand(len(sequences), -1)
        else:
            columns = start + every[: width if self.cache == "dual" else longest - first]
            columns = torch.where(columns < longest, columns, state.length)  # ragged ends write to the spare column
        tokens = state.tokens[sequences[:, None], columns.clamp_max(state.length - 1)]
        padding = state.padding[sequences, None]

        key_mask = None
        if self.padded or shortest < longest:
            key_mask = ((every >= padding) & (every < state.active_end[sequences, None]))[:, None, None, :]
        rows = sequences
        if self.guided:
            blank = torch.where(columns < state.prompt_length, self.model.mask_id, tokens)
            tokens, columns, padding = torch.cat((tokens, blank)), columns.repeat(2, 1), padding.repeat(2, 1)
            rows = torch.cat((sequences, sequences + state.batch))
            key_mask = None if key_mask is None else key_mask.repeat(2, 1, 1, 1)
        positions = (columns.clamp_max(state.length - 1) - padding).clamp_min(0)
        caches = self.kv.bind(rows, columns, longest) if self.kv is not None else None
        hidden = self.model.hidden_states(tokens, positions, key_mask, caches)

        if whole:  # the block's rows among all of them; of a ragged call a few may lie past the end, and are not active
            index = (state.block_start[rows % state.batch, None] + every[:width]).clamp_max(longest - 1)
            hidden = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))
        hidden = hidden[:, :width]
        if self.guided:
            conditional, unconditional = hidden.float().chunk(2)
            hidden = unconditional + (self.cfg_scale + 1) * (conditional - unconditional)
        return hidden

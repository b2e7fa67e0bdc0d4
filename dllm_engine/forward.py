"""One model call: which rows are queries, which keys are seen, and the hidden states of the block rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dllm_engine.buffers import Buffers
from dllm_engine.kv_cache import KVCache, LayerCache
from dllm_engine.model import LLaDA
from dllm_engine.state import DecodeState


class Call(NamedTuple):
    """What calls of the same sequences at the same blocks share: it is made when one of them moves on, not every step.

    Attributes:
        sequences: int64 [B']. everyone: whether these are all, in order.
        columns: those computed, a slice where all have the same, else int64 [B', S].
        prompt: bool, broadcastable to [B', S]: columns that guidance masks; None without it.
        rope: cos and sin. key_mask: additive [rows, 1, S or 1, K], or None if all keys are seen.
        caches: one a layer. block: rows among those computed that predict the block: a slice, or int64 [B', width, 1].
        kept: see `Forward`; row 0, before those computed, [B', 1, D], or None if none is put there.
        keeps: whether the first row of ``block`` is to be kept.
    """

    sequences: Tensor
    everyone: bool
    columns: slice | Tensor
    prompt: Tensor | None
    rope: tuple[Tensor, Tensor]
    key_mask: Tensor | None
    caches: list[LayerCache] | None
    block: slice | Tensor
    kept: Tensor | None = None
    keeps: bool = False

    def block_rows(self, hidden: Tensor, copies: int = 1) -> Tensor:
        """The blocks' rows of what the call computed; ``copies``: rows of ``hidden`` for each of the call's."""
        if self.kept is not None:
            hidden = torch.cat((self.kept.repeat_interleave(copies, 0), hidden), dim=1)
        if isinstance(self.block, slice):
            return hidden[:, self.block]
        at = self.block if copies == 1 else self.block.repeat_interleave(copies, 0)
        return hidden.gather(1, at.expand(-1, -1, hidden.shape[-1]))


def additive(unseen: Tensor, dtype: torch.dtype) -> Tensor:
    """bool [B, S or 1, K] as what is added to scores, with a dimension for heads: every layer would make that of a bool
    mask again.
    """
    return torch.zeros_like(unseen, dtype=dtype).masked_fill_(unseen, -torch.inf)[:, None]


def guided(both: Sequence[Tensor], scale: float) -> Tensor:
    """Hidden states, float32, from those with and without the prompt: the LM head is linear, so they stand for logits
    under classifier-free guidance.
    """
    conditional, unconditional = (hidden.float() for hidden in both)
    return unconditional + (scale + 1) * (conditional - unconditional)


class Forward:
    """Runs the transformer over some sequences of a `DecodeState`.

    A *refresh* computes every row of its sequences (with cache ``"none"`` every call does); a *block call* computes the
    block and, with ``"prefix"``, all that is right of it, against cached keys. Where rows predict the column behind
    theirs (`LLaDAConfig.shifted`), it begins with the column before the block. Columns from a sequence's ``active_end``
    on, and its padding, are no keys. Guidance doubles the batch: each sequence is followed by itself with all prompt
    tokens masked, with a cache row of its own.

    No row of a *block-causal* model sees farther than its block. So keys of a block are final when it is computed once
    more after its last commit; a block call does that beside its own block. If its rows predict the column behind
    theirs, too (Fast-dLLM v2), the one before a block does not see it: what that predicts is final with the block
    before. So, as in the published code, a block is *opened* by a call of what is before it, and its first column
    decided; later calls compute the model's block that they are in, and the row before it is kept.

    Attributes:
        kept: [B + 1, ways, D], the hidden state that predicts the first column of the model's block where each
            sequence is, unless a prompt fills the first part of that, and a row for the idle one.
    """

    def __init__(
        self, model: LLaDA, state: DecodeState, buffers: Buffers, *, cache: str, cfg_scale: float, reach: int
    ) -> None:
        """``reach``: rows from a block's start that the rule may commit."""
        self.model, self.state, self.cache, self.cfg_scale, self.reach = model, state, cache, cfg_scale, reach
        self.causal = model.config.block_size > 0
        self.opens = model.config.opens_blocks
        self.shift = int(model.config.shifted and not self.opens)
        self.ways = 2 if cfg_scale > 0 else 1
        self.kv = None
        if cache != "none":
            shape = KVCache.shape(model.config, state.batch * self.ways, state.length)
            self.kv = KVCache(buffers.take("KV cache", shape, model.dtype))
        self.kept = self.take_kept(buffers, model, state.batch, self.ways)
        self.joined = model.joined_weights()
        self.slots = list(range(state.batch))  # the sequence whose keys are in each slot
        self.key: object = None
        self.call: Call

    @staticmethod
    def take_kept(buffers: Buffers, model: LLaDA, batch: int, ways: int = 1) -> Tensor:
        """`kept`, of the engine's memory; empty where nothing has to be kept."""
        rows = batch + 1 if model.config.opens_blocks else 0
        return buffers.take("kept", (rows, ways, model.config.d_model), model.dtype)

    def arrange(self, joining: list[int], *, refresh: bool) -> list[int]:
        """The sequences in the order in which a call takes them.

        A block call reads the cache as one view, so its sequences must fill the first slots: one that is behind a gap
        changes places with it: once for each sequence that ended, not for each call after that.
        """
        if self.kv is None or refresh:
            return joining
        wanted, slots, count = set(joining), self.slots, len(joining)
        behind = [s for s in range(count, len(slots)) if slots[s] in wanted]
        for gap in [s for s in range(count) if slots[s] not in wanted]:
            source = behind.pop()
            rows = (slice(s * self.ways, (s + 1) * self.ways) for s in (source, gap))
            self.kv.swap(*rows)
            slots[gap], slots[source] = slots[source], slots[gap]
            self.key = None  # a call that was planned before writes into the slots of then
        return slots[:count]

    def __call__(
        self, joining: list[int], starts: list[int], ends: list[int], *, refresh: bool, width: int, before: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Final hidden states that predict the first ``width`` columns of each sequence's block.

        Args:
            joining: sequences as `arrange` gave them. starts, ends: their block starts and ``active_end``s; of a
                block-causal model the ends of their blocks, if they come first, and the starts, if they are opened.
            refresh: see the class. before: columns left of the blocks that a block call computes too.

        Returns:
            int64 [B'], the sequences; [B', width, D], float32 with guidance, else the model's dtype.
        """
        call = self.planned(joining, starts, ends, refresh=refresh, width=width, before=before)
        if isinstance(call.columns, slice):
            tokens = self.state.tokens[:, call.columns]
            tokens = tokens if call.everyone else tokens.index_select(0, call.sequences)
        else:
            tokens = self.state.tokens[call.sequences[:, None], call.columns]
        if call.prompt is not None:
            tokens = torch.stack((tokens, tokens.masked_fill(call.prompt, self.model.mask_id)), dim=1).flatten(0, 1)
        hidden = self.model.hidden_states(tokens, call.rope, call.key_mask, call.caches, self.joined)

        hidden = call.block_rows(hidden)
        if call.keeps:
            self.kept[call.sequences] = hidden[:, 0].unflatten(0, (-1, self.ways))
        if call.prompt is not None:
            hidden = guided(hidden.unflatten(0, (-1, 2)).unbind(1), self.cfg_scale)
        return call.sequences, hidden

    def planned(
        self, joining: list[int], starts: list[int], ends: list[int], *, refresh: bool, width: int, before: int = 0
    ) -> Call:
        """What such a call shares with the one before, if nobody moved on."""
        key = refresh, width, before, *zip(joining, starts, ends, (self.state.spans[b] for b in joining), strict=True)
        if key != self.key:
            self.call, self.key = self._plan(joining, starts, ends, refresh, width, before), key
        return self.call

    def _plan(
        self, joining: list[int], starts: list[int], ends: list[int], refresh: bool, width: int, before: int
    ) -> Call:
        state, device, ways = self.state, self.state.tokens.device, self.ways
        padding, firsts = ([self.state.spans[b][i] for b in joining] for i in (0, 1))
        begins, opening, longest = starts, self.opens and starts == ends, max(ends)
        if self.opens:
            starts = [start - before if opening else state.home(start) for start in starts]
            rows = min(state.alignment, longest - min(starts))
        else:
            starts, rows = [start - self.shift - before for start in starts], width + self.shift + before
        low, first = min(padding), starts[0]  # no call looks at the padding that all have
        aligned = first == min(starts) == max(starts)
        whole = refresh or self.kv is None
        where = torch.tensor([joining, starts, ends, padding, firsts, begins], device=device)
        sequences, start, end, pad, generated, begin = where[0], *where[1:, :, None].unbind(0)

        columns: slice | Tensor
        block: slice | Tensor = slice(before, before + width)
        if whole:
            columns, block = slice(low, longest), slice(first - low, first - low + width)
            if not aligned:  # rows past the end are not active, but must exist
                block = (start - low + torch.arange(width, device=device)).clamp_max(longest - low - 1)
        elif aligned:
            columns = slice(first, first + rows if self.cache == "dual" else longest)
        else:
            columns = start + torch.arange(rows if self.cache == "dual" else longest - min(starts), device=device)
            columns = torch.where(columns < longest, columns, state.length)  # ragged ends write to the spare column
        kept, keeps = None, self.opens and self.kv is not None and (whole or opening)
        if self.opens and (whole or opening):  # what predicts a sequence's first column is its own row
            at = begin + torch.arange(width, device=device)
            block = (at - 1 + (at == pad) - (low if whole else start)).clamp_max(longest - low - 1)
        elif self.opens:
            block = (begin - start + torch.arange(width, device=device)).clamp_max(rows)
            kept = self.kept[sequences].flatten(0, 1)[:, None]
        at = torch.arange(columns.start, columns.stop, device=device) if isinstance(columns, slice) else columns
        at = at.clamp_max(state.length - 1).expand(1 if low == max(padding) and at.ndim == 1 else len(joining), -1)
        positions = (at - pad[: len(at)]).clamp_min(0)

        every, unseen = torch.arange(low, longest, device=device), None
        if low < max(padding) or min(ends) < longest:
            unseen = ((every < pad) | (every >= end))[:, None]
        if self.causal and (whole or (before and not self.opens)):
            behind = torch.maximum((at // state.alignment + 1) * state.alignment, pad + 1)  # padding sees a key
            later = every >= behind[..., None]
            unseen = later if unseen is None else later | unseen
        key_mask = None if unseen is None else additive(unseen, self.model.dtype)
        prompt = None
        if ways == 2:
            prompt = at < generated
            key_mask = key_mask.repeat_interleave(2, 0) if key_mask is not None and len(key_mask) > 1 else key_mask
            positions = positions.repeat_interleave(2, 0) if len(positions) > 1 else positions

        caches = None
        if self.kv is not None and whole:
            slots = [self.slots.index(b) * ways + way for b in joining for way in range(ways)]
            caches = self.kv.whole(slots, slice(low, longest))
        elif self.kv is not None:
            written = columns
            if self.cache == "dual" and width > self.reach:  # what is only looked at leaves no keys
                offset = torch.arange(rows, device=device)
                written = torch.where(offset < self.reach + self.shift, start + offset, state.length)
            spread = written if isinstance(written, slice) else written.repeat_interleave(ways, 0)
            caches = self.kv.block(len(joining) * ways, spread, slice(low, longest))
        if isinstance(columns, Tensor):
            columns = at
        if isinstance(block, Tensor):
            block = block.repeat_interleave(ways, 0)[..., None]
        everyone = joining == list(range(state.batch))
        rope = self.model.rope_tables(positions)
        return Call(sequences, everyone, columns, prompt, rope, key_mask, caches, block, kept, keeps)

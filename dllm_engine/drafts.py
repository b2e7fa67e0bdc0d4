"""One model call over several canvases of each sequence, and the steps of a rule that they allow (see `FreeDave`)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dllm_engine import ops
from dllm_engine.forward import Call, Forward
from dllm_engine.kv_cache import LayerCache
from dllm_engine.policies.base import allowed_tokens, asked
from dllm_engine.reference import commit_
from dllm_engine.stats import RowStats

if TYPE_CHECKING:
    from dllm_engine.policies.freedave import FreeDave


class BranchCache(LayerCache):
    """A layer's cache that every draft sees with its own block in it; what is kept is written by `keep`."""

    drafts: int
    computed: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, cache: LayerCache, drafts: int) -> BranchCache:
        made = cls(*cache)
        made.drafts = drafts
        return made

    def write(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store nothing; the keys and values that the drafts see: copies of the cache with theirs in place."""
        self.computed = k, v
        assert self.seen is not None
        return self._with(self.seen[0], self.keys, k), self._with(self.seen[1], self.values, v)

    def _with(self, seen: Tensor, target: Tensor, new: Tensor) -> Tensor:
        first = (seen.storage_offset() - target.storage_offset()) // target.stride(2)
        seen = seen.repeat_interleave(self.drafts, 0)
        if self.columns is None:
            at = torch.arange(new.shape[2], device=new.device) - first
            return seen.index_copy(2, at, new)
        # rows behind a ragged call's end have the spare column, which nobody sees
        at = self.columns.repeat_interleave(self.drafts, 0) - first
        at = torch.where(at < seen.shape[2], at, seen.shape[2])[:, None, :, None].expand(new.shape)
        spare = torch.cat((seen, seen[:, :, :1]), dim=2)
        return spare.scatter(2, at, new)[:, :, :-1]

    def keep(self, rows: Tensor) -> None:
        """Store the keys and values of one draft of each sequence, int64 [B']."""
        super().write(*(part.index_select(0, rows) for part in self.computed))


def verify_(
    forward: Forward,
    policy: FreeDave,
    call: Call,
    width: int,
    most: list[int],
    *,
    end_ids: Tensor | None,
    scoring: dict[str, Any],
) -> None:
    """Compute the drafts of the call's sequences, and make the rule's steps from them as long as drafts hold.

    A step is made from the statistics of the draft that the canvas equals, so each is the step that the rule makes
    after a call of its own. It ends where no draft equals the canvas, the block is decided, the text ends, or after
    ``most`` steps of a sequence: then it needs a refresh.
    """
    model, state, count = forward.model, forward.state, policy.drafts
    sequences, batch = call.sequences, len(call.sequences)
    block = state.block(sequences, width)
    rows, columns = block.sequences[:, None], block.columns
    tokens, undecided = policy.propose(block)

    canvas = state.tokens[sequences].repeat_interleave(count, 0)
    canvas.scatter_(1, columns.repeat_interleave(count, 0), tokens.flatten(0, 1))
    if isinstance(call.columns, slice):
        queries = canvas[:, call.columns]
    else:
        queries = canvas.gather(1, call.columns.repeat_interleave(count, 0))
    rope = tuple(t.repeat_interleave(count, 0) if len(t) > 1 else t for t in call.rope)
    mask = call.key_mask
    mask = mask.repeat_interleave(count, 0) if mask is not None and len(mask) > 1 else mask
    caches = [BranchCache.of(cache, count) for cache in call.caches or ()]
    hidden = model.hidden_states(queries, (rope[0], rope[1]), mask, [*caches] or None, forward.joined)
    hidden = call.block_rows(hidden, count)

    def spread(tensor: Tensor) -> Tensor:
        return tensor.repeat_interleave(count, 0)

    drafts = replace(
        block,
        sequences=spread(sequences),
        columns=spread(columns),
        undecided=undecided.flatten(0, 1),
        noise_keys=spread(block.noise_keys),
    )
    stats = ops.block_stats(hidden, model.lm_head, drafts, reads_decided=policy.reads_decided, **scoring)

    here, limit = torch.arange(batch, device=rows.device), torch.tensor(most, device=rows.device)
    at, last = torch.zeros_like(here), torch.zeros_like(here)
    going = torch.ones_like(here, dtype=torch.bool)
    waiting = state.end_ids if policy.ends_wait else None
    later = torch.arange(count, device=rows.device)
    for made in range(1, max(most) + 1):
        start, end = state.block_start[sequences], state.active_end[sequences]
        own = state.block(sequences, width)
        found = RowStats(*(field.unflatten(0, (batch, count))[here, at] for field in stats.fields()))
        score, selected = asked(policy, "score", found, own), asked(policy, "select", found, own)
        chosen = allowed_tokens(policy, found, own, scoring["banned_ids"], len(model.lm_head))
        commit_(state, own, found, score, selected, chosen, end_ids=end_ids, only=going, waiting_ids=waiting)
        last = torch.where(going, at, last)
        open_, held = state.undecided[rows, columns][:, None], state.tokens[rows, columns][:, None]
        same = ((open_ == undecided) & (open_ | (held == tokens))).all(2) & (later > at[:, None])
        going = going & same.any(1) & (made < limit)
        going &= (state.block_start[sequences] == start) & (state.active_end[sequences] == end)
        at = torch.where(going, same.int().argmax(1), at)
    for cache in caches:
        cache.keep(here * count + last)

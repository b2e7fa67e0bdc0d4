"""The loop of a decode: model call, statistics, rule, commit; then one small read tells the host where each one is."""

from __future__ import annotations

import copy
import math
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from dllm_engine import drafts, graphs, ops, policies
from dllm_engine.buffers import Buffers
from dllm_engine.end_of_text import predict_end_
from dllm_engine.forward import Forward
from dllm_engine.model import LLaDA
from dllm_engine.options import Options
from dllm_engine.policies.base import Policy, decide_, probes_of, reach_of
from dllm_engine.reference import commit_
from dllm_engine.state import DecodeState

_USERS: dict[int, weakref.ref[Loop]] = {}
_CHOOSING = threading.Lock()


def _not_in_use(policy: Policy, loop: Loop) -> Policy:
    """The policy, or a copy of it while another decode has it: what a rule remembers belongs to one decode."""
    key = id(policy)

    def forget(user: weakref.ref[Loop]) -> None:
        if _USERS.get(key) is user:
            del _USERS[key]

    with _CHOOSING:
        user = _USERS.get(key)
        if user is not None and user() is not None:
            return copy.copy(policy)
        _USERS[key] = weakref.ref(loop, forget)
        return policy


class Loop:
    """Moves the sequences of a state on, one model call a `step`, until none has an undecided position.

    Attributes:
        where: `DecodeState.progress` on the host, as the last step left it.
        passes: model calls made. taken: those that each row's sequence took part in.
        patience: refreshes that sequences inside a block let others have before their own call comes. Without a limit,
            and while new prompts keep coming, a sequence may wait until every row is inside a block.
    """

    patience: float = math.inf

    def __init__(self, model: LLaDA, state: DecodeState, options: Options, buffers: Buffers) -> None:
        device, policy = model.device, _not_in_use(options.policy, self)
        self.model, self.state, self.policy = model, state, policy
        banned = (model.mask_id, *range(model.vocab_size, len(model.lm_head)), *options.extra_banned)
        self.scoring: dict[str, Any] = {
            "banned_ids": ops.id_tensor(banned, device),
            "excluded_ids": ops.id_tensor(options.excluded_ids, device),
            "temperature": options.temperature,
            "backend": options.backend,
        }
        self.end_ids = torch.tensor(model.end_ids, device=device)
        self.stopping_ids = self.end_ids if options.end_of_text != "off" else None
        self.predicts = options.end_of_text == "predicted"
        self.refresh = options.cache.refresh if options.cache.name != "none" else None
        try:
            policy.begin(state)
        except BaseException:
            self.close()
            raise
        reach = reach_of(policy, state.block_length, options.gen_length)
        self.reach = max(state.block_length, min(reach, options.gen_length))
        self.forward = Forward(
            model, state, buffers, cache=options.cache.name, cfg_scale=options.cfg_scale, reach=self.reach
        )
        self.rule = policies.as_rule(policy, state.block_length, device)
        if self.rule is not None:  # once for all steps
            dtype = torch.float32 if options.cfg_scale else model.dtype
            hidden = torch.empty(1, state.block_length, model.lm_head.shape[1], dtype=dtype, device=device)
            first = torch.zeros(1, dtype=torch.int64, device=device)
            ops.check_step(
                hidden,
                model.lm_head,
                state,
                first,
                self.rule,
                end_ids=self.stopping_ids,
                temperature=options.temperature,
            )
        self.block_calls = None
        if self.rule is not None and graphs.supported(self.forward, options):
            self.block_calls = graphs.BlockCalls(self.forward, self.rule, self.stopping_ids, self.scoring, buffers)
        self.passes, self.taken, self._waited = 0, [0] * state.batch, 0
        self.opened = [-1] * state.batch  # the block that each sequence opened last (`Forward`), by its start
        self.where: list[list[int]] = state.progress.tolist()  # host: where every sequence starts

    def admit(self, row: int, prompt: Sequence[int], seed: int, gen_length: int) -> None:
        """A new prompt begins in the row of a finished sequence."""
        self.state.admit(row, prompt, seed, gen_length)
        self.where[row], self.taken[row], self.opened[row] = self.state.start(row), 0, -1

    def release(self, row: int) -> None:
        """The sequence of a row ends here, wherever it is."""
        self.state.release(row)
        self.where[row] = self.state.idle

    def close(self) -> None:
        """The policy is free for another decode. Else it would be when nothing holds this loop any more, and a kept
        traceback does.
        """
        key = id(self.policy)
        with _CHOOSING:
            if (user := _USERS.get(key)) is not None and user() is self:
                del _USERS[key]

    def step(self) -> list[int]:
        """One call and its commit, for the sequences that need this kind of call; they are returned, [] at the end."""
        with torch.autocast(self.model.device.type, enabled=False):  # a caller's would give keys of another type
            return self._step()

    def _step(self) -> list[int]:
        where = self.where
        unfinished = [b for b, (*_, left) in enumerate(where) if left > 0]
        if not unfinished:
            return []
        due = self._due(unfinished)
        inside = [b for b in unfinished if b not in due]
        self._waited = self._waited + 1 if due and inside else 0
        if self._waited > self.patience:
            unfinished, due, self._waited = inside, [], 0
        before, opening = 0, False
        if due and self.forward.causal:  # keys of all blocks but the last are final: that and the new one are due
            kinds = {b: (where[b][4] > 0, self._opens(b)) for b in due}
            later, opening = min(kinds.values())
            due = [b for b in due if kinds[b] == (later, opening)]
            before = self.state.alignment if later and self.forward.kv is not None else 0
        refresh, ahead = bool(due) and not before, self._ahead(unfinished)
        # rows right of a block are computed only for those that begin one: cached, they would change what others see
        apart = ahead if self.refresh is not None or self.policy.drafts > 1 else []
        joining = self.forward.arrange(due or apart or unfinished, refresh=refresh)
        ahead = [b for b in joining if b in ahead]
        if self.block_calls is not None and not due and not ahead:
            self.block_calls(joining)
        elif self.policy.drafts > 1 and not due and not ahead and any(where[b][2] > 0 for b in joining):
            self._verify(joining)
        elif opening:
            self._open(joining, refresh=refresh, before=before)
        else:
            self._call(joining, ahead, refresh=refresh, before=before)

        self.passes += 1
        for b in joining:
            self.taken[b] += 1
        self.where = self.state.progress.tolist()  # host: the one read between steps; decides who joins the next call
        return joining

    def _call(self, joining: list[int], ahead: list[int], *, refresh: bool, before: int) -> None:
        """One model call of any kind and its commit; ends are predicted for ``ahead``."""
        where, state, model, reach = self.where, self.state, self.model, self.reach
        starts, ends, width = self._extent(joining)
        rows = max(ends) - min(starts) if ahead else width
        sequences, hidden = self.forward(joining, starts, ends, refresh=refresh, before=before, width=rows)
        hidden, beyond = hidden[:, :width], hidden[:, reach:]
        if self.rule is not None:
            ops.decode_step_(
                hidden,
                model.lm_head,
                state,
                sequences,
                self.rule,
                end_ids=self.stopping_ids,
                known=True,
                **self.scoring,
            )
        else:
            block = state.block(sequences, width)
            probes, decided = probes_of(self.policy, block), self.policy.reads_decided
            stats = ops.block_stats(
                hidden, model.lm_head, block, reads_decided=decided, probe_ids=probes, **self.scoring
            )
            decide_(
                self.policy,
                state,
                block,
                stats,
                end_ids=self.stopping_ids,
                banned_ids=self.scoring["banned_ids"],
                rows=len(model.lm_head),
            )

        if ahead:
            chosen = torch.tensor([joining.index(b) for b in ahead], device=hidden.device)
            first = torch.tensor([where[b][0] + reach for b in ahead], device=hidden.device)
            scoring = self.scoring | {"temperature": 0.0}
            predict_end_(state, sequences[chosen], first, beyond[chosen], model.lm_head, self.end_ids, scoring)

    def _open(self, joining: list[int], *, refresh: bool, before: int) -> None:
        """One model call of what is before blocks and the commit of their first columns, which no rule is asked for.
        It is none of a block's steps.
        """
        state, model = self.state, self.model
        starts = [self.where[b][0] for b in joining]
        sequences, hidden = self.forward(joining, starts, starts, refresh=refresh, before=before, width=1)
        block = state.block(sequences, state.block_length)
        first = block.columns == block.columns[:, :1]
        one = replace(block, undecided=first)
        hidden = hidden.expand(-1, state.block_length, -1)
        stats = ops.block_stats(hidden, model.lm_head, one, reads_decided=False, **self.scoring)
        block = replace(block, quota=torch.zeros_like(block.quota))
        commit_(state, block, stats, stats.log_odds, first, stats.token, end_ids=self.stopping_ids)
        state.predicted[sequences[:, None], block.columns] = torch.where(first, stats.token, block.predicted)
        state.step_in_block[sequences] = 0
        for b, start in zip(joining, starts, strict=True):
            self.opened[b] = start

    def _opens(self, b: int) -> bool:
        """Whether a sequence's next call opens its block."""
        start = self.where[b][0]
        begins = self.forward.opens and start == self.state.home(start)
        return begins and self.opened[b] != start and start >= self.state.spans[b].first

    def _verify(self, joining: list[int]) -> None:
        """One model call of all drafts of sequences, and the rule's steps as far as drafts hold."""
        starts, ends, width = self._extent(joining)
        call = self.forward.planned(joining, starts, ends, refresh=False, width=width)
        policy: Any = self.policy
        most = [self._until_due(b) for b in joining]
        drafts.verify_(self.forward, policy, call, width, most, end_ids=self.stopping_ids, scoring=self.scoring)

    def _extent(self, joining: list[int]) -> tuple[list[int], list[int], int]:
        """Block starts and ends of text of the sequences, and the rows that the longest of their blocks has."""
        starts, ends = [self.where[b][0] for b in joining], [self.where[b][1] for b in joining]
        if self.forward.causal:
            size, home = self.state.alignment, self.state.home
            ends = [min(end, home(start) + size) for start, end in zip(starts, ends, strict=True)]
        return starts, ends, min(self.reach, max(end - start for start, end in zip(starts, ends, strict=True)))

    def _until_due(self, b: int) -> int:
        """Steps that a sequence may make, one at least, before it needs a refresh: at most as many as drafts."""
        *_, in_block, _, step, _ = self.where[b]
        drafts = range(1, self.policy.drafts)
        if self.refresh is None:
            return self.policy.drafts
        return next((i for i in drafts if self.refresh.due(step + i, in_block + i)), self.policy.drafts)

    def _due(self, unfinished: list[int]) -> list[int]:
        """Those whose next call is a refresh."""
        if self.forward.opens:  # a part of the model's block is begun by an ordinary call
            return [b for b in unfinished if self._opens(b) or (self.refresh is not None and self.where[b][4] == 0)]
        if self.refresh is None:
            return []
        due, where = self.refresh.due, self.where
        return [b for b in unfinished if where[b][4] == 0 or due(where[b][4], where[b][2])]

    def _ahead(self, unfinished: list[int]) -> list[int]:
        """Those whose end of text is predicted in their next call: they begin a block that is not their last."""
        if not self.predicts:
            return []
        return [b for b in unfinished if self.where[b][2] == 0 and self.where[b][1] > self.where[b][0] + self.reach]

    def check(self, joined: list[int], describe: Callable[[int, int], str]) -> None:
        """Raise RuntimeError if a sequence of the last step has no token; ``describe``: (sequence, column) -> name."""
        for b in joined:
            if self.where[b][3] < self.state.length:
                reasons = "the model gave NaN or infinite logits, or every id is banned"
                if self.rule is None:
                    reasons += f", or {self.policy!r} gave a NaN score or an id that is not allowed"
                raise RuntimeError(f"no valid token for {describe(b, self.where[b][3])}: {reasons}")

"""What a decoding rule is: it ranks positions and may pick some outright; quota, bans and commit are the engine's."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dllm_engine.config import ModelFacts
from dllm_engine.noise import LARGEST
from dllm_engine.reference import commit_
from dllm_engine.rules import Rule, select
from dllm_engine.state import BlockState, DecodeState
from dllm_engine.stats import RowStats


def _is_finite(name: str, value: float, largest: float) -> bool:
    """Whether a parameter is finite; TypeError or ValueError, naming it, if it is no number or no tensor holds it."""
    try:
        if not -math.inf < value < math.inf:
            return False
    except (TypeError, RuntimeError):  # of a tensor of several
        raise TypeError(f"{name}: {value!r} given; a number is needed") from None
    if value > largest:
        raise ValueError(f"{name}: {value} given; at most {largest:g} is allowed")
    return True


def in_range(name: str, value: float, least: float, most: float = math.inf) -> float:
    """A parameter of a rule; ValueError, naming it, if it is not a finite number in the range."""
    if not (_is_finite(name, value, LARGEST) and least <= value <= most):
        allowed = f"{least} to {most} allowed" if most < math.inf else f"a finite number ≥ {least} is allowed"
        raise ValueError(f"{name}: {value} given; {allowed}")
    return float(value)


def whole(name: str, value: float, least: int) -> int:
    """A parameter that counts; ValueError, naming it, if it is no whole number or too small."""
    if not _is_finite(name, value, 1e9) or value != int(value) or value < least:
        raise ValueError(f"{name}: {value} given; a whole number ≥ {least} is allowed")
    return int(value)


HOOKS = ("reach", "probes", "block_lengths", "edit", "stay")  # what no kernel asks
_TYPES = {
    "select": torch.bool, "tokens": torch.int64, "block_lengths": torch.int64, "edit": torch.bool, "stay": torch.bool,
}  # fmt: skip


class Policy:
    """Base of the commit rules.

    At each step the engine commits what `select` returns together with the n best undecided positions by `score`, where
    n is the static schedule's quota if ``steps`` was given, else 1: a step always makes progress.
    """

    name: str
    reads_decided = True  # False where `score` and `select` ignore the statistics of decided positions: saves rows
    greedy = False  # True where a temperature would not mean anything
    drafts = 1  # canvases that a call inside a block computes for each sequence, see `FreeDave.propose`
    # True where an end id is committed only if nothing before it stays undecided in what a call sees: then the text
    # before an end never depends on what is behind it, and end of text "committed" changes no answer.
    ends_wait = False
    of_one_batch = False  # True where the rule knows something of each sequence of its batch: not for `generate_many`

    def score(self, stats: RowStats, state: BlockState) -> Tensor:
        """Rank of each position, float32 [B, S], higher first; log-odds of ``token`` unless a rule says otherwise."""
        return stats.log_odds

    def select(self, stats: RowStats, state: BlockState) -> Tensor:
        """Positions to commit beyond the quota, bool [B, S]; decided ones are ignored. By default what `rule` says,
        nothing without one.
        """
        rule = self.rule(state.undecided.shape[1], stats.token.device)
        return torch.zeros_like(state.undecided) if rule is None else select(rule, stats, state)

    def tokens(self, stats: RowStats, state: BlockState) -> Tensor:
        """What is committed where, int64 [B, S]; the predictions unless a rule says otherwise."""
        return stats.token

    # What only some rules need. A step calls `probes`, `block_lengths`, `score`, `select`, `tokens`, `edit` and `stay`,
    # in this order, once each.

    def reach(self, block_length: int, gen_length: int) -> int:
        """Columns from a block's start that a call computes and the rule sees and may commit; S is at most that. Less
        than the block length is that, more than gen_length is gen_length.
        """
        return block_length

    def probes(self, state: BlockState) -> Tensor | None:
        """Ids whose logits are wanted, int64 [B', S, K], K ≤ 8: ``stats.probe_logits``."""
        return None

    def block_lengths(self, stats: RowStats, state: BlockState) -> Tensor | None:
        """Lengths of the blocks that the sequences are in, int64 [B'], 1 to `reach`: behind them nothing is committed,
        and a sequence moves on when so many columns are decided. By default the block length of the decode.
        """
        return None

    def edit(self, stats: RowStats, state: BlockState) -> Tensor | None:
        """Decided active positions whose token is replaced by that of `tokens`, bool [B', S]."""
        return None

    def stay(self, stats: RowStats, state: BlockState) -> Tensor | None:
        """Sequences that get another call of their block though all of it is decided, bool [B']."""
        return None

    def rule(self, block_length: int, device: torch.device) -> Rule | None:
        """The rule as data, if a kernel can decide by it: `select` and the other methods are then not called, unless
        they are the rule's own. None has them called after every pass.
        """
        return None

    def default_steps(self, gen_length: int) -> int | None:
        """Steps of the static schedule when the caller gives none; None means a quota of one position a step."""
        return None

    def check(self, model: ModelFacts, *, block_length: int, cache: str) -> Policy | None:
        """Raise ValueError before the first forward pass if the rule cannot run with these settings. What is returned
        decodes instead of it: a copy that knows what the model alone can tell, as the object may serve others, too.
        """
        return None

    def begin(self, state: DecodeState) -> None:
        """Called once before the first forward pass of a decode: where a rule with a memory makes or checks it."""

    def __repr__(self) -> str:
        values = ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if not k.startswith("_"))
        return f"{type(self).__name__}({values})"


def _check_type(name: str, given: object, dtype: torch.dtype | None) -> None:
    if not isinstance(given, Tensor) or given.dtype != (dtype or given.dtype):
        what = given.dtype if isinstance(given, Tensor) else type(given).__name__
        raise TypeError(f"{name}: {what} returned; {dtype or 'a tensor'} is needed")


def asked(policy: Policy, method: str, stats: RowStats, block: BlockState) -> Tensor:
    """What a method of a policy returns for a step, [B', S] or [B']. One of another shape would be spread over the
    batch in silence, one of another type fail where nothing tells of the rule.

    Raises:
        TypeError, ValueError: naming the policy and the method.
    """
    given, dtype = getattr(policy, method)(stats, block), _TYPES.get(method)
    if given is None and method in HOOKS:
        return given  # type: ignore[return-value]
    name = f"{type(policy).__name__}.{method}"
    _check_type(name, given, dtype)
    shape = block.sequences.shape if method in ("block_lengths", "stay") else block.undecided.shape
    if given.shape != shape:
        raise ValueError(f"{name}: shape {list(given.shape)} returned; {list(shape)} is needed")
    return given


def reach_of(policy: Policy, block_length: int, gen_length: int) -> int:
    """`Policy.reach`; anything but an int is a TypeError."""
    given = policy.reach(block_length, gen_length)
    if not isinstance(given, int):
        raise TypeError(f"{type(policy).__name__}.reach: {given!r} returned; an int is needed")
    return given


def probes_of(policy: Policy, block: BlockState) -> Tensor | None:
    """`Policy.probes`.

    Raises:
        TypeError, ValueError: anything but int64 [B', S, K] or None, naming the policy.
    """
    given, name = policy.probes(block), f"{type(policy).__name__}.probes"
    if given is None:
        return None
    _check_type(name, given, torch.int64)
    if given.ndim != 3 or given.shape[:2] != block.undecided.shape:
        raise ValueError(f"{name}: shape {list(given.shape)} returned; {[*block.undecided.shape, 'K']} is needed")
    return given


def allowed_tokens(policy: Policy, stats: RowStats, block: BlockState, banned_ids: Tensor, rows: int) -> Tensor:
    """`Policy.tokens`, −1 where it is an id that may not be written: bans are the engine's. ``rows``: of the head."""
    tokens = asked(policy, "tokens", stats, block)
    if tokens is stats.token:
        return tokens
    return tokens.masked_fill(torch.isin(tokens, banned_ids) | (tokens >= rows), -1)


def decide_(
    policy: Policy,
    state: DecodeState,
    block: BlockState,
    stats: RowStats,
    *,
    end_ids: Tensor | None,
    banned_ids: Tensor,
    rows: int,
) -> None:
    """A step of a policy that no kernel decides: ask it, in the order that `Policy` promises, and commit."""
    lengths = asked(policy, "block_lengths", stats, block)
    score, selected = asked(policy, "score", stats, block), asked(policy, "select", stats, block)
    tokens = allowed_tokens(policy, stats, block, banned_ids, rows)
    edited, stays = asked(policy, "edit", stats, block), asked(policy, "stay", stats, block)
    commit_(
        state, block, stats, score, selected, tokens, end_ids=end_ids, edited=edited, stays=stays, lengths=lengths,
        waiting_ids=state.end_ids if policy.ends_wait else None,
    )  # fmt: skip

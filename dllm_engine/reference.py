"""The decode step in eager torch: the readable definition that every backend is tested against.

`row_stats` scores rows of the LM head; `commit_` turns a policy's scores and selection into tokens. Both touch only
device tensors; neither asks the host anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm_engine import rules
from dllm_engine.noise import gumbel
from dllm_engine.rules import ranking
from dllm_engine.stats import RowStats

if TYPE_CHECKING:
    from dllm_engine.state import BlockState, DecodeState

VOCAB_TILE = 8192  # ids scored at once: [R, 8192] float32 is the largest thing ever held
_NEG_INF = float("-inf")


def row_stats(
    hidden: Tensor,
    lm_head: Tensor,
    rows: Tensor,
    banned_ids: Sequence[int] | Tensor = (),
    excluded_ids: Sequence[int] | Tensor = (),
    probe_ids: Tensor | None = None,
    temperature: float = 0.0,
    noise_keys: Tensor | None = None,
) -> RowStats:
    """Statistics of ``hidden[rows] @ lm_head.T``, the vocabulary in tiles, float32 throughout.

    Args:
        hidden: [N, D]. lm_head: [V, D]. rows: int [R], indices into ``hidden``.
        banned_ids: never chosen, nor runner-up; they stay in the normaliser.
        excluded_ids: left out of the normaliser; a chosen one has log_odds −inf, so confidence 0.
        probe_ids: int64 [R, K], ids whose logits are wanted.
        temperature: draw from softmax(logits / temperature) by the Gumbel-max trick; 0 takes the best.
        noise_keys: int64 [R, 3], see `noise.gumbel`; needed with a temperature.
    """
    x = hidden[rows].float()
    count, device = x.shape[0], x.device
    banned, excluded = _marked(banned_ids, lm_head), _marked(excluded_ids, lm_head)
    neg_inf = torch.full((count,), _NEG_INF, dtype=torch.float32, device=device)
    nobody = torch.full((count,), -1, dtype=torch.int64, device=device)
    # the drawn id: (noisy logit that won, id, logit, logit as the normaliser sees it); the two best; the normaliser
    won, token, logit, inside = neg_inf, nobody, neg_inf, neg_inf
    best, best_id, second, second_id = neg_inf, nobody, neg_inf, nobody
    rest = neg_inf  # logsumexp without the winner
    top, total, weighted = neg_inf, torch.zeros_like(neg_inf), torch.zeros_like(neg_inf)  # m, Σe^{x−m}, Σ(x−m)e^{x−m}
    bad = torch.zeros(count, dtype=torch.bool, device=device)
    asked = (count, 0) if probe_ids is None else probe_ids.shape
    probes = torch.full(asked, _NEG_INF, dtype=torch.float32, device=device)

    for first in range(0, lm_head.shape[0], VOCAB_TILE):
        logits = F.linear(x, lm_head[first : first + VOCAB_TILE].float())
        width = logits.shape[1]
        bad |= (logits.isnan() | (logits == float("inf"))).any(1)
        if probe_ids is not None:
            local = probe_ids - first
            here = (local >= 0) & (local < width)
            probes = torch.where(here, logits.gather(1, local.clamp(0, width - 1)), probes)
        allowed = logits.masked_fill(banned[first : first + width], _NEG_INF)
        normal = logits.masked_fill(excluded[first : first + width], _NEG_INF)

        # the two best allowed ids; max takes the first of equals, earlier tiles win ties: lowest id
        v1, i1 = allowed.max(1)
        v2, i2 = allowed.scatter(1, i1[:, None], _NEG_INF).max(1)
        i1, i2 = i1 + first, i2 + first
        newer = v1 > best
        runner, runner_id = torch.where(newer, best, second), torch.where(newer, best_id, second_id)
        rival, rival_id = torch.where(newer, v2, v1), torch.where(newer, i2, i1)
        second, second_id = torch.maximum(runner, rival), torch.where(rival > runner, rival_id, runner_id)
        best, best_id = torch.where(newer, v1, best), torch.where(newer, i1, best_id)

        # the winner, and the logsumexp of everything else
        if temperature > 0:
            assert noise_keys is not None
            w, j = (allowed + temperature * gumbel(noise_keys, first, width)).max(1)
        else:
            w, j = allowed.max(1)
        j = j[:, None]
        here_logit, here_inside = logits.gather(1, j)[:, 0], normal.gather(1, j)[:, 0]
        newer = w > won
        loser = torch.where(newer, inside, here_inside)
        others = normal.scatter(1, j, _NEG_INF).logsumexp(1)
        rest = torch.logaddexp(torch.logaddexp(rest, others), loser)
        won, token = torch.where(newer, w, won), torch.where(newer, j[:, 0] + first, token)
        logit, inside = torch.where(newer, here_logit, logit), torch.where(newer, here_inside, inside)

        # the normaliser and the entropy's sum
        m = normal.amax(1)
        shifted = normal - torch.where(m == _NEG_INF, 0.0, m)[:, None]
        e = shifted.exp()
        d, s = e.sum(1), torch.where(e > 0, shifted * e, 0.0).sum(1)
        top, total, weighted = _merge((top, total, weighted), (m, d, s))

    taken = best_id == token  # always, unless a temperature drew another
    other, other_logit = torch.where(taken, second_id, best_id), torch.where(taken, second, best)
    error = bad | (token < 0)
    return RowStats(
        token=torch.where(error, -1, token),
        logit=logit,
        second_token=torch.where(other_logit == _NEG_INF, -1, other),
        second_logit=other_logit,
        logsumexp=top + total.log(),
        log_odds=torch.where(inside == _NEG_INF, _NEG_INF, inside - rest),
        entropy=total.log() - weighted / total,
        probe_logits=probes,
    )


def decode_step_(
    hidden: Tensor,
    lm_head: Tensor,
    state: DecodeState,
    sequences: Tensor,
    rule: rules.Rule,
    *,
    banned_ids: Sequence[int] | Tensor = (),
    excluded_ids: Sequence[int] | Tensor = (),
    end_ids: Tensor | None = None,
    waiting_ids: Tensor | None = None,
    temperature: float = 0.0,
) -> RowStats:
    """Score a block's rows, decide by ``rule``, commit. hidden: [B', S, D] of ``sequences`` [B']. Stats are [B', S]."""
    batch, width, dim = hidden.shape
    block = state.block(sequences, width)
    stats = row_stats(
        hidden.reshape(-1, dim),
        lm_head,
        torch.arange(batch * width, device=hidden.device),
        banned_ids=banned_ids,
        excluded_ids=excluded_ids,
        temperature=temperature,
        noise_keys=block.noise_keys.flatten(0, 1),
    ).reshape(batch, width)
    selected = rules.select(rule, stats, block)
    commit_(state, block, stats, stats.log_odds, selected, stats.token, end_ids=end_ids, waiting_ids=waiting_ids)
    return stats


def _marked(ids: Sequence[int] | Tensor, lm_head: Tensor) -> Tensor:
    """bool [V], True at ``ids``."""
    index = torch.as_tensor(ids, dtype=torch.int64, device=lm_head.device)
    return torch.zeros(len(lm_head), dtype=torch.bool, device=lm_head.device).index_fill(0, index, True)


def _behind(mask: Tensor) -> Tensor:
    """Columns with a True one of ``mask`` [B, S] to their left."""
    return mask.cumsum(1) > mask.long()


def _merge(a: tuple[Tensor, Tensor, Tensor], b: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Merge two partial states (m, Σe^{x−m}, Σ(x−m)e^{x−m}); an empty part has m = −inf and sums 0."""
    m = torch.maximum(a[0], b[0])
    d = s = torch.zeros_like(m)
    for top, total, weighted in (a, b):
        shift = torch.where(top == _NEG_INF, 0.0, top - m)
        scale = shift.exp()
        d, s = d + total * scale, s + (weighted + shift * total) * scale
    return m, d, s


def commit_(
    state: DecodeState,
    block: BlockState,
    stats: RowStats,
    score: Tensor,
    selected: Tensor,
    tokens: Tensor,
    *,
    end_ids: Tensor | None,
    edited: Tensor | None = None,
    stays: Tensor | None = None,
    lengths: Tensor | None = None,
    only: Tensor | None = None,
    waiting_ids: Tensor | None = None,
) -> None:
    """Write the step's tokens and move every sequence on; ``state`` is changed in place.

    Committed are the policy's own selection together with the ``block.quota`` best undecided positions by ``score``
    (equal scores: the lower position). With ``end_ids``, an end id committed at j sets ``active_end`` to j + 1 and
    everything from there on holds the fill id at once (DESIGN: end of text "committed").

    Args:
        block: the sequences and rows of this call, [B', S]. stats: [B', S]. score: float32 [B', S].
        selected: bool [B', S]. tokens: int64 [B', S], what is written where; −1 is nothing and fails.
        end_ids: int64 [E], or None for end of text "off".
        edited: bool [B', S], positions that are written too; of them only decided ones of the text.
        stays: bool [B'], sequences that stay in their block though it is decided; ``left`` counts one for them.
        lengths: int64 [B'], of their blocks, 1 to S, behind which nothing is committed; by default the block length of
            the decode, and then all that the rule sees may be.
        only: bool [B'], the sequences that take part; the others are left as they are.
        waiting_ids: int64 [E], ids that are committed only where nothing before them stays undecided (the model's end
            ids, if the policy has them wait). Those behind an undecided position that is not selected do not rank.
    """
    undecided, sequences, rows, columns = block.undecided, block.sequences, block.sequences[:, None], block.columns
    open_ = undecided
    if lengths is not None:
        lengths = lengths.clamp(1, columns.shape[1])
        open_ = undecided & (torch.arange(columns.shape[1], device=columns.device) < lengths[:, None])
    failed = open_ & ((stats.token < 0) | score.isnan())
    waits = torch.zeros_like(open_) if waiting_ids is None else torch.isin(tokens, waiting_ids)
    ranked = open_ & ~(waits & _behind(open_ & ~selected))
    rank = ranking(score, ranked).argsort(dim=1)
    chosen = open_ & (selected | (ranked & (rank < block.quota[:, None])))
    chosen &= ~(waits & _behind(open_ & ~chosen)) & ~failed
    written = chosen if edited is None else chosen | (edited & block.active & (block.positions >= 0) & ~undecided)
    wrong = written & (tokens < 0)
    failed, chosen, written = failed | wrong, chosen & ~wrong, written & ~wrong
    if only is not None:
        failed, chosen, written = (mask & only[:, None] for mask in (failed, chosen, written))
    seen = undecided if only is None else undecided & only[:, None]

    state.tokens[rows, columns] = torch.where(written, tokens, state.tokens[rows, columns])
    state.undecided[rows, columns] = undecided & ~chosen
    state.predicted[rows, columns] = torch.where(seen, stats.token, block.predicted)
    first_failed = torch.where(failed, columns, state.length).amin(1)
    state.failed_at[sequences] = torch.minimum(state.failed_at[sequences], first_failed)

    if end_ids is not None:
        ended = written & torch.isin(tokens, end_ids)
        end = torch.where(ended, columns + 1, state.length).amin(1)
        state.active_end[sequences] = torch.minimum(state.active_end[sequences], end)
        beyond = torch.arange(state.length, device=end.device) >= state.active_end[:, None]
        state.tokens.masked_fill_(beyond, state.fill_id)
        state.undecided &= ~beyond

    moved = torch.full_like(sequences, state.block_length) if lengths is None else lengths
    inside = columns - columns[:, :1] < moved[:, None]
    remains = (state.undecided[rows, columns] & inside).any(1)
    held = torch.zeros_like(remains) if stays is None else stays & ~remains
    state.left[sequences] = state.undecided[sequences].sum(1) + held
    remains |= held
    start = state.block_start[sequences] + moved
    if lengths is None and columns.shape[1] > state.block_length:  # blocks that were decided beside an earlier one
        first = torch.where(state.undecided[sequences], torch.arange(state.length, device=rows.device), state.length)
        blocks = (first.amin(1) - state.prompt_length) // state.block_length
        start = torch.maximum(start, state.prompt_length + blocks * state.block_length)
    ones = torch.ones_like(remains) if only is None else only
    state.step[sequences] += ones.long()
    in_block = torch.where(remains, state.step_in_block[sequences] + 1, 0)
    state.step_in_block[sequences] = torch.where(ones, in_block, state.step_in_block[sequences])
    state.block_start[sequences] = torch.where(remains | ~ones, state.block_start[sequences], start)

"""Into the decode step's partial states: the logits of some ids at a time."""

from __future__ import annotations

import triton
import triton.language as tl

from dllm_engine.kernels.merge import NEG_INF, NO_ID, add_rest, best_of

LEAST = tl.constexpr(-200.0)  # e to it is 0


@triton.jit
def first_at(ids, count, value):
    """Index of the first of ``count`` ascending ids that is at least ``value``."""
    low = 0
    high = count
    while low < high:
        middle = (low + high) // 2
        below = tl.load(ids + middle) < value
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def _marked(ids, at, count, columns, last):
    """bool like ``columns``: which of them are listed, reading on from ``at``; and where to read on after ``last``."""
    marked = columns < 0
    going = at < count
    while going:
        value = tl.load(ids + at)
        here = value < last
        marked = marked | (columns == tl.where(here, value, -1))
        at = tl.where(here, at + 1, at)
        going = here & (at < count)
    return marked, at


@triton.jit
def _gumbel(seed, position, step, columns):
    """Standard Gumbel noise [rows, ids]: `dllm_engine.noise.gumbel`."""
    zero = columns * 0
    w0, w1, w2, w3 = tl.philox(
        seed[:, None],
        (columns // 4)[None, :],
        position.to(tl.int32)[:, None],
        step.to(tl.int32)[:, None],
        zero[None, :],
    )
    word = (columns % 4)[None, :]
    bits = tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3)))
    u = ((bits.to(tl.uint32).to(tl.float64) + 0.5) * 2.3283064365386963e-10).to(tl.float32)
    u = tl.minimum(u, 0.9999999403953552).to(tl.float64)
    return (-tl.log(-tl.log(1.0 - u))).to(tl.float32)


@triton.jit
def _greedy(logits, ids):
    """Of logits that may all be chosen and are all in the normaliser: best, second, and the normaliser of all but the
    best, and NaN in its total if there is a NaN or +inf. Nearly all ids take this way, so every instruction counts.
    """
    best, best_id = best_of(logits, ids)
    rest = tl.where(ids == best_id[:, None], NEG_INF, logits)
    second, second_id = best_of(rest, ids)
    shifted = rest - tl.where(second == NEG_INF, 0.0, second)[:, None]
    shifted = tl.maximum(shifted, LEAST, propagate_nan=tl.PropagateNan.ALL)  # no 0 times -inf below
    e = tl.exp(shifted)
    return best, best_id, second, second_id, tl.sum(e, 1), tl.sum(shifted * e, 1)


@triton.jit
def _masked(
    logits, ids, columns, last, vocab, banned, banned_at, banned_count, excluded, excluded_at, excluded_count, bad,
    temperature, seed, position, step, SAMPLE: tl.constexpr,
):  # fmt: skip
    """Of any logits of ids before ``last``; with a temperature the one that is drawn wins."""
    bad = bad | tl.max(((logits < float("inf")) == 0).to(tl.int32), 1)
    logits = tl.where((columns < vocab)[None, :], logits, NEG_INF)
    is_banned, banned_at = _marked(banned, banned_at, banned_count, columns, last)
    is_excluded, excluded_at = _marked(excluded, excluded_at, excluded_count, columns, last)
    allowed = tl.where(is_banned[None, :], NEG_INF, logits)
    normal = tl.where(is_excluded[None, :], NEG_INF, logits)
    best, best_id = best_of(allowed, ids)
    second, second_id = best_of(tl.where(ids == best_id[:, None], NEG_INF, allowed), ids)
    if SAMPLE:
        won, token = best_of(allowed + temperature * _gumbel(seed, position, step, columns), ids)
        chosen = ids == token[:, None]
        logit = tl.where(token == NO_ID, NEG_INF, tl.sum(tl.where(chosen, logits, 0.0), 1))
    else:
        won, token, logit = best, best_id, best
        chosen = ids == best_id[:, None]
    is_out = tl.max((chosen & is_excluded[None, :]).to(tl.int32), 1) > 0
    inside = tl.where(is_out, NEG_INF, logit)
    others = tl.where(chosen, NEG_INF, normal)
    top = tl.max(others, 1)
    shifted = others - tl.where(top == NEG_INF, 0.0, top)[:, None]
    e = tl.exp(shifted)
    total, weighted = tl.sum(e, 1), tl.sum(tl.where(e > 0, shifted * e, 0.0), 1)
    return (
        won, token, logit, inside, best, best_id, second, second_id, top, total, weighted, bad, banned_at, excluded_at
    )  # fmt: skip


@triton.jit
def absorb(
    won, token, logit, inside, best, best_id, second, second_id, top, total, weighted, bad, banned_at, excluded_at,
    logits, first, vocab, banned, banned_count, excluded, excluded_count, probe_ids, probe_logits, r, live,
    temperature, seed, position, step,
    PROBES: tl.constexpr, SAMPLE: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """The partial states with the logits [ROWS, PART] of ids ``first`` on; and the places in the lists of ids."""
    columns = first + tl.arange(0, PART)
    last = first + PART
    ids = tl.broadcast_to(columns[None, :], [ROWS, PART])
    if PROBES > 0:
        for p in tl.static_range(PROBES):
            wanted = tl.load(probe_ids + r.to(tl.int64) * PROBES + p, mask=live, other=-1)
            hit = ids == wanted[:, None]
            value = tl.sum(tl.where(hit, logits, 0.0), 1)
            there = live & (wanted < vocab) & (tl.max(hit.to(tl.int32), 1) > 0)
            tl.store(probe_logits + r * PROBES + p, value, mask=there)
    special = (last > vocab) | SAMPLE
    if banned_at < banned_count:
        special = special | (tl.load(banned + banned_at) < last)
    if excluded_at < excluded_count:
        special = special | (tl.load(excluded + excluded_at) < last)
    if special:
        (
            part_won, part_token, part_logit, part_inside, part_best, part_best_id, part_second, part_second_id,
            part_top, part_total, part_weighted, bad, banned_at, excluded_at,
        ) = _masked(
            logits, ids, columns, last, vocab, banned, banned_at, banned_count, excluded, excluded_at, excluded_count,
            bad, temperature, seed, position, step, SAMPLE,
        )  # fmt: skip
    else:
        part_best, part_best_id, part_second, part_second_id, part_total, part_weighted = _greedy(logits, ids)
        bad = bad | ((part_total != part_total) | (part_best == float("inf"))).to(tl.int32)
        part_won, part_token, part_logit, part_inside = part_best, part_best_id, part_best, part_best
        part_top = part_second

    # later ids win only if better; the loser joins the rest
    newer = part_won > (won if SAMPLE else best)
    loser = tl.where(newer, inside, part_inside)
    top, total, weighted = add_rest(top, total, weighted, part_top, part_total, part_weighted)
    top, total, weighted = add_rest(top, total, weighted, loser, tl.where(loser == NEG_INF, 0.0, 1.0), 0.0)
    inside = tl.where(newer, part_inside, inside)
    if SAMPLE:
        won, token = tl.where(newer, part_won, won), tl.where(newer, part_token, token)
        logit = tl.where(newer, part_logit, logit)
    newer = part_best > best
    runner, runner_id = tl.where(newer, best, second), tl.where(newer, best_id, second_id)
    rival, rival_id = tl.where(newer, part_second, part_best), tl.where(newer, part_second_id, part_best_id)
    second, second_id = tl.maximum(runner, rival), tl.where(rival > runner, rival_id, runner_id)
    best, best_id = tl.where(newer, part_best, best), tl.where(newer, part_best_id, best_id)
    return (
        won, token, logit, inside, best, best_id, second, second_id, top, total, weighted, bad, banned_at, excluded_at
    )  # fmt: skip

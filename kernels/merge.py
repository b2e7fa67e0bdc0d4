"""After the partial states of the decode step: merge each row's, then select, commit and end the text."""

from __future__ import annotations

import triton
import triton.language as tl

from dllm_engine.kernels.position_filter import position_filter

NEG_INF = tl.constexpr(float("-inf"))
NO_ID = tl.constexpr(2**31 - 1)
PROGRESS = tl.constexpr(6)  # columns of DecodeState.progress


@triton.jit
def add_rest(top, total, weighted, top2, total2, weighted2):
    """Merge two parts (m, Σe^(x−m), Σ(x−m)e^(x−m)) of a normaliser; an empty part has m = −inf and sums 0."""
    m = tl.maximum(top, top2)
    shift = tl.where(top == NEG_INF, 0.0, top - m)
    shift2 = tl.where(top2 == NEG_INF, 0.0, top2 - m)
    scale, scale2 = tl.exp(shift), tl.exp(shift2)
    weighted = (weighted + shift * total) * scale + (weighted2 + shift2 * total2) * scale2
    return m, total * scale + total2 * scale2, weighted


@triton.jit
def best_of(values, ids):
    """Largest value of each row and the lowest id that has it; NO_ID for a row of −inf."""
    best = tl.max(values, 1)
    first = tl.min(tl.where(values == best[:, None], ids, NO_ID), 1)
    return best, tl.where(best == NEG_INF, NO_ID, first)


@triton.jit
def _merge_rows(floats, ints, out_ids, out_values, r, live, count, segments, SEGMENTS: tl.constexpr):
    """Merge the partial states of rows ``r`` and write their statistics. All segments at once: a fixed order."""
    s = tl.arange(0, SEGMENTS)
    at = r[:, None] * segments + s[None, :]
    mask = live[:, None] & (s < segments)[None, :]
    size = segments * count
    won = tl.load(floats + at, mask=mask, other=NEG_INF)
    inside = tl.load(floats + 2 * size + at, mask=mask, other=NEG_INF)
    tokens = tl.load(ints + at, mask=mask, other=NO_ID)
    _, token = best_of(won, tokens)
    chosen = tokens == token[:, None]
    chosen = chosen & (token != NO_ID)[:, None]
    logit = tl.max(tl.where(chosen, tl.load(floats + size + at, mask=mask, other=NEG_INF), NEG_INF), 1)
    own_inside = tl.max(tl.where(chosen, inside, NEG_INF), 1)

    losers = tl.where(chosen, NEG_INF, inside)
    top = tl.load(floats + 5 * size + at, mask=mask, other=NEG_INF)
    total = tl.load(floats + 6 * size + at, mask=mask, other=0.0)
    weighted = tl.load(floats + 7 * size + at, mask=mask, other=0.0)
    top, total, weighted = add_rest(top, total, weighted, losers, tl.where(losers == NEG_INF, 0.0, 1.0), 0.0)
    m = tl.max(top, 1)
    shift = tl.where(top == NEG_INF, 0.0, top - m[:, None])
    scale = tl.exp(shift)
    weighted = tl.sum((weighted + shift * total) * scale, 1)
    total = tl.sum(total * scale, 1)
    rest = m + tl.log(total)
    log_odds = tl.where(own_inside == NEG_INF, NEG_INF, own_inside - rest)
    all_top, all_total, all_weighted = add_rest(
        m, total, weighted, own_inside, tl.where(own_inside == NEG_INF, 0.0, 1.0), 0.0
    )

    bests = tl.load(floats + 3 * size + at, mask=mask, other=NEG_INF)
    best_ids = tl.load(ints + size + at, mask=mask, other=NO_ID)
    best, best_id = best_of(bests, best_ids)
    own = best_ids == best_id[:, None]
    seconds = tl.where(own, tl.load(floats + 4 * size + at, mask=mask, other=NEG_INF), bests)
    second_ids = tl.where(own, tl.load(ints + 2 * size + at, mask=mask, other=NO_ID), best_ids)
    second, second_id = best_of(seconds, second_ids)
    took_best = best_id == token
    other, other_id = tl.where(took_best, second, best), tl.where(took_best, second_id, best_id)
    bad = tl.max(tl.load(ints + 3 * size + at, mask=mask, other=0), 1) > 0

    tl.store(out_ids + r, tl.where(bad | (token == NO_ID), -1, token).to(tl.int64), mask=live)
    tl.store(out_ids + count + r, tl.where(other == NEG_INF, -1, other_id).to(tl.int64), mask=live)
    tl.store(out_values + r, logit, mask=live)
    tl.store(out_values + count + r, other, mask=live)
    tl.store(out_values + 2 * count + r, all_top + tl.log(all_total), mask=live)
    tl.store(out_values + 3 * count + r, log_odds, mask=live)
    tl.store(out_values + 4 * count + r, tl.log(all_total) - all_weighted / all_total, mask=live)


@triton.jit
def _among(token, ids, count):
    """bool like ``token``: which of them are one of ``count`` ids."""
    found = token < -1
    for e in range(count):
        found = found | (token == tl.load(ids + e))
    return found


@triton.jit
def _before(
    odds, token, undecided, score, i, width, after, waiting_ids, waiting_count, WIDTH: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """How many undecided positions right of ``after`` rank before each; only those with a waiting id, if there are."""
    count = tl.zeros([WIDTH], tl.int32)
    for first in range(0, width, CHUNK):
        j = first + tl.arange(0, CHUNK)
        there = (j > after) & (j < width)
        there = there & (tl.load(undecided + j, mask=there, other=0) != 0)
        if waiting_count > 0:
            there = there & _among(tl.load(token + j, mask=there, other=-1), waiting_ids, waiting_count)
        other = ranked(tl.load(odds + j, mask=there, other=NEG_INF))
        before = (other[None, :] > score[:, None]) | ((other[None, :] == score[:, None]) & (j[None, :] < i[:, None]))
        count += tl.sum((before & there[None, :]).to(tl.int32), 1)
    return count


@triton.jit
def ranked(odds):
    """An undecided score of -inf or NaN still ranks before every decided position."""
    least = -3.4028234663852886e38
    return tl.where(odds >= least, odds, least)


# Not specialised below: numbers that change from call to call, or a new length of a prompt might wait for a compiler.
@triton.jit(do_not_specialize=["count", "segments", "width", "length"])
def finish_rows(
    floats, ints, out_ids, out_values, sequences, undecided, progress, count, segments, width, length,
    STEP: tl.constexpr, ALL_ROWS: tl.constexpr, SEGMENTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Statistics of some rows; in a step that needs no others, of the undecided ones among them."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = r < count
    if STEP and not ALL_ROWS:
        b = tl.load(sequences + r // width, mask=live, other=0)
        column = tl.load(progress + b * PROGRESS, mask=live, other=0) + r % width
        live = live & (tl.load(undecided + b * length + column, mask=live, other=0) != 0)
    _merge_rows(floats, ints, out_ids, out_values, r, live, count, segments, SEGMENTS)


@triton.jit(
    do_not_specialize=[
        "count", "width", "length", "prompt_length", "block_length", "fill_id", "end_count", "waiting_count"
    ]
)  # fmt: skip
def finish_step(
    out_ids, out_values, sequences, tokens, undecided, predicted, progress, quota, bounds, weights, end_ids,
    waiting_ids, count, width, length, prompt_length, block_length, fill_id, cut, end_count, waiting_count,
    DECIDED_IS_ONE: tl.constexpr, POSITION: tl.constexpr, FILTER: tl.constexpr, FILTER_PAD: tl.constexpr,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    """One sequence: select, commit, end of text, progress. `reference.commit_` is the definition."""
    call_row = tl.program_id(0)
    b = tl.load(sequences + call_row)
    progress += b * PROGRESS
    tokens += b * length
    undecided += b * length
    predicted += b * length
    start, old_end = tl.load(progress), tl.load(progress + 1)
    # rows that fill up a call are all the same one, which ends where it begins: it may not move on under the others
    active = start < old_end
    width = tl.where(active, width, 0)
    step_in_block, failed_before = tl.load(progress + 2), tl.load(progress + 3)

    i = tl.arange(0, WIDTH)
    open_ = (i < width) & (tl.load(undecided + start + i, mask=i < width, other=0) != 0)
    row_ids, row_odds = out_ids + call_row * width, out_values + 3 * count + call_row * width
    token = tl.load(row_ids + i, mask=open_, other=0)
    odds = tl.load(row_odds + i, mask=i < width, other=NEG_INF)
    failed = open_ & ((token < 0) | (odds != odds))
    failed_at = tl.min(tl.where(failed, start + i, length), 0)

    if POSITION:
        row = out_values + call_row * width  # logit, second_logit, logsumexp, log_odds, entropy
        stable = token == tl.load(predicted + start + i, mask=open_, other=-1)
        out = position_filter(
            row_odds, row, row + count, row + 4 * count, undecided + start, stable, i, open_,
            tl.minimum(old_end - start, width), weights, FILTER, WIDTH, CHUNK,
        )  # fmt: skip
        chosen = open_ & (out > cut)
    elif FILTER > 0:
        f = tl.arange(0, FILTER_PAD)
        seen = (f < FILTER) & (f < width) & (start + f < old_end)
        value = tl.load(row_odds + f, mask=seen, other=0.0).to(tl.float64)
        confidence = (1.0 / (1.0 + tl.exp(-value))).to(tl.float32)
        if DECIDED_IS_ONE:
            is_open = tl.load(undecided + start + f, mask=seen, other=0) != 0
            confidence = tl.where(is_open, confidence, 1.0)
        confidence = tl.where(seen, confidence, 0.0).to(tl.float64)
        square = f[:, None] * FILTER + f[None, :]
        inside = (f < FILTER)[:, None] & (f < FILTER)[None, :]
        w = tl.load(weights + square, mask=inside, other=0.0).to(tl.float64)
        layer = tl.sum(w * confidence[None, :], 1)
        layer = tl.maximum(
            layer + tl.load(weights + FILTER * FILTER + f, mask=f < FILTER, other=0.0).to(tl.float64), 0.0
        )
        second = weights + FILTER * FILTER + FILTER
        w = tl.load(
            second + i[:, None] * FILTER + f[None, :], mask=(i < width)[:, None] & (f < FILTER)[None, :], other=0.0
        )
        out = tl.sum(w.to(tl.float64) * layer[None, :], 1)
        out += tl.load(second + FILTER * FILTER + i, mask=i < width, other=0.0).to(tl.float64)
        chosen = open_ & (out > cut)
    score = ranked(odds)
    rank = _before(row_odds, row_ids, undecided + start, score, i, width, -1, waiting_ids, 0, WIDTH, CHUNK)
    if FILTER == 0:
        bound = tl.load(bounds + rank, mask=open_, other=float("inf"))
        chosen = open_ & (rank < tl.max(tl.where(open_ & (odds >= bound), rank + 1, 0), 0))

    # ids that wait: behind an undecided position that the rule leaves they do not rank, behind one that the quota
    # leaves too they are not committed
    waits = _among(token, waiting_ids, waiting_count)
    left_out = tl.min(tl.where(open_ & (chosen == 0), i, WIDTH), 0)
    if waiting_count > 0:
        rank -= _before(
            row_odds, row_ids, undecided + start, score, i, width, left_out, waiting_ids, waiting_count, WIDTH, CHUNK
        )
    ranks = open_ & ((waits == 0) | (i <= left_out))
    chosen = chosen | (ranks & (rank < tl.load(quota + step_in_block)))
    gap = tl.min(tl.where(open_ & (chosen == 0), i, WIDTH), 0)
    chosen = chosen & ((waits == 0) | (i <= gap)) & (failed == 0)
    tl.debug_barrier()  # everyone has read `undecided` and `predicted`

    tl.store(tokens + start + i, token, mask=chosen)
    tl.store(undecided + start + i, 0, mask=chosen)
    tl.store(predicted + start + i, token, mask=open_)
    end = tl.min(tl.where(chosen & _among(token, end_ids, end_count), start + i + 1, old_end), 0)
    tl.debug_barrier()
    for first in range(end, old_end, LINE):
        c = first + tl.arange(0, LINE)
        tl.store(tokens + c, tl.full([LINE], 0, tl.int64) + fill_id, mask=c < old_end)
        tl.store(undecided + c, 0, mask=c < old_end)
    step = tl.load(progress + 4)
    tl.debug_barrier()
    still, still_here = tl.zeros([LINE], tl.int32), tl.zeros([LINE], tl.int32)
    for first in range(prompt_length, length, LINE):
        c = first + tl.arange(0, LINE)
        here = tl.load(undecided + c, mask=c < end, other=0).to(tl.int32)
        still += here
        still_here += tl.where((c >= start) & (c < start + width), here, 0)
    left, in_block = tl.sum(still, 0), tl.sum(still_here, 0)
    if active:  # no mask: the interpreter of Triton 3.2 takes a scalar one that is false for none
        tl.store(progress, tl.where(in_block > 0, start, start + block_length))
        tl.store(progress + 1, end)
        tl.store(progress + 2, tl.where(in_block > 0, step_in_block + 1, 0))
        tl.store(progress + 3, tl.minimum(failed_before, failed_at))
        tl.store(progress + 4, step + 1)
        tl.store(progress + 5, left.to(tl.int64))

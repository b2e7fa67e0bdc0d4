"""The decode step in Triton: partial states of the rows, their merge and, for a step, the commit, a launch each.

`dllm_engine.reference` defines what is computed. Runs on CUDA devices, and on CPUs under ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dllm_engine import kernel_limits
from dllm_engine.kernel_limits import interpreted, release
from dllm_engine.kernels.absorb import absorb, first_at
from dllm_engine.kernels.merge import NEG_INF, NO_ID, PROGRESS, finish_rows, finish_step
from dllm_engine.kernels.tiles import BUSY, NARROW, PRECISE, PRECISE_BUSY, WIDE, Config, candidates
from dllm_engine.step import Step

COPIES = release(triton.__version__) >= (3, 6)  # the oldest that this has run with
if COPIES:
    from triton.tools.tensor_descriptor import TensorDescriptor

# Ids whose state is kept apart, and how many of them are added to it at once: fixed, so that tiles of other sizes (for
# other numbers of rows) change a result by rounding within a part at most. Small parts also bound the registers: the
# products of a tile stay in theirs.
SEGMENT, PART = 512, 64
FLOATS = 8  # fields of a partial state: won, logit, inside, best, second, top, total, weighted
INTS = 4  # token, best_id, second_id, bad


@triton.jit
def _halves(x, ROWS: tl.constexpr, IDS: tl.constexpr):
    """Left and right half of the columns of ``x`` [ROWS, IDS]."""
    return tl.split(tl.permute(tl.reshape(x, (ROWS, 2, IDS // 2)), (0, 2, 1)))


@triton.jit
def _part(x, part: tl.constexpr, ROWS: tl.constexpr, IDS: tl.constexpr, PART: tl.constexpr):
    """Columns from ``part * PART`` on, ``PART`` of them, of ``x`` [ROWS, IDS]: a whole, half or quarter of it."""
    if IDS == 4 * PART:
        left, right = _halves(x, ROWS, IDS)
        x = left if part < 2 else right
    if IDS >= 2 * PART:
        left, right = _halves(x, ROWS, 2 * PART)
        x = left if part % 2 == 0 else right
    return x


@triton.jit(
    do_not_specialize=[
        "count", "hidden_rows", "banned_count", "excluded_count", "width", "length", "prompt_length"
    ]
)  # fmt: skip
def _score_rows(
    hidden, head, hidden_tiles, head_tiles, rows, banned, excluded, probe_ids, probe_logits, noise_keys, sequences,
    undecided, progress, seeds, floats, ints,
    dim, vocab, count, hidden_rows, hidden_stride, head_stride, banned_count, excluded_count, temperature,
    width, length, prompt_length,
    PROBES: tl.constexpr, SAMPLE: tl.constexpr, STEP: tl.constexpr, ALL_ROWS: tl.constexpr, UPCAST: tl.constexpr,
    COPIED: tl.constexpr, SEGMENT: tl.constexpr, ROWS: tl.constexpr, IDS: tl.constexpr, DEPTH: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """Partial states of a tile of rows over one segment of the vocabulary.

    COPIED: rows follow each other, and the copy engine of sm_90 brings tiles of them and of the head.
    """
    segment, segments = tl.program_id(1), tl.num_programs(1)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = r < count
    if STEP:
        row = r
        b = tl.load(sequences + r // width, mask=live, other=0)
        column = tl.load(progress + b * PROGRESS, mask=live, other=0) + r % width
        if not ALL_ROWS:
            live = live & (tl.load(undecided + b * length + column, mask=live, other=0) != 0)
            if tl.max(live.to(tl.int32), 0) == 0:
                return
    else:
        row = tl.load(rows + r, mask=live, other=0)
    inside_rows = (row >= 0) & (row < hidden_rows)
    if SAMPLE:
        if STEP:
            seed = tl.load(seeds + b, mask=live, other=0)
            position = column - prompt_length
            step = tl.load(progress + b * PROGRESS + 4, mask=live, other=0)
        else:
            seed = tl.load(noise_keys + r * 3, mask=live, other=0)
            position = tl.load(noise_keys + r * 3 + 1, mask=live, other=0)
            step = tl.load(noise_keys + r * 3 + 2, mask=live, other=0)
    else:
        seed, position, step = 0, 0, 0

    none = tl.full([ROWS], NEG_INF, tl.float32)
    nobody = tl.full([ROWS], NO_ID, tl.int32)
    won, logit, inside, best, second, top = none, none, none, none, none, none
    total, weighted = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    token, best_id, second_id = nobody, nobody, nobody
    bad = tl.where(live & (inside_rows == 0), 1, 0)
    base = hidden + row.to(tl.int64) * hidden_stride
    readable = (live & inside_rows)[:, None]
    begin = segment * SEGMENT
    end = tl.minimum(begin + SEGMENT, vocab)
    banned_at = first_at(banned, banned_count, begin)
    excluded_at = first_at(excluded, excluded_count, begin)

    # one loop over all tiles and depths, so that a tile's statistics are taken while the next one comes in
    first, k = begin, 0
    logits = tl.zeros([ROWS, IDS], tl.float32)
    for _ in range(tl.cdiv(end - begin, IDS) * tl.cdiv(dim, DEPTH)):
        at = k + tl.arange(0, DEPTH)
        columns = first + tl.arange(0, IDS)
        if COPIED:
            x = hidden_tiles.load([tl.program_id(0) * ROWS, k])
            w = head_tiles.load([first, k])
        else:
            x = tl.load(base[:, None] + at[None, :], mask=readable & (at < dim)[None, :], other=0.0)
            weights = head + columns.to(tl.int64)[:, None] * head_stride
            w = tl.load(weights + at[None, :], mask=(columns < vocab)[:, None] & (at < dim)[None, :], other=0.0)
        if UPCAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        logits = tl.dot(x, tl.trans(w), logits, input_precision="ieee")
        last = k + DEPTH >= dim
        if last:
            for part in tl.static_range(IDS // PART):
                (
                    won, token, logit, inside, best, best_id, second, second_id, top, total, weighted, bad, banned_at,
                    excluded_at,
                ) = absorb(
                    won, token, logit, inside, best, best_id, second, second_id, top, total, weighted, bad, banned_at,
                    excluded_at, _part(logits, part, ROWS, IDS, PART), first + part * PART, vocab, banned,
                    banned_count, excluded, excluded_count, probe_ids, probe_logits, r, live, temperature, seed,
                    position, step, PROBES, SAMPLE, ROWS, PART,
                )  # fmt: skip
            logits = tl.zeros([ROWS, IDS], tl.float32)
        first = tl.where(last, first + IDS, first)
        k = tl.where(last, 0, k + DEPTH)

    if not SAMPLE:
        won, token, logit = best, best_id, best
    out = r * segments + segment  # a row's parts lie side by side, as the merge reads them
    size = segments * count
    tl.store(floats + out, won, mask=live)
    tl.store(floats + size + out, logit, mask=live)
    tl.store(floats + 2 * size + out, inside, mask=live)
    tl.store(floats + 3 * size + out, best, mask=live)
    tl.store(floats + 4 * size + out, second, mask=live)
    tl.store(floats + 5 * size + out, top, mask=live)
    tl.store(floats + 6 * size + out, total, mask=live)
    tl.store(floats + 7 * size + out, weighted, mask=live)
    tl.store(ints + out, token, mask=live)
    tl.store(ints + size + out, best_id, mask=live)
    tl.store(ints + 2 * size + out, second_id, mask=live)
    tl.store(ints + 3 * size + out, bad, mask=live)


def copied(hidden: Tensor, head: Tensor, count: int) -> bool:
    """Whether the copy engine of sm_90 is to bring tiles of ``count`` rows that follow each other, and of the head.
    With 16 and fewer it is no faster."""
    if not COPIES or interpreted() or head.device.type not in kernel_limits.devices():
        return False
    if hidden.dtype != head.dtype or head.dtype == torch.float32:
        return False
    aligned = all(m.data_ptr() % 16 == 0 == m.stride(0) * m.itemsize % 16 for m in (hidden, head))
    return count > 16 and aligned and torch.cuda.get_device_capability(head.device)[0] == 9


def config_for(
    hidden: Tensor, head: Tensor, count: int, upcast: bool, extras: bool, consecutive: bool = False
) -> Config:
    """The fixed choice for so many rows; with ``DLLM_AUTOTUNE=1`` the fastest measured, once a shape and process.
    extras: noise or probes, whose registers only a smaller tile leaves free."""
    if upcast or head.dtype == torch.float32:
        return PRECISE_BUSY if extras else PRECISE
    if extras:
        table = BUSY
    elif os.environ.get("DLLM_AUTOTUNE", "0") == "1" and not interpreted():
        return tune(hidden, head, count, consecutive)
    else:
        table = WIDE if interpreted() or torch.cuda.get_device_capability(head.device)[0] in (9, 10) else NARROW
    return next(config for rows, config in table.items() if rows is None or count <= rows)


def row_stats(
    hidden: Tensor,
    lm_head: Tensor,
    rows: Tensor,
    banned_ids: Tensor,
    excluded_ids: Tensor,
    probe_ids: Tensor,
    temperature: float,
    noise_keys: Tensor,
) -> tuple[Tensor, ...]:
    """Fields of `RowStats` in order; `ops.row_stats` describes the arguments."""
    count, device = len(rows), hidden.device
    ids = torch.empty(2, count, dtype=torch.int64, device=device)
    values = torch.empty(5, count, dtype=torch.float32, device=device)
    probes = torch.full(probe_ids.shape, -torch.inf, dtype=torch.float32, device=device)  # of ids that there are not
    if count:
        with torch.cuda.device_of(hidden):  # Triton launches on the current one
            parts = _score(
                hidden, lm_head, count, rows, banned_ids, excluded_ids, probe_ids, probes, temperature, noise_keys
            )
            _finish_rows(parts, ids, values)
    token, second_token = ids
    logit, second_logit, logsumexp, log_odds, entropy = values
    fields = (token, logit, second_token, second_logit, logsumexp, log_odds, entropy)
    return *(field.clone() for field in fields), probes  # results of a registered op may not share memory


def decode_step_(step: Step) -> None:
    """Score, decide and commit."""
    batch, width, dim = step.hidden.shape
    count, none = batch * width, step.stat_ids.view(-1)[:0]
    with torch.cuda.device_of(step.hidden):
        parts = _score(
            step.hidden.view(count, dim), step.lm_head, count, none, step.banned_ids, step.excluded_ids,
            none.view(count, 0), step.stat_values, step.temperature, none, step,
        )  # fmt: skip
        _finish_rows(parts, step.stat_ids, step.stat_values, step)
        finish_step[(batch,)](
            step.stat_ids, step.stat_values, step.sequences, step.tokens, step.undecided.view(torch.uint8),
            step.predicted, step.progress, step.quota, step.bounds, step.weights, step.end_ids, step.waiting_ids,
            count, width, step.tokens.shape[1], step.prompt_length, len(step.quota), step.fill_id, step.cut,
            len(step.end_ids), len(step.waiting_ids), DECIDED_IS_ONE=step.decided_is_one, POSITION=step.position,
            FILTER=step.filter_length, FILTER_PAD=_padded(step.filter_length), WIDTH=_padded(width), CHUNK=32,
            LINE=2048, num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip


def _of_step(step: Step | None, none: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...], dict[str, bool]]:
    """What kernels take of a step: tensors (sequences, undecided, progress, seeds), sizes (width, length,
    prompt_length) and constants; without one ``none``, which is not read.
    """
    if step is None:
        return (none,) * 4, (1, 1, 0), {"STEP": False, "ALL_ROWS": True}
    tensors = step.sequences, step.undecided.view(torch.uint8), step.progress, step.seeds
    sizes = step.hidden.shape[1], step.tokens.shape[1], step.prompt_length
    return tensors, sizes, {"STEP": True, "ALL_ROWS": step.all_rows}


def _finish_rows(parts: tuple[Tensor, Tensor], ids: Tensor, values: Tensor, step: Step | None = None) -> None:
    """Merge partial states. A launch of its own: the few programs that commit would take long over all rows. A warp
    has a row, so that its reductions need no shared memory.
    """
    _, count, segments = parts[0].shape
    tensors, sizes, constants = _of_step(step, ids)
    rows = 4 if interpreted() else 1  # which takes its time for each program
    finish_rows[(triton.cdiv(count, rows),)](
        *parts, ids, values, *tensors[:3], count, segments, *sizes[:2], **constants,
        SEGMENTS=_padded(segments), ROWS=rows, num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip


def _score(
    hidden: Tensor, head: Tensor, count: int, rows: Tensor, banned: Tensor, excluded: Tensor, probe_ids: Tensor,
    probe_logits: Tensor, temperature: float, noise_keys: Tensor, step: Step | None = None,
    config: Config | None = None, consecutive: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Partial states [fields, count, segments] of all rows. consecutive: ``rows`` are 0, 1, …, as those of a step."""
    segments = triton.cdiv(len(head), SEGMENT)
    floats = torch.empty(FLOATS, count, segments, dtype=torch.float32, device=head.device)
    ints = torch.empty(INTS, count, segments, dtype=torch.int32, device=head.device)
    tensors, sizes, constants = _of_step(step, rows[:0])
    # the interpreter multiplies the bits of bfloat16 as integers
    upcast = hidden.dtype != head.dtype or (interpreted() and head.dtype == torch.bfloat16)
    extras, consecutive = temperature > 0 or probe_ids.shape[1] > 0, consecutive or step is not None
    config = config or config_for(hidden, head, count, upcast, extras, consecutive)
    by_engine = consecutive and not extras and copied(hidden, head, count)
    tiles = [(hidden, config.rows), (head, config.ids)]
    # tiles of rows side by side: those of a segment run together, and all but the first find its weights in L2
    _score_rows[(triton.cdiv(count, config.rows), segments)](
        hidden, head, *(TensorDescriptor.from_tensor(m, [n, config.depth]) if by_engine else m for m, n in tiles),
        rows, banned, excluded, probe_ids, probe_logits, noise_keys, *tensors, floats, ints,
        head.shape[1], len(head), count, len(hidden), hidden.stride(0), head.stride(0), len(banned), len(excluded),
        temperature, *sizes, **constants, PROBES=probe_ids.shape[1], SAMPLE=temperature > 0,
        UPCAST=upcast, COPIED=by_engine, SEGMENT=SEGMENT, ROWS=config.rows, IDS=config.ids, DEPTH=config.depth,
        PART=PART, num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,  # Triton's default changes
    )  # fmt: skip
    return floats, ints


_tuned: dict[tuple[Any, ...], Config] = {}


def tune(hidden: Tensor, head: Tensor, count: int, consecutive: bool) -> Config:
    """The fastest of the `candidates` for this shape."""
    key = (*head.shape, head.dtype, hidden.dtype, _padded(count), consecutive)
    if key not in _tuned:
        none = torch.empty(0, dtype=torch.int64, device=head.device)
        ids, rows = none.int(), torch.arange(count, dtype=torch.int32, device=head.device)
        given = hidden, head, count, rows, ids, ids, none.view(count, 0), none, 0.0, none
        times: dict[Config, float] = {}
        for config in candidates(count):
            call = functools.partial(_score, *given, config=config, consecutive=consecutive)
            try:
                times[config] = triton.testing.do_bench(call, return_mode="median")
            except triton.runtime.errors.OutOfResources:
                continue
        _tuned[key] = min(times, key=times.__getitem__)
    return _tuned[key]


def _padded(n: int) -> int:
    return max(1, triton.next_power_of_2(n))

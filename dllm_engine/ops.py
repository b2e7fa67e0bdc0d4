"""The registered ops: schema, checks, fake kernels. The only module that names ``torch.library``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dllm_engine import backends
from dllm_engine.noise import LARGEST
from dllm_engine.rules import MAX_FILTER, Rule
from dllm_engine.state import BlockState, DecodeState
from dllm_engine.stats import RowStats
from dllm_engine.step import Step, empty_fields

MAX_PROBES = 8
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

_LIBRARY = torch.library.Library("dllm", "DEF")  # kept alive: registrations end with it
_LIBRARY.define(
    "row_stats(Tensor hidden, Tensor lm_head, Tensor rows, Tensor banned_ids, Tensor excluded_ids, Tensor probe_ids,"
    " float temperature, Tensor noise_keys, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "decode_step_(Tensor hidden, Tensor lm_head, Tensor sequences, Tensor(a!) tokens, Tensor(b!) undecided,"
    " Tensor(c!) predicted, Tensor(d!) progress, Tensor seeds, Tensor quota, Tensor bounds, Tensor weights,"
    " Tensor(e!) stat_ids, Tensor(f!) stat_values, Tensor banned_ids, Tensor excluded_ids, Tensor end_ids,"
    " Tensor waiting_ids, int prompt_length, int fill_id, float temperature, int filter_length, float cut,"
    " bool decided_is_one, bool position, bool all_rows, str backend) -> ()"
)


def row_stats(
    hidden: Tensor,
    lm_head: Tensor,
    rows: Tensor,
    *,
    banned_ids: Sequence[int] | Tensor = (),
    excluded_ids: Sequence[int] | Tensor = (),
    probe_ids: Tensor | None = None,
    temperature: float = 0.0,
    noise_keys: Tensor | None = None,
    backend: str = "auto",
    values_known: bool = False,
) -> RowStats:
    """Statistics of the rows ``hidden[rows] @ lm_head.T``; the logits themselves are never in memory.

    Args:
        hidden: [N, D] float32, bfloat16 or float16, unit stride along D. lm_head: [V, D], likewise; the two types may
            differ. Sums are float32 or better.
        rows: int32 (or int64) [R], indices into ``hidden``, in any order.
        banned_ids: ids never chosen, nor runner-up; they stay in the normaliser. A tensor is one of `id_tensor`.
        excluded_ids: ids left out of the normaliser; a chosen one gets confidence 0.
        probe_ids: int64 [R, K], K at most 8: ids whose logits are wanted.
        temperature: draw ``token`` from softmax(logits / temperature); 0 takes the best.
        noise_keys: int64 [R, 3], needed with a temperature: seed, position and step of the row's sequence.
        backend: ``"auto"`` or a name of `backends.BACKENDS`.
        values_known: the caller made ``rows`` and ``probe_ids`` itself; their values are not looked at.

    Raises:
        TypeError, ValueError: a bad argument, naming it. RuntimeError: a named backend that cannot run here.
    """
    _check_matrices(hidden, lm_head)
    count, device = _check_rows(rows, hidden)
    _check_temperature(temperature)
    if probe_ids is None:
        probe_ids = torch.empty(count, 0, dtype=torch.int64, device=device)
    each = probe_ids.shape[-1] if isinstance(probe_ids, Tensor) and probe_ids.ndim else 0
    _check(probe_ids, "probe_ids", torch.int64, device, (count, each))
    if probe_ids.shape[1] > MAX_PROBES:
        raise ValueError(f"probe_ids: {probe_ids.shape[1]} a row given; at most {MAX_PROBES}")
    if noise_keys is None:
        if temperature > 0:
            raise ValueError("noise_keys: needed with a temperature, none given")
        noise_keys = torch.empty(0, 3, dtype=torch.int64, device=device)
    else:
        _check(noise_keys, "noise_keys", torch.int64, device, (count, 3))
    # eager calls skip the dispatcher (6 µs), compiled ones go through it
    eager = _row_stats if values_known else _run_row_stats
    if rows.dtype == torch.int64 and not values_known:
        rows = rows.clamp(-1, 2**31 - 1)  # what is out of range stays so
    run = torch.ops.dllm.row_stats if torch.compiler.is_compiling() else eager
    return RowStats(
        *run(
            hidden,
            lm_head,
            rows.int().contiguous(),
            _ids(banned_ids, "banned_ids", lm_head),
            _ids(excluded_ids, "excluded_ids", lm_head),
            probe_ids.contiguous(),
            float(temperature),
            noise_keys.contiguous(),
            backends.resolve(backend, hidden, lm_head),
        )
    )


def decode_step_(
    hidden: Tensor,
    lm_head: Tensor,
    state: DecodeState,
    sequences: Tensor,
    rule: Rule,
    *,
    banned_ids: Sequence[int] | Tensor = (),
    excluded_ids: Sequence[int] | Tensor = (),
    end_ids: Tensor | None = None,
    temperature: float = 0.0,
    backend: str = "auto",
    known: bool = False,
) -> RowStats:
    """Score the rows of a block, decide by ``rule``, commit, end the text; ``state`` is changed in place.

    Args:
        hidden: [B', S, D], the first S rows of the blocks of ``sequences``. lm_head: [V, D].
        sequences: int64 [B'], different rows of ``state``; each has an undecided position.
        rule: see `rules.Rule`.
        banned_ids, excluded_ids, temperature, backend: as for `row_stats`.
        end_ids: int64 [E]; with them an end id committed at j ends the text there. None: end of text is off.
        known: `check_step` has passed on such arguments and the state is the engine's own: a step of a decode checks
            nothing again, and no value is looked at on the host.

    Returns:
        The statistics, fields [B', S]. Decided rows hold token 0 and log-odds −inf where a backend may leave them out.

    Raises:
        TypeError, ValueError: a bad argument, naming it. RuntimeError: a named backend that cannot run here.
    """
    if not known:
        check_step(hidden, lm_head, state, sequences, rule, end_ids=end_ids, temperature=temperature)
        backend = backends.resolve(backend, hidden, lm_head)
    batch, width, _ = hidden.shape
    device = hidden.device
    hidden = hidden.contiguous()
    if end_ids is None:
        end_ids = torch.empty(0, dtype=torch.int64, device=device)
    ids = torch.zeros(2, batch, width, dtype=torch.int64, device=device)
    values = torch.full((5, batch, width), -math.inf, dtype=torch.float32, device=device)
    eager = _decode_step_ if known else _run_decode_step_
    run = torch.ops.dllm.decode_step_ if torch.compiler.is_compiling() else eager
    run(
        hidden,
        lm_head,
        sequences.contiguous(),
        state.tokens,
        state.undecided,
        state.predicted,
        state.progress,
        state.seeds,
        state.quota,
        rule.bounds.contiguous(),
        rule.weights.contiguous(),
        ids,
        values,
        _ids(banned_ids, "banned_ids", lm_head),
        _ids(excluded_ids, "excluded_ids", lm_head),
        end_ids.contiguous(),
        state.end_ids if rule.ends_wait else state.end_ids[:0],
        state.prompt_length,
        state.fill_id,
        float(temperature),
        rule.filter_length,
        rule.cut,
        rule.decided_is_one,
        rule.position,
        rule.reads_decided,
        backend,
    )
    token, second_token = ids.unbind()
    logit, second_logit, logsumexp, log_odds, entropy = values.unbind()
    none = values.new_empty(batch, width, 0)
    return RowStats(token, logit, second_token, second_logit, logsumexp, log_odds, entropy, none)


def check_step(
    hidden: Tensor,
    lm_head: Tensor,
    state: DecodeState,
    sequences: Tensor,
    rule: Rule,
    *,
    end_ids: Tensor | None,
    temperature: float,
) -> None:
    """Raise TypeError or ValueError, naming it, for an argument that `decode_step_` cannot take."""
    if not isinstance(hidden, Tensor) or hidden.ndim != 3:
        given = list(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
        raise ValueError(f"hidden: {given} given; a tensor [B', S, D] is needed")
    batch, width, _ = hidden.shape
    device = hidden.device
    _check_matrices(hidden.contiguous().flatten(0, 1), lm_head)
    _check_temperature(temperature)
    _check(sequences, "sequences", torch.int64, device, (batch,))
    _check_state(state, device)
    if not 0 < width <= len(state.quota):
        raise ValueError(f"hidden: {width} rows a block given; 1 to the block length {len(state.quota)} allowed")
    _check(rule.bounds, "rule.bounds", torch.float32, device, (rule.bounds.numel(),))
    if len(rule.bounds) < width:
        raise ValueError(f"rule.bounds: {len(rule.bounds)} given; the block has {width} rows")
    size = rule.filter_length
    _check(rule.weights, "rule.weights", torch.float32, device, (rule.parameters,))
    least = 1 if rule.position else width
    if len(rule.weights) and not least <= size <= MAX_FILTER:
        raise ValueError(f"rule.weights: a filter of {size} given; a block of {width} needs {least} to {MAX_FILTER}")
    if device.type == "cpu" and not torch.compiler.is_compiling() and not rule.weights.isfinite().all():
        raise ValueError("rule.weights: values that are not finite")  # a filter file with such is refused when read
    if end_ids is not None:
        _check_list(end_ids, "end_ids", torch.int64, device)


def block_stats(
    hidden: Tensor,
    lm_head: Tensor,
    block: BlockState,
    *,
    reads_decided: bool,
    banned_ids: Tensor,
    excluded_ids: Tensor,
    temperature: float,
    backend: str,
    probe_ids: Tensor | None = None,
) -> RowStats:
    """`row_stats` of a block call, every field [B', S]: for policies that are no `Rule`.

    Args:
        hidden: [B', S, D]. block: the rows. reads_decided: whether decided rows are needed. On CPUs they are else not
            computed and hold token 0 and log-odds −inf. (On a GPU the host would have to know how many there are.)
        probe_ids: int64 [B', S, K], ids whose logits are wanted.
    """
    batch, width, _ = hidden.shape
    if probe_ids is not None and (probe_ids.ndim != 3 or probe_ids.shape[:2] != (batch, width)):
        raise ValueError(f"probe_ids: shape {list(probe_ids.shape)} given; [{batch}, {width}, K] is needed")
    keys = block.noise_keys.flatten(0, 1)
    some = not reads_decided and hidden.device.type == "cpu"
    if some:
        rows = block.undecided.flatten().nonzero()[:, 0]  # host: of a CPU: nothing to wait for, and rows are saved
    else:
        rows = torch.arange(batch * width, device=hidden.device)
    probes = None if probe_ids is None else probe_ids.flatten(0, 1)[rows]
    stats = row_stats(
        hidden.flatten(0, 1),
        lm_head,
        rows,
        probe_ids=probes,
        banned_ids=banned_ids,
        excluded_ids=excluded_ids,
        temperature=temperature,
        noise_keys=keys[rows] if temperature > 0 else None,
        backend=backend,
        values_known=True,
    )
    if some:

        def spread(field: Tensor, fill: float) -> Tensor:
            return field.new_full((batch * width, *field.shape[1:]), fill).index_copy(0, rows, field)

        stats = RowStats(*(spread(field, 0 if field.dtype == torch.int64 else -math.inf) for field in stats.fields()))
    return stats.reshape(batch, width)


# The op's arguments in the schema's order. A step of a decode comes in below the looks at values, which would wait for
# the device; a compiled call and a caller of its own come in above.


def _run_row_stats(*arguments: Any) -> tuple[Tensor, ...]:
    hidden, lm_head, rows, banned, excluded, probe_ids, *_ = arguments
    if rows.device.type == "cpu":  # values can be read without a wait; on a GPU the kernels guard themselves
        _in_range(rows, "rows", len(hidden))
        _in_range(probe_ids, "probe_ids", len(lm_head))
        _ascending(banned, "banned_ids", len(lm_head))
        _ascending(excluded, "excluded_ids", len(lm_head))
    return _row_stats(*arguments)


def _row_stats(*arguments: Any) -> tuple[Tensor, ...]:
    *tensors_and_numbers, backend = arguments
    return backends.BACKENDS[backend].row_stats(*tensors_and_numbers)


def _run_decode_step_(*arguments: Any) -> None:
    hidden, lm_head, sequences, tokens, _, _, progress, _, quota, _, _, _, _, banned, excluded, *_ = arguments
    if sequences.device.type == "cpu":
        _in_range(sequences, "sequences", len(tokens))
        if len(sequences.unique()) < len(sequences):
            raise ValueError(f"sequences: {sequences.tolist()} given; each may occur once")
        start = progress[sequences, 0]
        _in_range(start, "state.progress", tokens.shape[1] - hidden.shape[1] + 1)
        _in_range(progress[sequences, 2], "state.progress", len(quota))
        _ascending(banned, "banned_ids", len(lm_head))
        _ascending(excluded, "excluded_ids", len(lm_head))
    _decode_step_(*arguments)


def _decode_step_(*arguments: Any) -> None:
    *step, backend = arguments
    backends.BACKENDS[backend].decode_step_(Step(*step))


def _fake_row_stats(*arguments: Any) -> tuple[Tensor, ...]:
    _, _, rows, _, _, probe_ids, *_ = arguments
    return empty_fields(rows.shape[0], probe_ids, rows.device)


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("row_stats", _run_row_stats, _key)
    _LIBRARY.impl("decode_step_", _run_decode_step_, _key)
torch.library.register_fake("dllm::decode_step_", lambda *args: None, lib=_LIBRARY)
torch.library.register_fake("dllm::row_stats", _fake_row_stats, lib=_LIBRARY)


# -- checks -----------------------------------------------------------------------------------------------------------


def _check_matrices(hidden: Tensor, lm_head: Tensor) -> None:
    for name, matrix, shape in (("hidden", hidden, "[N, D]"), ("lm_head", lm_head, "[V, D]")):
        if not isinstance(matrix, Tensor):
            raise TypeError(f"{name}: {type(matrix).__name__} given; a tensor {shape} is needed")
        if matrix.ndim != 2:
            raise ValueError(f"{name}: shape {list(matrix.shape)} given; {shape} is needed")
        if matrix.dtype not in _FLOATS:
            raise TypeError(f"{name}: {matrix.dtype} given; float32, bfloat16 or float16 is needed")
        if matrix.shape[1] > 1 and matrix.stride(1) != 1:
            raise ValueError(f"{name}: stride {matrix.stride(1)} along D given; 1 is needed (call .contiguous())")
    if hidden.shape[1] != lm_head.shape[1]:
        raise ValueError(f"lm_head: width {lm_head.shape[1]} given; hidden has {hidden.shape[1]}")
    if lm_head.device != hidden.device:
        raise ValueError(f"lm_head: on {lm_head.device}, hidden on {hidden.device}; both must be on one device")
    if not (0 < lm_head.shape[0] < 2**31 and lm_head.shape[1] > 0):
        raise ValueError(f"lm_head: shape {list(lm_head.shape)} given; 1 to 2^31 − 1 ids and at least one column")


def _check_temperature(temperature: float) -> None:
    # a tuple: torch 2.6 cannot trace int | float
    if not (isinstance(temperature, (int, float)) and 0 <= temperature <= LARGEST):
        raise ValueError(f"temperature: {temperature!r} given; a finite number ≥ 0, at most {LARGEST:g}, is needed")


def _check_rows(rows: Tensor, hidden: Tensor) -> tuple[int, torch.device]:
    if not isinstance(rows, Tensor) or rows.dtype not in (torch.int32, torch.int64):
        given = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
        raise TypeError(f"rows: {given} given; an int32 tensor [R] is needed")
    if rows.ndim != 1:
        raise ValueError(f"rows: shape {list(rows.shape)} given; [R] is needed")
    if rows.device != hidden.device:
        raise ValueError(f"rows: on {rows.device}, hidden on {hidden.device}; both must be on one device")
    return rows.shape[0], rows.device


def _check(tensor: Tensor, name: str, dtype: torch.dtype, device: torch.device, shape: tuple[int, ...]) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype != dtype:
        given = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name}: {given} given; {dtype} is needed")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: shape {list(tensor.shape)} given; {list(shape)} is needed")
    if tensor.device != device:
        raise ValueError(f"{name}: on {tensor.device}; {device} is needed")


def _check_list(tensor: Tensor, name: str, dtype: torch.dtype, device: torch.device) -> None:
    _check(tensor, name, dtype, device, (tensor.numel() if isinstance(tensor, Tensor) else 0,))


def _check_state(state: DecodeState, device: torch.device) -> None:
    """Kernels get addresses of its tensors, and what they take them for."""
    canvas = state.batch, state.length
    for name, dtype, shape in (
        ("tokens", torch.int64, canvas),
        ("undecided", torch.bool, canvas),
        ("predicted", torch.int64, canvas),
        ("progress", torch.int64, (state.batch, 6)),
        ("seeds", torch.int64, (state.batch,)),
        ("quota", torch.int64, (state.block_length,)),
        ("end_ids", torch.int64, (len(state.end_ids),)),
    ):
        tensor = getattr(state, name)
        _check(tensor, f"state.{name}", dtype, device, shape)
        if not tensor.is_contiguous():
            raise ValueError(f"state.{name}: strides {list(tensor.stride())} given; a contiguous tensor is needed")


def _in_range(values: Tensor, name: str, limit: int) -> None:
    if values.numel() and (int(values.min()) < 0 or int(values.max()) >= limit):
        raise ValueError(f"{name}: {int(values.min())} to {int(values.max())} given; 0 to {limit - 1} allowed")


def _ascending(ids: Tensor, name: str, limit: int) -> None:
    """What a tensor of ids must be for kernels that read on in it."""
    _in_range(ids, name, limit)
    if not bool((ids[1:] > ids[:-1]).all()):
        raise ValueError(f"{name}: {ids.tolist()} given; ascending ids are needed, each once (ops.id_tensor)")


def id_tensor(ids: Sequence[int], device: torch.device) -> Tensor:
    """Ascending int32 [K] without repetitions: what `row_stats` takes for ``banned_ids`` without another check."""
    return torch.tensor(sorted(set(ids)), dtype=torch.int32, device=device)


def _ids(ids: Sequence[int] | Tensor, name: str, lm_head: Tensor) -> Tensor:
    if isinstance(ids, Tensor):  # made by `id_tensor`
        _check_list(ids, name, torch.int32, lm_head.device)
        return ids
    for i in ids:
        if not (isinstance(i, int) and 0 <= i < len(lm_head)):
            raise ValueError(f"{name}: {i!r} given; ids 0 to {len(lm_head) - 1} allowed")
    return id_tensor(ids, lm_head.device)

"""The one place where pointers leave Python for `_cuda`. Arguments have been checked by `ops`."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_engine.kernel_limits import too_old
from dllm_engine.step import Step, empty_fields, row_call

MISSING = ""  # why there is no `_cuda`
try:
    import dllm_engine._cuda as _cuda  # type: ignore[import-not-found]
except ImportError as error:  # no nvcc when it was installed
    MISSING = f"the compiled module _cuda is missing ({error}); run `DLLM_CUDA=1 pip install -e .` where nvcc is"

TYPES = torch.bfloat16, torch.float16

# Tickets by device, stream and size. The kernel leaves them zero, so that they are zeroed once; two launches at a time
# must not share them, so that each stream has its own. Sizes are powers of two, and none is ever freed.
_tickets: dict[tuple[int, int, int], Tensor] = {}


def refuses(hidden: Tensor, lm_head: Tensor) -> str:
    """Why the kernel cannot take these matrices (hidden [..., N, D], lm_head [V, D]), "" if it can."""
    if not (hidden.is_cuda and lm_head.is_cuda):
        return f"it runs on cuda tensors, these are on {hidden.device} and {lm_head.device}"
    if reason := too_old(hidden.device, 8):
        return reason
    if hidden.dtype != lm_head.dtype or hidden.dtype not in TYPES:
        return f"hidden and lm_head must both be bfloat16 or both float16, not {hidden.dtype} and {lm_head.dtype}"
    if hidden.shape[-1] % 8:
        return f"D must be a multiple of 8, not {hidden.shape[-1]}"
    for name, given in (("hidden", hidden), ("lm_head", lm_head)):
        # a tensor that is being traced has no address; torch's own allocations are aligned
        start = 2 * given.storage_offset() if torch.compiler.is_compiling() else given.data_ptr()
        if start % 16 or given.stride(-2) % 8:
            return f"rows of {name} must begin at multiples of 16 bytes"
    return ""


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
    """Fields of `RowStats` in order, from one launch on the current stream."""
    fields = empty_fields(len(rows), probe_ids, hidden.device)  # a probed id out of range is met by no block
    if len(rows):
        call = row_call(hidden, lm_head, rows, banned_ids, excluded_ids, probe_ids, temperature, noise_keys, fields)
        with torch.cuda.device(hidden.device):
            tickets, workspace, stream = _scratch(lm_head.shape[0], len(rows), hidden.device)
            _cuda.row_stats(call, hidden.shape[0], (tickets.data_ptr(), workspace.data_ptr(), stream))
    return fields


def decode_step_(step: Step) -> None:
    """Score, decide and commit in one launch."""
    batch, width, _ = step.hidden.shape
    if not batch:
        return
    with torch.cuda.device(step.hidden.device):
        tickets, workspace, stream = _scratch(step.lm_head.shape[0], batch * width, step.hidden.device)
        _cuda.decode_step(*step.addresses(), (tickets.data_ptr(), workspace.data_ptr(), stream))


def _scratch(vocab: int, count: int, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Tickets (zero), workspace and stream of a launch."""
    words, size = _cuda.workspace(vocab, count)
    stream = torch.cuda.current_stream(device).cuda_stream
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    words = 1 << (words - 1).bit_length()
    if torch.cuda.is_current_stream_capturing():
        # the graph zeroes its own: it may be replayed on any stream, and a zeroing now would only be recorded
        return torch.zeros(words, dtype=torch.int32, device=device), workspace, stream
    key = (device.index, stream, words)
    if key not in _tickets:
        _tickets[key] = torch.zeros(words, dtype=torch.int32, device=device)
    return _tickets[key], workspace, stream

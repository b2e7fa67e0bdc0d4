"""Backends of the decode step, as data. `"auto"` takes the first that can run; an explicit name runs or raises."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dllm_engine import cuda, kernel_limits, native, reference
from dllm_engine.rules import Rule
from dllm_engine.state import DecodeState
from dllm_engine.step import Step

Fields = tuple[Tensor, ...]


@dataclass(frozen=True)
class Backend:
    """unavailable: why it cannot run on this machine, "" if it can. devices: where its tensors may be; (): anywhere.
    fits: (hidden, lm_head) -> why it cannot take these matrices, "" if it can.

    row_stats: (hidden, lm_head, rows, banned_ids, excluded_ids, probe_ids, temperature, noise_keys) -> the fields of
    `RowStats` in order. decode_step_: takes a `Step`. All is checked.
    """

    unavailable: str
    devices: tuple[str, ...]
    row_stats: Callable[..., Fields]
    decode_step_: Callable[..., None]
    fits: Callable[[Tensor, Tensor], str] = lambda hidden, lm_head: ""

    def refuses(self, hidden: Tensor, lm_head: Tensor) -> str:
        """Why it cannot run on these matrices here, "" if it can."""
        if self.unavailable:
            return self.unavailable
        if self.devices and hidden.device.type not in self.devices:
            return f"it runs on {' and '.join(self.devices)} tensors, these are on {hidden.device.type}"
        return self.fits(hidden, lm_head)


def _eager_step_(step: Step) -> None:
    state = DecodeState.of(
        step.tokens, step.undecided, step.predicted, step.progress, step.seeds, step.quota,
        prompt_length=step.prompt_length, fill_id=step.fill_id,
    )  # fmt: skip
    stats = reference.decode_step_(
        step.hidden,
        step.lm_head,
        state,
        step.sequences,
        Rule(step.bounds, step.weights, step.cut, step.decided_is_one, step.position),
        banned_ids=step.banned_ids,
        excluded_ids=step.excluded_ids,
        end_ids=step.end_ids if len(step.end_ids) else None,
        waiting_ids=step.waiting_ids if len(step.waiting_ids) else None,
        temperature=step.temperature,
    )
    torch.stack((stats.token, stats.second_token), out=step.stat_ids)
    torch.stack((stats.logit, stats.second_logit, stats.logsumexp, stats.log_odds, stats.entropy), out=step.stat_values)


def _kernels() -> Any:
    """Triton is imported when it is first used: it takes a second."""
    from dllm_engine.kernels import decode_step

    return decode_step


def _no_device() -> str:
    return "" if torch.cuda.is_available() else "no CUDA device"


# In order of preference. Filled at import, not by a cached probe: torch.compile would trace into that.
BACKENDS: dict[str, Backend] = {
    "cpu": Backend(native.MISSING, ("cpu",), native.row_stats, native.decode_step_),
    "triton": Backend(
        kernel_limits.unavailable(),
        kernel_limits.devices(),
        lambda *arguments: _kernels().row_stats(*arguments),
        lambda step: _kernels().decode_step_(step),
    ),
    "cuda": Backend(cuda.MISSING or _no_device(), ("cuda",), cuda.row_stats, cuda.decode_step_, cuda.refuses),
    # plain torch on any device: the definition
    "eager": Backend("", (), lambda *arguments: reference.row_stats(*arguments).fields(), _eager_step_),
}


def available() -> dict[str, str | None]:
    """Every backend with None, or the reason why it cannot run on this machine."""
    return {name: backend.unavailable or None for name, backend in BACKENDS.items()}


def resolve(backend: str, hidden: Tensor, lm_head: Tensor) -> str:
    """The backend that ``backend`` means for these matrices (their devices, types and shapes).

    ``"auto"`` takes the best that can run, or the one that the environment variable ``DLLM_BACKEND`` names.

    Raises:
        ValueError: unknown name. RuntimeError: a backend asked for by name that cannot run here.
    """
    asked = "backend"
    if backend == "auto" and os.environ.get("DLLM_BACKEND", "auto") != "auto":
        backend, asked = os.environ["DLLM_BACKEND"], "DLLM_BACKEND"
    if backend == "auto":
        return next(name for name, entry in BACKENDS.items() if not entry.refuses(hidden, lm_head))
    if backend not in BACKENDS:
        raise ValueError(f"{asked}: {backend!r} given; known: auto, {', '.join(BACKENDS)}")
    reason = BACKENDS[backend].refuses(hidden, lm_head)
    if reason:
        raise RuntimeError(f"{asked}: {backend!r} cannot run here: {reason}")
    return backend

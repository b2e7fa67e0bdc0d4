"""Backends of the decode step, as data: name -> why it cannot run (None if it can)."""

from __future__ import annotations

from collections.abc import Callable

_BACKENDS: dict[str, Callable[[], str | None]] = {
    "eager": lambda: None,  # plain torch on any device; see `reference`
}


def available() -> dict[str, str | None]:
    """Every backend with None, or the reason why it cannot run here."""
    return {name: probe() for name, probe in _BACKENDS.items()}


def resolve(backend: str) -> str:
    """The backend that ``backend`` means here; ``"auto"`` takes the best that can run.

    Raises:
        ValueError: unknown name. RuntimeError: a backend asked for by name that cannot run here.
    """
    if backend == "auto":
        return next(name for name, reason in available().items() if reason is None)
    if backend not in _BACKENDS:
        raise ValueError(f"backend: {backend!r} given; known: auto, {', '.join(_BACKENDS)}")
    reason = _BACKENDS[backend]()
    if reason is not None:
        raise RuntimeError(f"backend: {backend!r} cannot run here: {reason}")
    return backend

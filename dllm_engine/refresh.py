"""Cache modes, and when cached keys and values are computed anew."""

from __future__ import annotations

from dataclasses import dataclass

CACHES = ("none", "prefix", "dual")


class Refresh:
    """When a sequence's whole canvas is computed again; between refreshes only its block is (``"dual"``), or its block
    and all behind it (``"prefix"``). Its first call always is a refresh.

    The base of further policies: the host asks `due` before every call, with numbers that it has.
    """

    def due(self, step: int, step_in_block: int) -> bool:
        """Whether the next call of a sequence is a refresh.

        Args:
            step: calls that it has taken part in. step_in_block: those since its block began.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class EveryBlock(Refresh):
    """When a block begins (Fast-dLLM, arXiv 2505.22618): the refresh makes the block's first commit."""

    def due(self, step: int, step_in_block: int) -> bool:
        return step_in_block == 0


@dataclass(frozen=True)
class EverySteps(Refresh):
    """Every ``steps`` calls of a sequence, wherever its block is."""

    steps: int

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 1:
            raise ValueError(f"steps: {self.steps!r} given; an int of at least 1 is needed")

    def due(self, step: int, step_in_block: int) -> bool:
        return step % self.steps == 0


@dataclass(frozen=True)
class Never(Refresh):
    """Only the first call of a sequence: what lies behind a block keeps the keys of the empty canvas."""

    def due(self, step: int, step_in_block: int) -> bool:
        return False


@dataclass(frozen=True)
class Cache:
    """What ``cache=`` stands for. As text: ``dual``, ``dual/8`` (refreshed every 8 calls), ``dual/never``.

    Attributes:
        name: ``"none"``, ``"prefix"`` or ``"dual"``.
        refresh: an object of a `Refresh`.
    """

    name: str = "dual"
    refresh: Refresh = EveryBlock()

    def __post_init__(self) -> None:
        if self.name not in CACHES:
            raise ValueError(f"cache: {self.name!r} given; known: {', '.join(CACHES)}")
        if not isinstance(self.refresh, Refresh):
            raise TypeError(f"refresh: {type(self.refresh).__name__} given; a refresh.Refresh is needed")
        if self.name == "none" and self.refresh != EveryBlock():
            raise ValueError(f"cache: 'none' given with {self.refresh}; without a cache every call computes all")

    @classmethod
    def of(cls, cache: str | Cache) -> Cache:
        """From its text, or itself.

        Raises:
            TypeError: neither. ValueError: unknown text.
        """
        if isinstance(cache, Cache):
            return cache
        if not isinstance(cache, str):
            raise TypeError(f"cache: {type(cache).__name__} given; a name or a Cache is needed")
        name, slash, when = cache.partition("/")
        if not slash:
            return cls(name)
        if when == "never":
            return cls(name, Never())
        if not when.isascii() or not when.isdigit() or int(when) < 1:
            known = f"{', '.join(CACHES)}, and NAME/STEPS or NAME/never for other refreshes"
            raise ValueError(f"cache: {cache!r} given; known: {known}")
        return cls(name, EverySteps(int(when)))

    def __str__(self) -> str:
        if self.refresh == EveryBlock():
            return self.name
        if self.refresh == Never():
            return f"{self.name}/never"
        return f"{self.name}/{self.refresh.steps if isinstance(self.refresh, EverySteps) else self.refresh}"

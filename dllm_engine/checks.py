"""Checks of settings that need no model. Every message names its argument."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch

from dllm_engine.noise import LARGEST

END_OF_TEXT = ("auto", "off", "committed", "predicted")


def check_count(name: str, value: Any) -> None:
    """No int raises TypeError, one below 1 ValueError."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: {value!r} given; an int is needed")
    if value < 1:
        raise ValueError(f"{name}: {value} given; at least 1 is needed")


def check_counts(**counts: Any) -> None:
    """`check_count` of each."""
    for name, value in counts.items():
        check_count(name, value)


def is_number(value: Any) -> bool:
    """An int or a float, numpy's too, and no bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_options(*, end_of_text: str = "auto", temperature: float = 0.0, cfg_scale: float = 0.0) -> None:
    """Unknown names and numbers out of range raise ValueError."""
    if end_of_text not in END_OF_TEXT:
        raise ValueError(f"end_of_text: {end_of_text!r} given; known: {', '.join(END_OF_TEXT)}")
    for name, number in (("temperature", temperature), ("cfg_scale", cfg_scale)):
        if not is_number(number) or not 0 <= number <= LARGEST:
            raise ValueError(f"{name}: {number!r} given; a finite number ≥ 0, at most {LARGEST:g}, is needed")


def check_seeds(seed: int | Sequence[int] | None, batch: int) -> list[int]:
    """One seed a sequence: s, s + 1, … from an int; None draws one from torch's global generator.

    Raises:
        TypeError, ValueError: not an int in [0, 2^63), or a list of another length than the batch.
    """
    if seed is None:
        seed = int(torch.randint(2**31, (), device="cpu"))
    if isinstance(seed, int) and not isinstance(seed, bool):
        seeds = [seed + i for i in range(batch)]
    elif isinstance(seed, Sequence) and all(isinstance(s, int) and not isinstance(s, bool) for s in seed):
        seeds = list(seed)
        if len(seeds) != batch:
            raise ValueError(f"seed: {len(seeds)} seeds given for a batch of {batch}")
    else:
        raise TypeError(f"seed: {seed!r} given; an int, a list of ints or None is needed")
    if any(not 0 <= s < 2**63 for s in seeds):
        raise ValueError(f"seed: {seed} given; seeds (seed + sequence) must lie in 0 to 2^63 − 1")
    return seeds


def seeds_of(seed: int | Sequence[int] | None) -> Callable[[int], int]:
    """`check_seeds` for prompts whose number is not known: index -> seed, a ValueError where a list is too short."""
    if seed is None or isinstance(seed, int):
        first = check_seeds(seed, 1)[0]
        return lambda index: check_seeds(first + index, 1)[0]
    seeds = check_seeds(seed, len(seed) if isinstance(seed, Sequence) else 1)

    def listed(index: int) -> int:
        if index >= len(seeds):
            raise ValueError(f"seed: {len(seeds)} seeds given; prompt {index} has none")
        return seeds[index]

    return listed

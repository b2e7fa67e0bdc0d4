"""Learn2PD (arXiv 2509.25188): a small filter looks at a block's statistics and says which predictions are final."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import torch

from dllm_engine.config import ModelFacts
from dllm_engine.filter import DEFAULT_THRESHOLD, LearnedFilter
from dllm_engine.policies.base import Policy, in_range
from dllm_engine.rules import Rule, by_filter


class Learn2PD(Policy):
    """Commit undecided positions whose ``sigmoid(filter(statistics of the block)) > threshold``.

    Args:
        filter: a `LearnedFilter`, or the path of one.
        threshold: 0 to 1; by default the filter file's own, else 0.96 as published.
        ends_wait: see `Policy`; by default as the filter was trained (not, if published).
    """

    name = "learn2pd"

    def __init__(
        self, filter: LearnedFilter | str | PathLike[str], threshold: float | None = None, ends_wait: bool | None = None
    ) -> None:
        if not isinstance(filter, LearnedFilter | str | PathLike):
            raise TypeError(f"filter: {type(filter).__name__} given; a LearnedFilter or the path of one is needed")
        self.filter = filter if isinstance(filter, LearnedFilter) else LearnedFilter.from_pretrained(Path(filter))
        if threshold is None:
            threshold = self.filter.threshold if self.filter.threshold is not None else DEFAULT_THRESHOLD
        self.threshold = in_range("threshold", threshold, 0, 1)
        self.ends_wait = self.filter.ends_wait if ends_wait is None else ends_wait

    @property
    def reads_decided(self) -> bool:  # type: ignore[override]
        return self.filter.kind == "block" and self.filter.confidence_of_decided == "model"

    def rule(self, block_length: int, device: torch.device) -> Rule:
        return by_filter(
            self.filter.packed().to(device),
            self.threshold,
            block_length,
            decided_is_one=self.filter.confidence_of_decided == "one",
            position=self.filter.kind == "position",
        )

    def check(self, model: ModelFacts, *, block_length: int, cache: str) -> None:
        self.filter.check(model, block_length=block_length, cache=cache)

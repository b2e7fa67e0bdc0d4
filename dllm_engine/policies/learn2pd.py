"""Learn2PD (arXiv 2509.25188): a small filter looks at a block's confidences and says which predictions are final."""

from __future__ import annotations

from torch import Tensor

from dllm_engine.filter import DEFAULT_THRESHOLD, LearnedFilter
from dllm_engine.policies.base import Policy
from dllm_engine.reference import RowStats
from dllm_engine.state import BlockState


class Learn2PD(Policy):
    """Commit undecided positions whose ``sigmoid(filter(confidences of the block)) > threshold``.

    Args:
        filter: a `LearnedFilter`, or the path of one.
        threshold: 0 to 1; by default the filter file's own, else 0.96 as published.
    """

    name = "learn2pd"

    def __init__(self, filter: LearnedFilter | str, threshold: float | None = None) -> None:
        self.filter = filter if isinstance(filter, LearnedFilter) else LearnedFilter.from_pretrained(filter)
        if threshold is None:
            threshold = self.filter.threshold if self.filter.threshold is not None else DEFAULT_THRESHOLD
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold: {threshold} given; 0 to 1 allowed")
        self.threshold = float(threshold)

    @property
    def reads_decided(self) -> bool:  # type: ignore[override]
        return self.filter.confidence_of_decided == "model"

    def select(self, stats: RowStats, state: BlockState) -> Tensor:
        confidence = stats.confidence
        if self.filter.confidence_of_decided == "one":
            confidence = confidence.masked_fill(~state.undecided, 1.0)
        confidence = confidence.masked_fill(~state.active, 0.0)
        return self.filter(confidence).sigmoid() > self.threshold

    def check(self, model: object, *, block_length: int, cache: str) -> None:
        self.filter.check(model, block_length=block_length, cache=cache)

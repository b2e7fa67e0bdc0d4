"""Prophet: models know the answer before they have decoded it; when the gap is wide enough, go all in."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_engine.policies.base import Policy, in_range, whole
from dllm_engine.state import BlockState, DecodeState
from dllm_engine.stats import RowStats


class Prophet(Policy):
    """Commit all undecided positions of the block once mean(logit₁ − logit₂) ≥ θ(progress), else the static schedule.

    The mean runs over the block's undecided positions. θ is 7.5, 5.0, 2.5 at progress < 0.33, < 0.67 and from there on
    (Li et al., "Diffusion Language Models Know the Answer Before Decoding", arXiv 2508.19982). There progress is step /
    steps; here it is the share of the text that is decided, which means the same at one token a step and still means
    something when a block was committed at once. ``steps`` sets the schedule underneath: by default one token a step.

    Args:
        early, middle, late: θ, in logits.
        region: (first, end), offsets from the start of the generation: only the gaps there count, where an answer is
            known to stand. A block that has no undecided position there is never committed at once.
    """

    name = "prophet"
    reads_decided = False

    def __init__(
        self, early: float = 7.5, middle: float = 5.0, late: float = 2.5, *, region: tuple[int, int] | None = None
    ) -> None:
        self.early, self.middle = in_range("early", early, 0), in_range("middle", middle, 0)
        self.late, self.region = in_range("late", late, 0), region
        if region is not None:
            if not isinstance(region, list | tuple) or len(region) != 2:
                raise ValueError(f"region: {region!r} given; a pair (first, end) is needed")
            first = whole("region", region[0], 0)
            self.region = first, whole("region", region[1], first + 1)

    def begin(self, state: DecodeState) -> None:
        if self.region is not None and self.region[1] > state.gen_length:
            raise ValueError(f"region: {self.region} given; offsets 0 to gen_length {state.gen_length} allowed")

    def select(self, stats: RowStats, state: BlockState) -> Tensor:
        counted = state.undecided
        if self.region is not None:
            counted = counted & (state.positions >= self.region[0]) & (state.positions < self.region[1])
        # in float64: the sum must not depend on how wide the other sequences' blocks are
        gaps = torch.where(counted, stats.logit - stats.second_logit, 0.0).double().sum(1)
        progress = state.progress
        needed = torch.full_like(progress, self.late)
        needed = needed.masked_fill(progress < 0.67, self.middle).masked_fill(progress < 0.33, self.early)
        all_in = (gaps / counted.sum(1)).float() >= needed  # where none counts 0 / 0 is NaN, which is never enough
        return state.undecided & all_in[:, None]

"""LLaDA's static schedules: a fixed number of positions a step, the most confident ones or random ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dllm_engine.noise import uniform_scores
from dllm_engine.policies.base import Policy
from dllm_engine.rules import Rule, by_bounds
from dllm_engine.state import BlockState
from dllm_engine.stats import RowStats


class TopK(Policy):
    """Low-confidence remasking (LLaDA, arXiv 2502.09992): the quota's most confident positions, nothing more.

    ``steps`` defaults to ``gen_length``: one token per step.
    """

    name = "topk"
    reads_decided = False

    def rule(self, block_length: int, device: torch.device) -> Rule | None:
        return by_bounds((math.inf,) * block_length, device)

    def default_steps(self, gen_length: int) -> int | None:
        return gen_length


class Random(TopK):
    """Random remasking (LLaDA): the same schedule, positions drawn uniformly from the sequence's seed."""

    name = "random"

    def score(self, stats: RowStats, state: BlockState) -> Tensor:
        return uniform_scores(state.noise_keys)

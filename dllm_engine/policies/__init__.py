"""Commit rules, one small file each. `names` lists them, `resolve` makes one from a name."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch

from dllm_engine.config import ModelFacts
from dllm_engine.filter import FILTER_FILE, LearnedFilter
from dllm_engine.policies.adablock import AdaBlock
from dllm_engine.policies.base import HOOKS, Policy
from dllm_engine.policies.cad import CAD
from dllm_engine.policies.credit import Credit
from dllm_engine.policies.editing import TokenEditing
from dllm_engine.policies.entropy import Entropy
from dllm_engine.policies.ete import ExploreExploit
from dllm_engine.policies.freedave import FreeDave
from dllm_engine.policies.hierarchical import Hierarchical
from dllm_engine.policies.learn2pd import Learn2PD
from dllm_engine.policies.left_to_right import LeftToRight
from dllm_engine.policies.localleap import LocalLeap
from dllm_engine.policies.margin import Margin
from dllm_engine.policies.oracle import Oracle
from dllm_engine.policies.prophet import Prophet
from dllm_engine.policies.run_length import RunLength
from dllm_engine.policies.threshold import Factor, Threshold
from dllm_engine.policies.topk import Random, TopK
from dllm_engine.policies.wedlm import WeDLM
from dllm_engine.rules import MAX_FILTER, Rule

__all__ = [
    "CAD", "RULES", "AdaBlock", "Credit", "Entropy", "ExploreExploit", "Factor", "FreeDave", "Hierarchical", "Learn2PD",
    "LeftToRight", "LocalLeap", "Margin", "Oracle", "Policy", "Prophet", "Random", "RunLength", "Threshold",
    "TokenEditing", "TopK", "WeDLM", "names", "resolve",
]  # fmt: skip

# By name; what a name alone makes. The oracle is none of them: it must be told an answer.
RULES: dict[str, type[Policy]] = {
    rule.name: rule
    for rule in (
        *(TopK, Random, Threshold, Factor, Learn2PD, LeftToRight, Margin),
        *(Entropy, CAD, Prophet, LocalLeap, Hierarchical, WeDLM, RunLength),
        *(Credit, TokenEditing, AdaBlock, ExploreExploit, FreeDave),
    )
}


def names() -> list[str]:
    """Names that ``decode(policy=...)`` takes beside ``"auto"``."""
    return list(RULES)


def resolve(policy: Policy | str, model: ModelFacts, *, block_length: int, cache: str) -> Policy:
    """A checked policy object from an object, a name or ``"auto"``.

    ``"auto"`` is Learn2PD with the filter that lies beside the model's ``config.json``, else ``Threshold(0.9)``; a
    shipped filter that does not fit (ids, block length) gives a warning and the threshold.

    Raises:
        ValueError: unknown name, or the rule cannot run with this model, block length and cache.
        TypeError: neither a name nor a policy object.
    """
    if isinstance(policy, str):
        if policy == "auto":
            return _auto(model, block_length, cache)
        if policy not in RULES:
            raise ValueError(f"policy: {policy!r} given; known: auto, {', '.join(RULES)}")
        policy = Learn2PD(shipped_filter(model)) if policy == Learn2PD.name else RULES[policy]()
    if not isinstance(policy, Policy):
        raise TypeError(f"policy: {type(policy).__name__} given; a name or a policies.Policy is needed")
    return policy.check(model, block_length=block_length, cache=cache) or policy


def as_rule(policy: Policy, block_length: int, device: torch.device) -> Rule | None:
    """The policy as data that a kernel decides by; None if its own `score` and `select` must be called."""
    base = type(policy)
    own = (getattr(base, hook) is not getattr(Policy, hook) for hook in ("score", "tokens", *HOOKS))
    decides = policy.drafts > 1 or base.select is not Policy.select or any(own)
    rule = None if decides else policy.rule(block_length, device)
    return None if rule is None or rule.filter_length > MAX_FILTER else replace(rule, ends_wait=policy.ends_wait)


def _auto(model: ModelFacts, block_length: int, cache: str) -> Policy:
    if model.path is None or not (model.path / FILTER_FILE).exists():
        return Threshold()
    try:
        policy = Learn2PD(shipped_filter(model))
        policy.check(model, block_length=block_length, cache=cache)
    except (ValueError, OSError) as error:
        warnings.warn(f"the model's own filter does not fit, using Threshold(0.9): {error}", stacklevel=2)
        return Threshold()
    return policy


def shipped_filter(model: ModelFacts) -> LearnedFilter:
    """The filter beside the model's weights.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    if model.path is None or not (model.path / FILTER_FILE).exists():
        raise ValueError(
            f"policy: 'learn2pd' by name needs {FILTER_FILE} beside the model's config.json; "
            "give Learn2PD('path/of/a/filter') instead"
        )
    file = model.path / FILTER_FILE
    return _read_filter(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=8)
def _read_filter(file: Path, changed: int) -> LearnedFilter:
    """Not read again for every decode; ``changed`` is the file's time."""
    return LearnedFilter.from_pretrained(file)

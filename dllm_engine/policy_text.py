"""Policies as text: ``threshold=0.95``, ``topk=2``, ``localleap=0.9/0.75/4``."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm_engine import policies
from dllm_engine.config import ModelFacts
from dllm_engine.policies import Policy, Threshold, TopK


@dataclass(frozen=True)
class PolicyText:
    """A policy as the command line, `decode` and ``generation_config.json`` write it.

    Attributes:
        name: a name of `policies.names`, ``"auto"`` or ``"oracle"``.
        value: the rule's first parameter, the threshold of a filter, or the tokens a step of a static schedule.
        file: of a filter; None is the model's own.
        more: the rule's further parameters in order.
    """

    name: str
    value: float | None = None
    file: str | None = None
    more: tuple[float, ...] = ()

    @classmethod
    def parse(cls, text: str, *, oracle: bool = False) -> PolicyText:
        """From ``threshold=0.95``, ``wedlm=0.4/0.02``, ``topk=2``, ``learn2pd=FILE``, ``learn2pd=FILE@0.8``,
        ``learn2pd@0.8`` or a bare name.

        Raises:
            TypeError: no text.
            ValueError: anything else (``oracle`` says whether that one is known), or a value out of range.
            FileNotFoundError: a filter that is not there.
        """
        if not isinstance(text, str):
            raise TypeError(f"policy: {text!r} given; a text is needed")
        name, equals, value = text.partition("=")
        if not equals and name.startswith("learn2pd@"):
            return cls("learn2pd", _filter_threshold(name.partition("@")[2]))
        known = ["auto", *policies.names(), *(["oracle"] if oracle else [])]
        if name not in known:
            raise ValueError(f"policy: {text!r} given; known: {', '.join(known)}")
        if not equals:
            return cls(name)
        if name == "learn2pd":
            file, at, tail = value.rpartition("@")
            if not at or Path(value).expanduser().exists():
                file, at = value, ""
            if not file:  # which would be this directory
                raise ValueError(f"policy: {text!r} given; a filter's file or directory is needed")
            if not Path(file).expanduser().exists():
                raise FileNotFoundError(f"filter: {file} does not exist")
            return cls(name, _filter_threshold(tail) if at else None, str(Path(file).expanduser()))
        if name not in policies.RULES:
            raise ValueError(f"policy: {text!r} given; {name} takes no value")
        if _is_static(name):
            return cls(name, _tokens_a_step(name, value))
        first, *more = (_number(name, part) for part in value.split("/"))
        _make(name, first, *more)
        return cls(name, first, None, tuple(more))

    def make(self, model: ModelFacts) -> Policy | str:
        """The policy for `decode`; a bare name stays a name.

        Raises:
            FileNotFoundError, ValueError: there is no filter, or it cannot be read.
        """
        if self.name == "learn2pd" and (self.file or self.value is not None):
            return policies.Learn2PD(self.file or policies.shipped_filter(model), self.value)
        if self.value is None or _is_static(self.name):
            return self.name
        return _make(self.name, self.value, *self.more)

    @property
    def is_schedule(self) -> bool:
        """Whether it says how many tokens each step of the static schedule commits."""
        return self.value is not None and _is_static(self.name)

    def steps(self, gen_length: int, steps: int | None = None, *, block_length: int | None = None) -> int | None:
        """Steps of the static schedule: ``topk=K`` commits K tokens in each.

        Raises:
            ValueError: K does not divide ``gen_length`` or, if it is known, ``block_length``; or ``steps`` was given
                as well.
        """
        if self.value is None or not self.is_schedule:
            return steps
        text = f"{self.name}={self.value:.0f}"
        if steps is not None:
            raise ValueError(f"steps: {steps} given; {text} sets its own, one of them must go")
        for name, length in (("gen_length", gen_length), ("block_length", block_length)):
            if length and length % self.value:
                raise ValueError(f"policy: {text} given; tokens a step must divide {name} {length}")
        return gen_length // int(self.value)


def _is_static(name: str) -> bool:
    """Whether the rule has no parameter of its own but the tokens a step of LLaDA's schedule."""
    return name in policies.RULES and issubclass(policies.RULES[name], TopK)


def _make(name: str, *values: float) -> Policy:
    rule: Any = policies.RULES[name]
    parameters = inspect.signature(rule).parameters.values()
    allowed = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(values) > len(allowed):
        raise ValueError(f"policy: {len(values)} values given for {name}; it has {', '.join(allowed)}")
    made: Policy = rule(*values)
    return made


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"policy: {text!r} given for {name}; a number is needed") from None


def _filter_threshold(text: str) -> float:
    return Threshold(_number("learn2pd", text)).threshold  # it has the range of one


def _tokens_a_step(name: str, text: str) -> float:
    number = _number(name, text)
    if not (math.isfinite(number) and number >= 1 and number == math.floor(number)):
        raise ValueError(f"policy: {text!r} given for {name}; a whole number of tokens a step, at least 1, is needed")
    return number

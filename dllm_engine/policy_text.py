"""Policies as the command line writes them: ``threshold=0.95``, ``topk=2``, ``learn2pd=FILE@0.8``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dllm_engine import policies
from dllm_engine.policies import Factor, Policy, Threshold

if TYPE_CHECKING:
    from dllm_engine.model import LLaDA

_RULES: dict[str, type[Threshold] | type[Factor]] = {"threshold": Threshold, "factor": Factor}


@dataclass(frozen=True)
class PolicyText:
    """A policy as the command line writes it.

    Attributes:
        name: a name of `policies.names`, ``"auto"`` or ``"oracle"``.
        value: the threshold, the factor, the tokens a step of ``topk``, or the threshold of a filter.
        file: of a filter; None is the model's own.
    """

    name: str
    value: float | None = None
    file: str | None = None

    @classmethod
    def parse(cls, text: str, *, oracle: bool = False) -> PolicyText:
        """From ``threshold=0.95``, ``factor=1``, ``topk=2``, ``learn2pd=FILE``, ``learn2pd=FILE@0.8``, ``learn2pd@0.8``
        or a bare name.

        Raises:
            ValueError: anything else (``oracle`` says whether that one is known), or a value out of range.
            FileNotFoundError: a filter that is not there.
        """
        name, equals, value = text.partition("=")
        if not equals and name.startswith("learn2pd@"):
            return cls("learn2pd", _in_range("learn2pd", name.partition("@")[2]))
        known = ["auto", *policies.names(), *(["oracle"] if oracle else [])]
        if name not in known:
            raise ValueError(f"policy: {text!r} given; known: {', '.join(known)}")
        if not equals:
            return cls(name)
        if name == "learn2pd":
            file, at, tail = value.rpartition("@")
            if not at or Path(value).exists():
                file, at = value, ""
            if not Path(file).exists():
                raise FileNotFoundError(f"filter: {file} does not exist")
            return cls(name, _in_range(name, tail) if at else None, file)
        if name not in ("topk", *_RULES):
            raise ValueError(f"policy: {text!r} given; only topk, {', '.join(_RULES)} and learn2pd take a value")
        return cls(name, _in_range(name, value))

    def make(self, model: LLaDA) -> Policy | str:
        """The policy for `decode`; a bare name stays a name.

        Raises:
            FileNotFoundError, ValueError: there is no filter, or it cannot be read.
        """
        if self.name == "learn2pd" and (self.file or self.value is not None):
            return policies.Learn2PD(self.file or str(model.path), self.value)
        return _RULES[self.name](self.value) if self.name in _RULES and self.value is not None else self.name

    def steps(self, gen_length: int, steps: int | None = None) -> int | None:
        """Steps of the static schedule: ``topk=K`` commits K tokens in each.

        Raises:
            ValueError: K does not divide ``gen_length``, or ``steps`` was given as well.
        """
        if self.name != "topk" or self.value is None:
            return steps
        if steps is not None:
            raise ValueError(f"steps: {steps} given; topk={self.value:.0f} sets its own, one of them must go")
        if gen_length % self.value:
            raise ValueError(f"policy: topk={self.value:.0f} given; tokens a step must divide gen_length {gen_length}")
        return gen_length // int(self.value)


def _in_range(name: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise ValueError(f"policy: {text!r} given for {name}; a number is needed") from None
    if name == "topk":
        if number < 1 or number != math.floor(number):
            raise ValueError(f"policy: {text!r} given for topk; a whole number of tokens a step, at least 1, is needed")
    else:
        _RULES.get(name, Threshold)(number)  # a filter's threshold has the range of a threshold
    return number

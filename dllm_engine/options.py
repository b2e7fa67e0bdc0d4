"""How to decode: every setting of a call, checked, with what ``"auto"`` stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dllm_engine import backends, inputs, policies
from dllm_engine.model import LLaDA
from dllm_engine.policies import Policy
from dllm_engine.refresh import Cache


@dataclass(frozen=True)
class Options:
    """The arguments of `decode` that hold for all its sequences.

    Attributes:
        steps: of the static schedule; None: a quota of one position a step.
        extra_banned: ids never chosen, beside the mask and what is no token. excluded_ids: see `ops.row_stats`.
    """

    gen_length: int
    block_length: int
    steps: int | None
    policy: Policy
    cache: Cache
    end_of_text: str
    backend: str
    temperature: float = 0.0
    cfg_scale: float = 0.0
    extra_banned: tuple[int, ...] = ()
    excluded_ids: tuple[int, ...] = ()

    @classmethod
    def resolve(
        cls,
        model: LLaDA,
        *,
        longest_prompt: int,
        gen_length: int,
        block_length: int,
        steps: int | None,
        policy: Policy | str,
        cache: str | Cache,
        temperature: float,
        cfg_scale: float,
        end_of_text: str,
        backend: str,
    ) -> Options:
        """Checked options from `decode`'s arguments.

        Raises:
            TypeError, ValueError: a bad argument. RuntimeError: a backend asked for by name that cannot run here.
        """
        cache = Cache.of(cache)
        inputs.check_options(end_of_text=end_of_text, temperature=temperature, cfg_scale=cfg_scale)
        inputs.check_lengths(model, longest_prompt, gen_length=gen_length, block_length=block_length, steps=steps)
        policy = policies.resolve(policy, model, block_length=block_length, cache=str(cache))
        if policy.greedy and temperature > 0:
            raise ValueError(f"temperature: {temperature} given; {type(policy).__name__} decides without one, at 0")
        if policy.drafts > 1 and cfg_scale > 0:
            raise ValueError(f"cfg_scale: {cfg_scale} given; {type(policy).__name__} decodes without guidance, at 0")
        return cls(
            gen_length=gen_length,
            block_length=block_length,
            steps=steps if steps is not None else policy.default_steps(gen_length),
            policy=policy,
            cache=cache,
            end_of_text="committed" if end_of_text == "auto" else end_of_text,
            backend=resolve_backend(backend, model, cfg_scale),
            temperature=temperature,
            cfg_scale=cfg_scale,
        )

    def told(self, seeds: list[int]) -> dict[str, Any]:
        """`DecodeOutput.settings`."""
        return {
            "policy": self.policy,
            "cache": str(self.cache),
            "end_of_text": self.end_of_text,
            "backend": self.backend,
            "seed": seeds,
        }


def resolve_backend(backend: str, model: LLaDA, cfg_scale: float) -> str:
    """The backend that will take the model's hidden states (float32 with guidance) and LM head."""
    dtype = torch.float32 if cfg_scale else model.dtype
    hidden = torch.empty(1, model.lm_head.shape[1], dtype=dtype, device=model.device)
    return backends.resolve(backend, hidden, model.lm_head)

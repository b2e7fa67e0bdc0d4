"""How to decode: every setting of a call, checked, with what ``"auto"`` stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dllm_engine import backends, checks, generation_config, inputs, policies
from dllm_engine.model import LLaDA
from dllm_engine.policies import Policy
from dllm_engine.policies.base import reach_of
from dllm_engine.policy_text import PolicyText
from dllm_engine.refresh import Cache, EveryBlock

# What `decode` does where neither its caller nor the model's generation_config.json says anything.
DEFAULTS: dict[str, Any] = {
    "gen_length": 128, "block_length": 32, "steps": None, "policy": "auto", "cache": "dual", "temperature": 0.0,
    "cfg_scale": 0.0, "end_of_text": "auto", "backend": "auto",
}  # fmt: skip


def defaults_of(model: LLaDA) -> dict[str, Any]:
    """`DEFAULTS`, and of a block-causal model its own block length."""
    return DEFAULTS | ({"block_length": model.config.block_length} if model.config.block_size else {})


def default(model: LLaDA, name: str) -> Any:
    """What an argument of `decode` is where its caller leaves it out."""
    return model.generation_defaults.get(name, defaults_of(model)[name])


@dataclass(frozen=True)
class Options:
    """The arguments of `decode` that hold for all its sequences.

    Attributes:
        steps: of the static schedule; None: a quota of one position a step.
        alignment: see `DecodeState`.
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
    alignment: int = 1

    @classmethod
    def resolve(cls, model: LLaDA, *, longest_prompt: int, **given: Any) -> Options:
        """Checked options from `decode`'s arguments of the names in `DEFAULTS`.

        One that is None was left out: what ``generation_config.json`` beside the model says is taken, else the default.

        Raises:
            TypeError, ValueError: a bad argument. RuntimeError: a backend asked for by name that cannot run here.
        """
        given = {name: value for name, value in given.items() if value is not None}
        beside = {name: value for name, value in model.generation_defaults.items() if name not in given}
        if "policy" in given and _sets_steps(given["policy"]):
            beside.pop("steps", None)
        elif "steps" in given and _sets_steps(beside.get("policy")):
            beside["policy"] = PolicyText.parse(beside["policy"]).name
        try:
            return cls._checked(model, longest_prompt, **defaults_of(model) | beside | given)
        except ValueError as error:
            if not beside:
                raise
            raise ValueError(f"{error} ({', '.join(beside)}: from {generation_config.FILE})") from None

    @classmethod
    def _checked(
        cls,
        model: LLaDA,
        longest_prompt: int,
        *,
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
        model.check_weights()
        cache = Cache.of(cache)
        checks.check_options(end_of_text=end_of_text, temperature=temperature, cfg_scale=cfg_scale)
        checks.check_count("gen_length", gen_length)
        if isinstance(policy, str):
            text = PolicyText.parse(policy)
            steps, policy = text.steps(gen_length, steps, block_length=block_length), text.make(model)
        inputs.check_lengths(model, longest_prompt, gen_length=gen_length, block_length=block_length, steps=steps)
        if model.config.block_size:
            cache = _block_causal(cache, end_of_text)
        policy = policies.resolve(policy, model, block_length=block_length, cache=str(cache))
        if model.config.block_size and _leaves_blocks(policy, gen_length=gen_length, block_length=block_length):
            name = type(policy).__name__
            raise ValueError(
                f"policy: {name} given; a block-causal model computes blocks as they are and no other columns"
            )
        if steps is None:
            steps = policy.default_steps(gen_length)
            name = f"{type(policy).__name__}.default_steps"
            inputs.check_steps(name, steps, gen_length=gen_length, block_length=block_length)
        if policy.greedy and temperature > 0:
            raise ValueError(f"temperature: {temperature} given; {type(policy).__name__} decides without one, at 0")
        if policy.drafts > 1 and cfg_scale > 0:
            raise ValueError(f"cfg_scale: {cfg_scale} given; {type(policy).__name__} decodes without guidance, at 0")
        return cls(
            gen_length=gen_length,
            block_length=block_length,
            steps=steps,
            policy=policy,
            cache=cache,
            end_of_text="committed" if end_of_text == "auto" else end_of_text,
            backend=resolve_backend(backend, model, cfg_scale),
            temperature=float(temperature),
            cfg_scale=float(cfg_scale),
            alignment=inputs.alignment_of(model, block_length),
        )

    def told(self, seeds: list[int]) -> dict[str, Any]:
        """`DecodeOutput.settings`."""
        return {name: getattr(self, name) for name in DEFAULTS} | {"cache": str(self.cache), "seed": seeds}


def _block_causal(cache: Cache, end_of_text: str) -> Cache:
    """The cache of a block-causal model, whose rows never see what is right of their block: keys of decided blocks are
    exact, ``prefix`` and ``dual`` the same. What needs those columns raises ValueError.
    """
    if cache.refresh != EveryBlock():
        raise ValueError(f"cache: '{cache}' given; a block-causal model's cache is never refreshed: 'dual' is exact")
    if end_of_text == "predicted":
        raise ValueError("end_of_text: 'predicted' given; a block-causal model has no predictions right of a block")
    return Cache("dual") if cache.name == "prefix" else cache


def _leaves_blocks(policy: Policy, *, gen_length: int, block_length: int) -> bool:
    """Whether a rule sees columns behind a block, or ends blocks elsewhere."""
    return (
        reach_of(policy, block_length, gen_length) > block_length or type(policy).block_lengths != Policy.block_lengths
    )


def _sets_steps(policy: Any) -> bool:
    """Whether it is a text such as ``"topk=4"``, which says how many steps there are."""
    return isinstance(policy, str) and PolicyText.parse(policy).is_schedule


def resolve_backend(backend: str, model: LLaDA, cfg_scale: float) -> str:
    """The backend that will take the model's hidden states (float32 with guidance) and LM head."""
    dtype = torch.float32 if cfg_scale else model.dtype
    hidden = torch.empty(1, model.lm_head.shape[1], dtype=dtype, device=model.device)
    return backends.resolve(backend, hidden, model.lm_head)

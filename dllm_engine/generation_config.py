"""``generation_config.json`` beside the weights: what `decode` does where its caller says nothing."""

from __future__ import annotations

from typing import Any

from dllm_engine import checks
from dllm_engine.policy_text import PolicyText
from dllm_engine.refresh import Cache

FILE = "generation_config.json"
_COUNTS = ("gen_length", "max_new_tokens", "block_length", "steps")
_NAMES = ("gen_length", "block_length", "steps", "policy", "cache", "temperature", "cfg_scale", "end_of_text")


def defaults(raw: dict[str, Any], source: str = FILE) -> dict[str, Any]:
    """Arguments of `decode` by the names of a generation config; keys that are none of them are left alone.

    ``max_new_tokens`` is ``gen_length`` under transformers' name, if that is not there. A ``temperature`` under
    ``"do_sample": false`` says nothing, as in transformers. ``policy`` is written as on the command line.
    ``steps`` beside ``alg`` are Dream's, of a schedule over the whole canvas, and are left alone.

    Raises:
        ValueError: a value that `decode` would not take, naming ``source`` and the key.
    """
    given = {name: value for name, value in raw.items() if value is not None}
    try:
        for name in _COUNTS:
            if name in given:
                checks.check_count(name, given[name])
        checks.check_options(
            end_of_text=given.get("end_of_text", "auto"),
            temperature=given.get("temperature", 0.0),
            cfg_scale=given.get("cfg_scale", 0.0),
        )
        Cache.of(given.get("cache", "dual"))
        PolicyText.parse(given.get("policy", "auto"))
    except (TypeError, ValueError, OSError) as error:
        raise ValueError(f"{source}: {error}") from None
    if "max_new_tokens" in given:
        given.setdefault("gen_length", given["max_new_tokens"])
    if given.get("do_sample") is False:
        given.pop("temperature", None)
    if "alg" in given:
        given.pop("steps", None)
    return {name: given[name] for name in _NAMES if name in given}

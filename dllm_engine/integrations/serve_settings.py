"""What a server allows and does by default, and a request turned into jobs by it."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dllm_engine import checks, generation_config, inputs, policies
from dllm_engine.integrations.serve_errors import ApiError, refused
from dllm_engine.integrations.serve_protocol import ChatRequest, Request
from dllm_engine.integrations.serve_text import Answer
from dllm_engine.integrations.serve_worker import Event, Job
from dllm_engine.model import LLaDA
from dllm_engine.options import Options, default
from dllm_engine.policies import Policy
from dllm_engine.policy_text import PolicyText

_HOTTEST = 2.0  # OpenAI's limit on temperature
_KEPT = 64  # resolved options
_FIELDS = {"gen_length": "max_tokens"} | {
    name: name for name in ("policy", "cache", "block_length", "end_of_text", "temperature", "seed")
}


@dataclass(frozen=True)
class Settings:
    """Limits and defaults of a server.

    Attributes:
        model_name: what requests call the model.
        max_batch: prompts at once. max_length: columns of one, prompt and answer; None: 1,024, or the model's if fewer.
        max_tokens: of an answer, a multiple of ``block_length``; prompts have the rest of ``max_length``. None: half.
        gen_length: an answer's ``max_tokens`` if the request does not say; None: `decode`'s default for this model, or
            ``max_tokens`` if fewer.
        max_queue: prompts that may wait. timeout: seconds of a request. max_body: bytes of one.
        policy, cache, block_length, end_of_text, temperature: for requests that do not say; None: `decode`'s default
            for this model (``generation_config.json`` is read, but for ``steps`` and ``cfg_scale``).
        api_key: asked for on /v1; None: nobody is asked.
    """

    model_name: str
    max_batch: int = 8
    max_length: int | None = None
    max_tokens: int | None = None
    gen_length: int | None = None
    max_queue: int = 256
    timeout: float = 300.0
    max_body: int = 1 << 20
    policy: str | None = None
    cache: str | None = None
    block_length: int | None = None
    end_of_text: str | None = None
    temperature: float | None = None
    api_key: str | None = None

    def __post_init__(self) -> None:
        """What is wrong without a model raises TypeError or ValueError."""
        for name in ("max_batch", "block_length", "max_queue", "max_body", "max_length", "max_tokens", "gen_length"):
            if (value := getattr(self, name)) is not None:
                checks.check_count(name, value)
        if not 0 < self.timeout < math.inf:
            raise ValueError(f"timeout: {self.timeout} given; a finite number, more than 0 seconds, is needed")
        if not 0 <= (self.temperature or 0) <= _HOTTEST:
            raise ValueError(f"temperature: {self.temperature} given; 0 to {_HOTTEST:.0f} allowed, as in requests")
        if self.api_key is not None and not self.api_key.strip():
            raise ValueError("api_key: an empty text given; a key, or None to ask nobody, is needed")

    def fitted(self, model: LLaDA) -> Settings:
        """These, with every None filled in.

        Raises:
            TypeError, ValueError: what does not fit each other or the model.

        Warns:
            UserWarning: the model's ``generation_config.json`` says what a server has no use for.
        """
        if ignored := [name for name in ("steps", "cfg_scale") if model.generation_defaults.get(name)]:
            warnings.warn(f"{generation_config.FILE}: the server does not use {' and '.join(ignored)}", stacklevel=3)
        names = ("policy", "cache", "block_length", "end_of_text", "temperature")
        left_out = {name: default(model, name) for name in names if getattr(self, name) is None}
        longest, block = model.config.max_sequence_length, self.block_length or left_out["block_length"]
        max_length = min(longest, 1024) if self.max_length is None else self.max_length
        if max_length > longest:
            raise ValueError(f"max_length: {max_length} given; the model has max_sequence_length {longest}")
        if block >= max_length:
            name, own = ("max_length", max_length) if self.block_length is None else ("block_length", block)
            fit = f"a block of {block} and a prompt must fit into max_length {max_length}"
            raise ValueError(f"{name}: {own} given; {fit}")
        max_tokens = max(max_length // 2 // block, 1) * block if self.max_tokens is None else self.max_tokens
        if max_tokens % block:
            raise ValueError(f"max_tokens: {max_tokens} given; block_length {block} must divide it")
        if max_tokens >= max_length:
            raise ValueError(f"max_tokens: {max_tokens} given; max_length {max_length} leaves no room for a prompt")
        gen_length = min(default(model, "gen_length"), max_tokens) if self.gen_length is None else self.gen_length
        if gen_length > max_tokens:
            raise ValueError(f"gen_length: {gen_length} given; max_tokens allows {max_tokens}")
        return replace(self, max_length=max_length, max_tokens=max_tokens, gen_length=gen_length, **left_out)


class Planner:
    """Turns requests into jobs. For one thread."""

    def __init__(self, model: LLaDA, settings: Settings) -> None:
        """``settings`` as `Settings.fitted` gives them.

        Raises:
            TypeError, ValueError, OSError: defaults that no request could be decoded with.
        """
        assert settings.max_length is not None
        assert settings.max_tokens is not None
        assert settings.block_length is not None
        self.model, self.settings, self.max_tokens = model, settings, settings.max_tokens
        self.block_length = settings.block_length
        self.longest_prompt = settings.max_length - settings.max_tokens
        self.tokenizer = copy.deepcopy(model.tokenizer)  # the engine's thread has its own, see `PromptEncoder`
        self._kept: OrderedDict[tuple[object, ...], Options] = OrderedDict()
        self._options(Request(model=""), self.block_length)

    def jobs(self, request: Request, prompts: Sequence[list[int]], receive: Callable[[Event], None]) -> list[Job]:
        """A job for each prompt; ``receive`` gets their events.

        Raises:
            ApiError: 400, naming the field.
        """
        block = self.block_length if request.block_length is None else request.block_length
        if not 1 <= block <= self.max_tokens:
            raise ApiError(400, f"block_length: {block} given; 1 to {self.max_tokens} allowed", param="block_length")
        (name, limit), most = request.limit, self.max_tokens // block * block
        limit = min(self.settings.gen_length or most, most) if limit is None else limit
        if not 1 <= limit <= most:
            raise ApiError(400, f"{name}: {limit} given; 1 to {most} allowed", param=name, code="invalid_value")
        if not 0 <= (request.temperature or 0) <= _HOTTEST:
            raise ApiError(
                400, f"temperature: {request.temperature} given; 0 to {_HOTTEST:.0f} allowed", param="temperature"
            )
        for prompt in prompts:
            self._check(request, prompt)
        gen_length = -(-limit // block) * block
        try:
            options, seeds = self._options(request, gen_length), checks.check_seeds(request.seed, len(prompts))
            longest = max(map(len, prompts))  # in whole blocks, if the model is block-causal
            inputs.check_lengths(self.model, longest, gen_length=options.gen_length, block_length=block, steps=None)
        except (ValueError, TypeError) as error:
            if request.policy is None and request.block_length is not None and str(error).startswith("policy:"):
                message = f"block_length: {block} given, which does not fit this server's {error}"
                raise ApiError(400, message, param="block_length", code="invalid_value") from None
            raise refused(error, _FIELDS, None if request.policy is None else "policy") from None
        deadline, stops, live = time.monotonic() + self.settings.timeout, request.stops, bool(request.stream)
        ends = self.model.end_ids
        return [
            Job(
                index, prompt, seed, gen_length, options,
                Answer(self.tokenizer, ends, max_tokens=limit, stop=stops, live=live), deadline, receive,
            )
            for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]  # fmt: skip

    def _check(self, request: Request, prompt: list[int]) -> None:
        param = "messages" if isinstance(request, ChatRequest) else "prompt"
        if len(prompt) > self.longest_prompt:
            raise ApiError(
                400,
                f"{param}: {len(prompt)} tokens given; this server takes prompts of at most {self.longest_prompt}",
                param=param,
                code="context_length_exceeded",
            )
        try:
            inputs.check_ids(self.model, prompt, param)
        except ValueError as error:
            raise ApiError(400, str(error), param=param, code="invalid_value") from None

    def _options(self, request: Request, gen_length: int) -> Options:
        """Those of the request's group, the same object for all of it."""
        own = self.settings
        policy, cache, block, end, temperature = (
            getattr(own if getattr(request, name) is None else request, name)
            for name in ("policy", "cache", "block_length", "end_of_text", "temperature")
        )
        if policy.startswith("learn2pd=") and policy != own.policy:
            raise ValueError(
                "policy: a request cannot name a file; learn2pd and learn2pd@THRESHOLD use the model's own"
            )
        text = PolicyText.parse(policy)
        # Rows of all lengths run together, but for rules that look beyond a block: how far depends on the length.
        if policies.RULES.get(text.name, Policy).reach is Policy.reach:
            gen_length = self.max_tokens // block * block
        key = (policy, cache, block, end, float(temperature), gen_length)
        options = self._kept.get(key)
        if options is None:
            options = self._kept[key] = Options.resolve(
                self.model,
                longest_prompt=1,
                gen_length=gen_length,
                block_length=block,
                # one token a step, whatever generation_config.json says
                steps=text.steps(gen_length, block_length=block) or gen_length,
                policy=text.make(self.model),
                cache=cache,
                temperature=float(temperature),
                cfg_scale=0.0,
                end_of_text=end,
                backend="auto",
            )
        self._kept.move_to_end(key)
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return options

"""The requests of OpenAI's API that are understood, and the objects that answer them."""

from __future__ import annotations

import time
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from dllm_engine.integrations.serve_errors import ApiError

# Fields that are accepted where they ask for nothing: their values, or None for any. A null asks for nothing anywhere.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...] | None] = {
    "n": (1,), "best_of": (1,), "top_p": (1,), "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},),
    "logprobs": (False,), "top_logprobs": (0,), "echo": (False,), "suffix": ("",), "store": (False,), "tools": ([],),
    "functions": ([],), "tool_choice": ("none", "auto"), "function_call": ("none", "auto"), "modalities": (["text"],),
    "response_format": ({"type": "text"},), "service_tier": ("auto", "default"), "parallel_tool_calls": None,
    "user": None, "metadata": None, "safety_identifier": None, "prompt_cache_key": None,
    "audio": (), "prediction": (), "reasoning_effort": (), "verbosity": (), "web_search_options": (),
}  # fmt: skip
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_MOST_STOPS = 4


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None  # no chunk is ever padded


class Request(BaseModel):
    """What both endpoints take; ``policy`` to ``end_of_text`` are ours, as `decode` has them."""

    model_config = ConfigDict(strict=True, extra="allow")
    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None
    stop: Any = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    policy: str | None = None
    cache: str | None = None
    block_length: int | None = None
    end_of_text: str | None = None

    @property
    def limit(self) -> tuple[str, int | None]:
        """Name and value of the limit on tokens."""
        return "max_tokens", self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        stop = [] if stop is None else stop
        if not isinstance(stop, list) or len(stop) > _MOST_STOPS or not all(isinstance(s, str) and s for s in stop):
            raise ApiError(
                400, f"stop: a text or a list of at most {_MOST_STOPS}, none empty, is allowed", param="stop"
            )
        return tuple(stop)

    @property
    def usage_wanted(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    role: str
    content: Any = None
    name: str | None = None


class ChatRequest(Request):
    messages: list[Message]
    max_completion_tokens: int | None = None

    @property
    def limit(self) -> tuple[str, int | None]:
        new, old = self.max_completion_tokens, self.max_tokens
        if new is not None and old is not None and new != old:
            raise ApiError(400, "max_completion_tokens: max_tokens says otherwise; one must go", param="max_tokens")
        return ("max_tokens", old) if new is None else ("max_completion_tokens", new)

    def conversation(self) -> list[dict[str, str]]:
        """Messages as a chat template takes them."""
        if not self.messages:
            raise ApiError(400, "messages: an empty list given; at least one is needed", param="messages")
        return [_message(i, message) for i, message in enumerate(self.messages)]


class CompletionRequest(Request):
    prompt: Any

    def prompts(self) -> list[str | list[int]]:
        """Texts or lists of token ids."""

        def is_one(prompt: Any) -> bool:
            ids = isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt)
            return isinstance(prompt, str) or bool(ids)

        given = self.prompt
        if is_one(given):
            return [given]
        if isinstance(given, list) and given and all(map(is_one, given)):
            return given
        raise ApiError(400, "prompt: a text, a list of token ids, or a list of either is needed", param="prompt")


R = TypeVar("R", bound=Request)


def parsed(kind: type[R], body: bytes) -> R:
    """The request in a body.

    Raises:
        ApiError: 400: no JSON, a wrong type, an unknown field, or one that asks for what is not there.
    """
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        param = str(first["loc"][0]) if first["loc"] else None
        message = f"{where}: {first['msg']}" if where else f"the body: {first['msg']}"
        code = "missing" if first["type"] == "missing" else "invalid_type"
        raise ApiError(400, message, param=param, code="invalid_json" if param is None else code) from None
    for name, value in (request.model_extra or {}).items():
        if name not in _WITHOUT_EFFECT:
            raise ApiError(400, f"{name}: unknown parameter", param=name, code="unknown_parameter")
        allowed = _WITHOUT_EFFECT[name]
        if not (value is None or allowed is None or any(_same(value, one) for one in allowed)):
            raise ApiError(
                400,
                f"{name}: {value!r:.80} given; this server does not support it"
                + (f", only {' or '.join(map(repr, allowed))}" if allowed else ""),
                param=name,
                code="unsupported_parameter",
            )
    return request


def _same(value: Any, other: Any) -> bool:
    """As JSON has it: 0 is 0.0, but not false."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _message(index: int, message: Message) -> dict[str, str]:
    name = f"messages.{index}"
    for field, value in (message.model_extra or {}).items():
        if value:  # what an answer of ours carries beside its text is null
            raise ApiError(400, f"{name}.{field}: not supported", param="messages", code="unsupported_parameter")
    if message.role not in _ROLES:
        raise ApiError(400, f"{name}.role: {message.role!r:.80} given; known: {', '.join(_ROLES)}", param="messages")
    content = message.content
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise ApiError(
                400, f"{name}.content: only parts of type text are supported", param="messages",
                code="unsupported_parameter",
            )  # fmt: skip
        texts = [part.get("text") for part in content]
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else None
    if not isinstance(content, str):
        raise ApiError(400, f"{name}.content: a text, or a list of text parts, is needed", param="messages")
    return {"role": _ROLES[message.role], "content": content}


class Wording:
    """The objects that answer one request.

    Args:
        chat: for chat completions; else for completions. name: the request's id.
    """

    def __init__(self, *, chat: bool, name: str, model: str) -> None:
        self.chat = chat
        kind = "chat.completion" if chat else "text_completion"
        self._head = {"id": name, "object": kind, "created": int(time.time()), "model": model}
        self._chunk = self._head | {"object": "chat.completion.chunk" if chat else kind}

    def whole(self, texts: list[str], reasons: list[str], usage: dict[str, int]) -> dict[str, Any]:
        """The answer at once."""
        choices = []
        for i, (text, reason) in enumerate(zip(texts, reasons, strict=True)):
            said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
            choices.append({"index": i, **said, "logprobs": None, "finish_reason": reason})
        return self._head | {"choices": choices, "usage": usage}

    def first(self, index: int) -> dict[str, Any] | None:
        """What comes before any text."""
        return self._choice(index, {"delta": {"role": "assistant", "content": ""}}, None) if self.chat else None

    def text(self, index: int, text: str) -> dict[str, Any]:
        return self._choice(index, {"delta": {"content": text}} if self.chat else {"text": text}, None)

    def last(self, index: int, reason: str) -> dict[str, Any]:
        return self._choice(index, {"delta": {}} if self.chat else {"text": ""}, reason)

    def usage(self, usage: dict[str, int]) -> dict[str, Any]:
        return self._chunk | {"choices": [], "usage": usage}

    def _choice(self, index: int, said: dict[str, Any], reason: str | None) -> dict[str, Any]:
        return self._chunk | {"choices": [{"index": index, **said, "logprobs": None, "finish_reason": reason}]}

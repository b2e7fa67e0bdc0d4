"""Errors as OpenAI's API words them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TYPES = {429: "rate_limit_error"}


class ApiError(Exception):
    """What a request is refused with.

    Args:
        status: of HTTP. code: a word for programs. param: the field of the request that is wrong.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def refused(error: Exception, fields: Mapping[str, str], otherwise: str | None) -> ApiError:
    """A 400 from an exception of the engine whose message names its argument: ``gen_length: …``.

    Args:
        fields: the request's name for an argument of the engine. otherwise: the field where it is none of these.
    """
    name, colon, rest = str(error).partition(":")
    if colon and name in fields:
        return ApiError(400, f"{fields[name]}:{rest}", param=fields[name], code="invalid_value")
    return ApiError(400, str(error), param=otherwise, code="invalid_value")

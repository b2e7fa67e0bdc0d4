"""An HTTP server with OpenAI's chat and text completions on one engine: ``dllm-engine serve``."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

try:
    from fastapi import FastAPI
    from fastapi.responses import JSONResponse, Response
    from prometheus_client import CONTENT_TYPE_LATEST
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
except ImportError as error:
    raise ImportError(f'the server needs more packages: pip install "dllm-engine[serve]" ({error})') from None

from dllm_engine.engine import Engine
from dllm_engine.integrations import serve_protocol as protocol
from dllm_engine.integrations.serve_call import Call, EventStream, Gone, error_response
from dllm_engine.integrations.serve_errors import ApiError
from dllm_engine.integrations.serve_metrics import Metrics
from dllm_engine.integrations.serve_settings import Planner, Settings
from dllm_engine.integrations.serve_text import PromptEncoder
from dllm_engine.integrations.serve_worker import Event, Job, Worker
from dllm_engine.model import LLaDA

_log = logging.getLogger(__name__)
_INLINE = 20_000  # characters that are encoded on the loop; more would hold up the others
_EACH = 100  # characters that take as long as a text of none does
_DRAINED = 8  # times max_body that is read of a body that is too long, so that its sender comes to read the answer


def create_app(model: LLaDA, settings: Settings) -> FastAPI:
    """The application, for any ASGI server with lifespan support; the engine runs while it does.

    Raises:
        TypeError, ValueError, OSError, RuntimeError, MemoryError: settings that do not fit, before anything is served.
    """
    settings = settings.fitted(model)
    assert settings.max_length is not None
    server = Server(model, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with server.running():
            yield

    app = FastAPI(title="dllm-engine", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.server = server
    for path, method, endpoint in (
        ("/v1/chat/completions", "POST", server.chat),
        ("/v1/completions", "POST", server.complete),
        ("/v1/models", "GET", server.models),
        ("/v1/models/{name:path}", "GET", server.one_model),
        ("/health", "GET", server.health),
        ("/metrics", "GET", server.told_metrics),
    ):
        app.add_route(path, server.answering(path, endpoint), methods=[method])
    app.add_exception_handler(HTTPException, _unrouted)
    return app


async def _unrouted(request: Request, error: Exception) -> Response:
    """No such path, or not with this method."""
    assert isinstance(error, HTTPException)
    code, says = ("not_found", "not found") if error.status_code == 404 else ("method_not_allowed", "not allowed")
    message = f"{request.method} {request.url.path}: {says}"
    return error_response(ApiError(error.status_code, message, code=code, headers=error.headers))


class Server:
    """Endpoints and what they share. ``settings`` as `Settings.fitted` gives them."""

    def __init__(self, model: LLaDA, settings: Settings) -> None:
        assert settings.max_length is not None
        self.model, self.settings, self.metrics = model, settings, Metrics()
        self.encoder, self.planner = PromptEncoder(model), Planner(model, settings)
        self.engine = Engine(model, max_batch=settings.max_batch, max_length=settings.max_length)
        self.worker = Worker(self.engine, self.metrics, self._post, max_queue=settings.max_queue)
        self.metrics.running.set_function(lambda: self.worker.running)
        self.metrics.waiting.set_function(lambda: self.worker.waiting)
        self.started = int(time.time())
        self.accepted = self.answered = 0
        self._key = None if settings.api_key is None else _digest(settings.api_key.strip().encode())
        self._loop: asyncio.AbstractEventLoop

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        self._loop = asyncio.get_running_loop()
        self.worker.start()
        try:
            yield
        finally:
            self.worker.stop()
            await asyncio.to_thread(self.worker.join)
            self.engine.close()
            _log.info("stopped: %d requests accepted, %d answered", self.accepted, self.answered)

    def _post(self, events: list[tuple[Job, Event]]) -> None:
        def deliver() -> None:
            for job, event in events:
                job.receive(event)

        self._loop.call_soon_threadsafe(deliver)

    def answering(
        self, path: str, endpoint: Callable[[Request], Coroutine[Any, Any, Response]]
    ) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """An endpoint with key check, error bodies and counts."""
        requests = self.metrics.requests

        async def answer(request: Request) -> Response:
            try:
                if path.startswith("/v1/"):
                    self._authorize(request)
                response = await endpoint(request)
            except ApiError as error:
                response = error_response(error)
            except (Gone, ClientDisconnect):
                response = Response(status_code=499)  # nobody reads it
            except Exception as error:
                _log.exception("%s failed", path)
                response = error_response(
                    ApiError(500, f"internal error: {type(error).__name__}", code="internal_error")
                )
            if not isinstance(response, EventStream):
                requests.labels(path, response.status_code).inc()
            return response

        return answer

    def _authorize(self, request: Request) -> None:
        if self._key is None:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        # digests: the time that comparing takes tells nothing of the key, nor of its length
        given = _digest(key.strip(" \t").encode("latin-1"))  # as Starlette decoded it
        if not hmac.compare_digest(given, self._key) or scheme.lower() != "bearer":
            message = "a wrong API key was given" if key else "an API key is needed: Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    # -- endpoints ----------------------------------------------------------------------------------------------------

    async def health(self, request: Request) -> Response:
        if not self.worker.is_alive():
            raise ApiError(503, "the engine's thread has ended", code="stopped")
        return JSONResponse({"status": "ok", "running": self.worker.running, "waiting": self.worker.waiting})

    async def told_metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def one_model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return JSONResponse(self._card())

    async def chat(self, request: Request) -> Response:
        asked = protocol.parsed(protocol.ChatRequest, await self._body(request))
        self._check_model(asked.model)
        messages = asked.conversation()
        texts = [message["content"] for message in messages]
        prompt = await self._encoded(lambda: self.encoder.chat(messages), texts, "messages")
        return await self._answer(request, asked, [prompt], chat=True)

    async def complete(self, request: Request) -> Response:
        asked = protocol.parsed(protocol.CompletionRequest, await self._body(request))
        self._check_model(asked.model)
        given = asked.prompts()
        if len(given) > self.settings.max_queue:
            raise ApiError(
                400, f"prompt: {len(given)} given; this server takes {self.settings.max_queue} at once", param="prompt"
            )

        def encode() -> list[list[int]]:
            return [self.encoder.text(p) if isinstance(p, str) else p for p in given]

        prompts = await self._encoded(encode, given, "prompt")
        return await self._answer(request, asked, prompts, chat=False)

    # -- what they share ----------------------------------------------------------------------------------------------

    def _card(self) -> dict[str, Any]:
        name = self.settings.model_name
        return {"id": name, "object": "model", "created": self.started, "owned_by": "dllm-engine"}

    def _check_model(self, name: str) -> None:
        if name != self.settings.model_name:
            known = self.settings.model_name
            raise ApiError(
                404, f"model: {name!r:.80} given; this server has {known!r}", param="model", code="model_not_found"
            )

    async def _body(self, request: Request) -> bytes:
        """The request's body, of JSON by its header: a browser sends no other page's JSON here without asking first."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(400, f"the body: {kind or 'no type'!r:.80} given; application/json is needed", code="type")
        most, body, size = self.settings.max_body, bytearray(), 0

        async def read() -> None:
            nonlocal size
            async for part in request.stream():
                size += len(part)
                if size <= most:
                    body.extend(part)
                elif size > _DRAINED * most:
                    break

        try:
            await asyncio.wait_for(read(), self.settings.timeout)
        except (TimeoutError, asyncio.TimeoutError):
            raise ApiError(408, "the body did not come in time", code="timeout") from None
        if size > most:
            raise ApiError(413, f"the body: more than {most:,} bytes, this server's limit", code="body_too_long")
        return bytes(body)

    async def _encoded(self, encode: Callable[[], Any], texts: Sequence[str | list[int]], param: str) -> Any:
        try:
            inline = sum(len(text) + _EACH for text in texts) <= _INLINE and not self.encoder.busy
            return encode() if inline else await asyncio.to_thread(encode)
        except ValueError as error:
            raise ApiError(400, str(error), param=param, code="invalid_value") from None

    async def _answer(
        self, request: Request, asked: protocol.Request, prompts: list[list[int]], *, chat: bool
    ) -> Response:
        call = Call(asked, self.settings.model_name, chat=chat)
        jobs = self.planner.jobs(asked, prompts, call.receive)
        self.worker.submit(jobs)
        self.accepted += 1
        call.begun(jobs, self.worker.cancel)
        if asked.stream:
            return EventStream(call, self._streamed)
        async with aclosing(call.events(request.receive)) as events:
            async for _ in events:
                pass
        self.answered += 1
        return JSONResponse(call.whole())

    def _streamed(self, path: str, status: int) -> None:
        self.answered += status == 200
        self.metrics.requests.labels(path, status).inc()


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()

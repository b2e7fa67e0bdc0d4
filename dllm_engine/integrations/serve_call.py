"""A request that is being answered: its jobs' events gathered, and told as a stream if that is wanted."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from dllm_engine.integrations import serve_protocol as protocol
from dllm_engine.integrations.serve_errors import ApiError
from dllm_engine.integrations.serve_worker import Event, Job


class Gone(Exception):
    """The client left."""


def error_response(error: ApiError) -> Response:
    return JSONResponse(error.body, error.status, error.headers)


class Call:
    """A request that is being answered. `receive` takes the events of its jobs."""

    def __init__(self, asked: protocol.Request, model: str, *, chat: bool) -> None:
        self.asked = asked
        self._queue: asyncio.Queue[Event | None] = asyncio.Queue()
        self.receive = self._queue.put_nowait
        name = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.wording = protocol.Wording(chat=chat, name=name, model=model)

    def begun(self, jobs: Sequence[Job], cancel: Callable[[Job], None]) -> None:
        """The request's jobs are queued; ``cancel`` gives one up."""
        self.jobs, self._cancel = jobs, cancel

    async def events(self, receive: Receive) -> AsyncGenerator[Event, None]:
        """What the jobs send, to the last. Whoever stops listening, or has no client any more, gives the jobs up.

        Raises:
            ApiError: a job failed. Gone: the client left.
        """

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self._queue.put_nowait(None)

        watching, left = asyncio.create_task(watch()), len(self.jobs)
        try:
            while left:
                event = await self._queue.get()
                if event is None:
                    raise Gone
                if event.error is not None:
                    raise event.error
                left -= event.done
                yield event
        finally:
            watching.cancel()
            if left:
                for job in self.jobs:
                    self._cancel(job)

    def usage(self) -> dict[str, int]:
        prompt, completion = sum(len(job.prompt) for job in self.jobs), sum(job.answer.tokens for job in self.jobs)
        passes = sum(job.passes for job in self.jobs)
        return {
            "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
            "forward_passes": passes,
        }  # fmt: skip

    def reason(self, index: int) -> str:
        return self.jobs[index].answer.finish_reason or "length"

    def whole(self) -> dict[str, Any]:
        texts = [job.answer.text for job in self.jobs]
        return self.wording.whole(texts, [self.reason(job.index) for job in self.jobs], self.usage())

    async def chunks(self, receive: Receive) -> AsyncGenerator[dict[str, Any], None]:
        """The objects of a stream."""
        words, heard = self.wording, set()
        extra = {"usage": None} if self.asked.usage_wanted else {}
        async with aclosing(self.events(receive)) as events:
            async for event in events:
                if event.index not in heard and (first := words.first(event.index)) is not None:
                    yield first | extra
                heard.add(event.index)
                if event.text:
                    yield words.text(event.index, event.text) | extra
                if event.done:
                    yield words.last(event.index, self.reason(event.index)) | extra
        if extra:
            yield words.usage(self.usage())


class EventStream(Response):
    """A call's chunks as server-sent events. It begins with the first, so what fails before has its own status.

    Args:
        told: called at the end with path and status; 499: the client left.
    """

    def __init__(self, call: Call, told: Callable[[str, int], None]) -> None:
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self.call, self.told = call, told

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status, begun = 200, False

        async def say(text: str) -> None:
            nonlocal begun
            if not begun:
                begun = True
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True})

        try:
            async with aclosing(self.call.chunks(receive)) as chunks:
                async for chunk in chunks:
                    await say(json.dumps(chunk, ensure_ascii=False))
            await say("[DONE]")
        except (Gone, OSError):
            status = 499
        except ApiError as error:
            status = error.status
            if not begun:
                await error_response(error)(scope, receive, send)
            else:
                await say(json.dumps(error.body, ensure_ascii=False))
        finally:
            self.told(scope["path"], status)
        if begun:
            with suppress(OSError):
                await send({"type": "http.response.body", "body": b"", "more_body": False})

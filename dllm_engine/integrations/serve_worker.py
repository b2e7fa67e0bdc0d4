"""The thread that owns the engine: jobs come through a queue, take rows as they become free, and send what they give.

Rows of a batch share policy, cache, block length and temperature. So jobs with the same settings form a group, and one
group has the rows at a time. When the oldest waiting job belongs to another and the group has had its turn, nothing new
is admitted, what runs is finished, and the rows go to that job's group: nobody waits for ever, and mixed traffic still
runs in batches.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_engine.continuous import Scheduler
from dllm_engine.engine import Engine
from dllm_engine.integrations.serve_errors import ApiError
from dllm_engine.integrations.serve_metrics import Metrics
from dllm_engine.integrations.serve_text import Answer
from dllm_engine.options import Options

_log = logging.getLogger(__name__)
_PATIENCE = 2  # refreshes for new prompts between two calls of those inside a block


@dataclass(frozen=True)
class Event:
    """What a job sends: new text; with ``done`` the last of it; or an error instead, after which nothing comes."""

    index: int
    text: str = ""
    done: bool = False
    error: ApiError | None = None


@dataclass(eq=False)
class Job:
    """A prompt to be answered.

    Attributes:
        index: of the prompt in its request. seed, gen_length: its own; see `Scheduler.admit`.
        options: of its group, the same object in all of the group.
        deadline: of `time.monotonic`. receive: gets its events, called by `Worker.post`.
        passes: model calls that it took part in, once it is done.
    """

    index: int
    prompt: list[int]
    seed: int
    gen_length: int
    options: Options
    answer: Answer
    deadline: float
    receive: Callable[[Event], None]
    passes: int = 0
    arrived: float = 0.0
    row: int = -1
    gone: bool = False
    heard: bool = False


class Worker(threading.Thread):
    """Runs jobs until `stop`.

    Args:
        post: gets (job, event) pairs, in order, on this thread.
        max_queue: jobs that may wait. turn: seconds that a group keeps the rows while others wait.
    """

    def __init__(
        self,
        engine: Engine,
        metrics: Metrics,
        post: Callable[[list[tuple[Job, Event]]], None],
        *,
        max_queue: int,
        turn: float = 1.0,
    ) -> None:
        super().__init__(name="dllm-engine", daemon=True)
        self.engine, self.metrics, self.post, self.max_queue, self.turn = engine, metrics, post, max_queue, turn
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._running: dict[int, Job] = {}  # by the name that the scheduler knows
        self._outbox: list[tuple[Job, Event]] = []
        self._named = 0

    # -- from other threads -------------------------------------------------------------------------------------------

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue jobs, all or none.

        Raises:
            ApiError: 429, there is no room for them; 503, the server stops.
        """
        with self._changed:
            if self._stopping or not self.is_alive():
                raise ApiError(503, "the server is stopping", code="stopping")
            if len(self._waiting) + len(jobs) > self.max_queue:
                raise ApiError(
                    429,
                    f"the queue is full: {len(self._waiting)} prompts wait, {self.max_queue} may; try again later",
                    code="queue_full",
                    headers={"Retry-After": "1"},
                )
            for job in jobs:
                job.arrived = time.monotonic()
            self._waiting.extend(jobs)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Nobody waits for this job any more; its row is free after the step that runs."""
        with self._changed:
            job.gone = True
            if job in self._waiting:
                self._waiting.remove(job)

    def stop(self) -> None:
        """Finish every job that was taken, then end the thread, which may be joined."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    # -- the thread ---------------------------------------------------------------------------------------------------

    def run(self) -> None:
        with torch.inference_mode():
            while (job := self._first()) is not None:
                try:
                    self._serve(job.options)
                except Exception as error:
                    _log.exception("decoding failed")
                    with self._changed:
                        if not self._running and job in self._waiting:  # its group could not begin
                            self._waiting.remove(job)
                            self._running[-1] = job
                    for failed in self._running.values():
                        self._fail(failed, ApiError(500, f"decoding failed: {error}", code="decoding_failed"))
                    self._running.clear()
                    self._flush()

    def _first(self) -> Job | None:
        """The oldest waiting job, once there is one; None: the server stops. It stays in the queue."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._stopping)
            return self._waiting[0] if self._waiting else None

    def _serve(self, options: Options) -> None:
        """Run the group of ``options`` until its turn is over."""
        self.metrics.groups.inc()
        with self.engine.scheduler(options, self._told, _PATIENCE) as scheduler:
            began = time.monotonic()
            while True:
                self._give_up(scheduler)
                while scheduler.free and (job := self._next(options, began)) is not None:
                    self._begin(scheduler, job)
                if self._running:
                    self._step(scheduler)
                elif (job := self._first()) is None or job.options is not options:
                    return
                else:
                    began = time.monotonic()

    def _next(self, options: Options, began: float) -> Job | None:
        """Take the group's oldest waiting job out of the queue; None: it has none, or must let another group in."""
        with self._changed:
            if not self._waiting:
                return None
            if self._waiting[0].options is not options and time.monotonic() - began >= self.turn:
                return None
            job = next((job for job in self._waiting if job.options is options), None)
            if job is not None:
                self._waiting.remove(job)
            return job

    def _begin(self, scheduler: Scheduler, job: Job) -> None:
        self._named += 1
        self._running[self._named] = job
        job.row = scheduler.admit(self._named, job.prompt, job.seed, job.gen_length)
        self.metrics.prompt_tokens.inc(len(job.prompt))
        self.metrics.queue_seconds.observe(time.monotonic() - job.arrived)

    def _step(self, scheduler: Scheduler) -> None:
        finished = scheduler.step()
        self.metrics.passes.inc()
        for result in finished:
            self._finish(self._running.pop(result.index), result.passes)
        for name, job in list(self._running.items()):
            if job.answer.finish_reason is not None:  # a stop string, or an end id with end of text off
                del self._running[name]
                self._finish(job, scheduler.cancel(job.row))
        scheduler.check()
        self._flush()

    def _told(self, name: int, tokens: Tensor) -> None:
        """A block of a job is committed."""
        job = self._running[name]
        if not job.heard:
            job.heard = True
            self.metrics.first_block_seconds.observe(time.monotonic() - job.arrived)
        if job.answer.finish_reason is None and (text := job.answer.feed(tokens.tolist())):
            self._outbox.append((job, Event(job.index, text)))

    def _finish(self, job: Job, passes: int) -> None:
        job.passes = passes
        self.metrics.completion_tokens.inc(job.answer.tokens)
        self.metrics.tokens_per_forward.observe(job.answer.tokens / passes)
        self.metrics.request_seconds.observe(time.monotonic() - job.arrived)
        self._outbox.append((job, Event(job.index, done=True)))

    def _give_up(self, scheduler: Scheduler) -> None:
        """Free the rows of jobs that nobody waits for or whose time is over; drop such waiting ones."""
        now, late = (
            time.monotonic(),
            ApiError(
                503,
                "the request took longer than this server allows",
                code="timeout",
                headers={"x-should-retry": "false"},  # to OpenAI's client: another try would take as long
            ),
        )
        for name, job in list(self._running.items()):
            if job.gone or job.deadline < now:
                del self._running[name]
                scheduler.cancel(job.row)
                if not job.gone:
                    self._fail(job, late)
        with self._changed:
            while self._waiting and self._waiting[0].deadline < now:  # they came in the order of their deadlines
                self._fail(self._waiting.popleft(), late)
        self._flush()

    def _fail(self, job: Job, error: ApiError) -> None:
        self._outbox.append((job, Event(job.index, error=error)))

    def _flush(self) -> None:
        """Send what there is, once a step: each call wakes the receiver's thread."""
        if self._outbox:
            outbox, self._outbox = self._outbox, []
            self.post(outbox)

"""The engine's thread: groups take turns, rows are given up, and a failure ends nothing but what it hit."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import ending_model, tiny_model
from test_scheduler import alone, options, prompts
from test_serve_text import Bytes

from dllm_engine import Engine, LLaDA
from dllm_engine.continuous import Scheduler
from dllm_engine.integrations.serve_errors import ApiError
from dllm_engine.integrations.serve_metrics import Metrics
from dllm_engine.integrations.serve_text import Answer
from dllm_engine.integrations.serve_worker import Event, Job, Worker


class Desk:
    """A worker, and what came back from it."""

    def __init__(self, model: LLaDA, *, rows: int = 2, begin: bool = True, **settings: Any) -> None:
        self.model, self.metrics = model, Metrics()
        self.engine = Engine(model, max_batch=rows, max_length=40)
        self.order: list[Job] = []  # as they were finished
        self.events: list[tuple[Job, Event]] = []
        self.changed = threading.Condition()
        self.worker = Worker(self.engine, self.metrics, self.post, **{"max_queue": 100} | settings)
        self.alive = begin
        if begin:
            self.worker.start()

    def post(self, events: list[tuple[Job, Event]]) -> None:
        with self.changed:
            self.events += events
            self.order += [job for job, event in events if event.done or event.error]
            self.changed.notify_all()

    def job(self, prompt: list[int], group: Any, seed: int = 0, gen_length: int = 32, seconds: float = 100) -> Job:
        answer = Answer(Bytes(), self.model.end_ids, max_tokens=gen_length)
        deadline = time.monotonic() + seconds
        return Job(0, prompt, seed, gen_length, group, answer, deadline, lambda event: None)

    def wait(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.order) >= count, 60)

    def error(self, job: Job) -> ApiError | None:
        return next(event.error for other, event in self.events if other is job and (event.done or event.error))

    def value(self, name: str) -> float:
        found = self.metrics.registry.get_sample_value(name)
        assert found is not None
        return found


@pytest.fixture(scope="module")
def model() -> LLaDA:
    return ending_model()


@pytest.fixture
def desk(model: LLaDA) -> Iterator[Desk]:
    desk = Desk(model)
    yield desk
    desk.worker.stop()
    desk.worker.join(60)
    assert not desk.worker.is_alive()


def test_every_job_gets_its_own_answer(model: LLaDA, desk: Desk) -> None:
    group, given = options(model, temperature=0.8), prompts(11)
    jobs = [desk.job(prompt, group, 40 + i, (8, 32, 16)[i % 3]) for i, prompt in enumerate(given)]
    for job in jobs:
        desk.worker.submit([job])
    desk.wait(11)
    for i, job in enumerate(jobs):
        tokens, passes = alone(model, given[i], 40 + i, job.gen_length, policy="threshold", temperature=0.8)
        generated = tokens[len(given[i]) :]
        until = next((n for n, token in enumerate(generated) if token in model.end_ids), len(generated))
        assert (job.answer._ids, job.passes) == (generated[:until], passes)
        pieces = "".join(event.text for other, event in desk.events if other is job)
        assert pieces == job.answer.text == Bytes().decode(generated[:until])
    assert desk.value("dllm_completion_tokens_total") == sum(job.answer.tokens for job in jobs)
    assert desk.value("dllm_prompt_tokens_total") == sum(map(len, given))
    assert desk.value("dllm_request_seconds_count") == desk.value("dllm_queue_seconds_count") == 11
    assert max(job.passes for job in jobs) <= desk.value("dllm_forward_passes_total") < sum(job.passes for job in jobs)


def test_groups_take_turns_and_the_oldest_is_never_passed_by_for_long(model: LLaDA) -> None:
    desk = Desk(model, begin=False, turn=0.0)
    one, other = options(model), options(model, cache="none")
    order = [one, other, one, one, other, one]
    jobs = [desk.job(prompt, group) for prompt, group in zip(prompts(6), order, strict=True)]
    desk.worker.is_alive = lambda: True  # type: ignore[method-assign]
    desk.worker.submit(jobs)
    del desk.worker.is_alive  # type: ignore[attr-defined]
    desk.worker.start()
    desk.wait(6)
    done = [desk.order.index(job) for job in jobs]
    assert done[0] < done[1], "the oldest first"
    assert done[1] < min(done[2], done[3]), "a turn without time: nobody of the group may pass the other's oldest"
    assert desk.value("dllm_groups_total") >= 3
    desk.worker.stop()
    desk.worker.join()

    patient = Desk(model, begin=False, turn=100.0)
    jobs = [patient.job(prompt, group) for prompt, group in zip(prompts(6), order, strict=True)]
    patient.worker.is_alive = lambda: True  # type: ignore[method-assign]
    patient.worker.submit(jobs)
    del patient.worker.is_alive  # type: ignore[attr-defined]
    patient.worker.start()
    patient.wait(6)
    assert {patient.order.index(jobs[i]) for i in (0, 2, 3, 5)} == {0, 1, 2, 3}, (
        "within its turn a group fills its rows"
    )
    assert patient.value("dllm_groups_total") == 2
    patient.worker.stop()
    patient.worker.join()


def test_jobs_that_nobody_waits_for_free_their_rows(model: LLaDA, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = options(model, policy="topk", end_of_text="off")
    left = [desk.job(prompt, slow) for prompt in prompts(6, seed=1)]
    kept = [desk.job(prompt, slow) for prompt in prompts(2, seed=2)]
    begin = desk.worker._begin

    def begun(scheduler: Scheduler, job: Job) -> None:
        begin(scheduler, job)
        if job in left:
            desk.worker.cancel(job)

    monkeypatch.setattr(desk.worker, "_begin", begun)
    desk.worker.submit([*left, *kept])
    desk.wait(2)
    assert set(desk.order) == set(kept)
    assert desk.worker.waiting == desk.worker.running == 0
    assert desk.value("dllm_forward_passes_total") <= 3 + 2 * 32, "a row is free after a call"


def test_jobs_whose_time_is_over(model: LLaDA, desk: Desk) -> None:
    slow = options(model, policy="topk", end_of_text="off")
    late = [desk.job(prompt, slow, seconds=0.0) for prompt in prompts(3)]
    good = desk.job([4, 5], slow)
    desk.worker.submit([*late, good])
    desk.wait(4)
    assert desk.error(good) is None
    for job in late:
        error = desk.error(job)
        assert error is not None
        assert (error.status, error.code) == (503, "timeout")


def test_a_job_whose_time_is_over_is_told_so_while_it_waits(model: LLaDA, desk: Desk) -> None:
    slow, other = options(model, policy="topk", end_of_text="off"), options(model)
    jobs = [desk.job([4, 5], slow), desk.job([6], slow), desk.job([7], other, seconds=0.0)]
    desk.worker.submit(jobs)
    desk.wait(3)
    assert desk.order[0] is jobs[2]


def test_a_full_queue_takes_all_or_none(model: LLaDA) -> None:
    desk = Desk(model, begin=False, max_queue=3)
    group = options(model)
    with pytest.raises(ApiError, match="the server is stopping"):
        desk.worker.submit([desk.job([4], group)])
    desk.worker.is_alive = lambda: True  # type: ignore[method-assign]
    desk.worker.submit([desk.job([4], group), desk.job([5], group)])
    with pytest.raises(ApiError, match="the queue is full: 2 prompts wait, 3 may") as caught:
        desk.worker.submit([desk.job([4], group), desk.job([5], group)])
    assert (caught.value.status, caught.value.headers) == (429, {"Retry-After": "1"})
    desk.worker.submit([desk.job([6], group)])
    assert desk.worker.waiting == 3
    desk.worker.cancel(desk.worker._waiting[-1])
    desk.worker.submit([desk.job([7], group)])
    desk.worker.stop()  # what was taken is finished
    del desk.worker.is_alive  # type: ignore[attr-defined]
    desk.worker.start()
    desk.worker.join(60)
    assert [event.error for _, event in desk.events if event.done or event.error] == [None] * 3
    with pytest.raises(ApiError, match="the server is stopping"):
        desk.worker.submit([desk.job([4], group)])


def test_nan_fails_what_runs_and_nothing_after(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model(seed=5)
    clean = tiny_model(seed=5)
    model.lm_head[33] = clean.lm_head[33] = 0.0  # not to be generated
    model.wte.weight[33] = float("nan")
    desk, group = Desk(model), options(model)
    bad = desk.job([8, 33, 9], group)
    desk.worker.submit([bad])
    desk.wait(1)
    error = desk.error(bad)
    assert error is not None
    assert error.status == 500
    assert "no valid token for prompt 1 at position 3" in str(error)
    after = [desk.job(prompt, group) for prompt in ([4, 5], [7] * 8, [3])]
    desk.worker.submit(after)
    desk.wait(4)
    for job in after:
        assert desk.error(job) is None
        tokens, _ = alone(clean, job.prompt, 0, 32, policy="threshold")
        assert job.answer._ids == tokens[len(job.prompt) :][: job.answer.tokens]
    desk.worker.stop()
    desk.worker.join()


def test_a_group_that_cannot_begin_fails_its_jobs_and_no_other(
    model: LLaDA, desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    impossible = options(model, gen_length=40)  # max_length leaves no room for a prompt
    bad, good = desk.job([4], impossible, gen_length=40), desk.job([4], options(model))
    desk.worker.submit([bad, good])
    desk.wait(2)
    error = desk.error(bad)
    assert error is not None
    assert error.status == 500
    assert desk.error(good) is None

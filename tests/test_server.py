"""The server, asked by OpenAI's own client."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from serving import Served, serving

from dllm_engine import LLaDA, decode
from dllm_engine.continuous import Scheduler
from dllm_engine.outputs import Generated
from dllm_engine.tokenizer import encode_prompt

REVERSE = "Reverse: 0 Alan Wells, 1 Grace Wright, 2 Amy Ford"
ANSWER = "Amy Ford, Grace Wright, Alan Wells"
SUM = (
    "Jacob starts with 3 books. then Jacob finds 10 more books. then Jacob gives 6 books back."
    " then Jacob gives 2 books away. how many books are left?"
)
FIELDS = {"policy": "threshold=0.8", "cache": "prefix", "block_length": 8, "end_of_text": "predicted"}


@pytest.fixture(scope="module")
def served(demo_model: LLaDA) -> Iterator[Served]:
    with serving(demo_model, max_batch=4) as served:
        yield served


@pytest.fixture
def client(served: Served) -> Any:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def alone(model: LLaDA, text: str, limit: int = 128, *, chat: bool = True, **settings: Any) -> dict[str, Any]:
    """What the server must say, from a decode of the prompt alone."""
    prompt = encode_prompt(model.tokenizer, text, chat=chat)
    block = settings.setdefault("block_length", 32)
    if settings.get("policy") == "threshold=0.8":
        from dllm_engine.policies import Threshold

        settings["policy"] = Threshold(0.8)
    out = decode(model, [prompt], gen_length=-(-limit // block) * block, **settings)
    ids = out.sequences[0, len(prompt) :].tolist()[:limit]
    until = next((i for i, token in enumerate(ids) if token in model.end_ids), None)
    return {
        "text": model.tokenizer.decode(ids[:until], skip_special_tokens=True),
        "reason": "length" if until is None else "stop",
        "usage": (len(prompt), limit if until is None else until, int(out.sequence_passes[0])),
    }


def seen(answer: Any) -> dict[str, Any]:
    choice, usage = answer.choices[0], answer.usage
    text = choice.message.content if hasattr(choice, "message") else choice.text
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    figures = (usage.prompt_tokens, usage.completion_tokens, usage.forward_passes)
    return {"text": text, "reason": choice.finish_reason, "usage": figures}


def streamed(chunks: Any, *, chat: bool) -> tuple[list[str], str, Any]:
    """Pieces of text, finish reason, usage."""
    pieces, reason, usage, first = [], None, None, True
    for chunk in chunks:
        if not chunk.choices:
            usage = chunk.usage
            continue
        assert (usage, chunk.usage) == (None, None)
        (choice,) = chunk.choices
        assert reason is None, "nothing comes after the reason"
        if first and chat:
            assert (choice.delta.role, choice.delta.content) == ("assistant", "")
        elif choice.finish_reason is None:
            pieces.append(choice.delta.content if chat else choice.text)
        first, reason = False, choice.finish_reason
    return pieces, reason, usage


# -- answers ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Model calls of at least 20 ms: a fast machine is through with a request before anything can happen to it."""
    step = Scheduler.step

    def slow_step(scheduler: Scheduler) -> list[Generated]:
        time.sleep(0.02)
        return step(scheduler)

    monkeypatch.setattr(Scheduler, "step", slow_step)


def test_chat(demo_model: LLaDA, client: Any) -> None:
    answer = client.chat.completions.create(model="demo", messages=user(REVERSE), seed=1)
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].message.role == "assistant"
    assert (answer.model, answer.object) == ("demo", "chat.completion")
    assert answer.id.startswith("chatcmpl-")
    assert abs(answer.created - time.time()) < 60
    assert seen(answer) == alone(demo_model, REVERSE, seed=1)


@pytest.mark.parametrize("limit", [1, 8, 33, 128])
@pytest.mark.parametrize(
    "settings", [{}, FIELDS, {"temperature": 0.9, "policy": "topk"}, {"policy": "adablock"}, {"policy": "ete"}], ids=str
)
def test_answers_equal_the_decode_alone(demo_model: LLaDA, client: Any, limit: int, settings: dict[str, Any]) -> None:
    body = {key: value for key, value in settings.items() if key != "temperature"}
    heat = {"temperature": settings["temperature"]} if "temperature" in settings else {}
    expected = alone(demo_model, SUM, limit, seed=7, **settings)
    answer = client.chat.completions.create(
        model="demo", messages=user(SUM), seed=7, max_completion_tokens=limit, extra_body=body, **heat
    )
    if settings.get("policy") == "adablock" and limit < 32:  # the limit may lie in one of its earlier, shorter blocks
        assert seen(answer)["usage"][2] <= expected["usage"][2]
        expected["usage"] = (*expected["usage"][:2], seen(answer)["usage"][2])
    assert seen(answer) == expected
    stream = client.chat.completions.create(
        model="demo", messages=user(SUM), seed=7, max_tokens=limit, extra_body=body, stream=True,
        stream_options={"include_usage": True}, **heat,
    )  # fmt: skip
    pieces, reason, usage = streamed(stream, chat=True)
    figures = (usage.prompt_tokens, usage.completion_tokens, usage.forward_passes)
    assert {"text": "".join(pieces), "reason": reason, "usage": figures} == expected
    if body == FIELDS and limit > 32:
        assert len(pieces) > 1, "blocks are told as they commit"


def test_completions(demo_model: LLaDA, client: Any) -> None:
    expected = [alone(demo_model, text, 32, chat=False, seed=3 + i) for i, text in enumerate((REVERSE, SUM))]
    answer = client.completions.create(model="demo", prompt=REVERSE, max_tokens=32, seed=3)
    assert seen(answer) == expected[0]
    assert (answer.object, answer.id[:5]) == ("text_completion", "cmpl-")
    ids = encode_prompt(demo_model.tokenizer, SUM, chat=False)
    assert seen(client.completions.create(model="demo", prompt=ids, max_tokens=32, seed=4)) == expected[1]
    both = client.completions.create(model="demo", prompt=[REVERSE, SUM], max_tokens=32, seed=3)
    assert [(c.index, c.text, c.finish_reason) for c in both.choices] == [
        (i, one["text"], one["reason"]) for i, one in enumerate(expected)
    ]
    assert both.usage.completion_tokens == sum(one["usage"][1] for one in expected)
    pieces, reason, usage = streamed(
        client.completions.create(model="demo", prompt=SUM, max_tokens=32, seed=4, stream=True), chat=False
    )
    assert ("".join(pieces), reason, usage) == (expected[1]["text"], expected[1]["reason"], None)
    texts: dict[int, str] = {}
    for chunk in client.completions.create(
        model="demo", prompt=[REVERSE, ids], max_tokens=32, seed=3, stream=True, extra_body={"block_length": 8}
    ):
        texts[chunk.choices[0].index] = texts.get(chunk.choices[0].index, "") + chunk.choices[0].text
    assert texts == {
        i: alone(demo_model, text, 32, chat=False, seed=3 + i, block_length=8)["text"]
        for i, text in enumerate((REVERSE, SUM))
    }


@pytest.mark.parametrize("block_length", [4, 32])
def test_stop_strings(demo_model: LLaDA, served: Served, client: Any, block_length: int) -> None:
    whole = alone(demo_model, SUM, block_length=block_length)
    at = whole["text"].index("13.")
    settings: dict[str, Any] = {"model": "demo", "messages": user(SUM), "stop": ["nowhere", "13."]}
    extra = {"block_length": block_length}
    answer = seen(client.chat.completions.create(**settings, extra_body=extra))
    assert (answer["text"], answer["reason"]) == (whole["text"][:at], "stop")
    assert answer["usage"][1] < whole["usage"][1]
    if block_length == 4:
        assert answer["usage"][2] < whole["usage"][2], "the row was given up"
    pieces, reason, _ = streamed(client.chat.completions.create(**settings, extra_body=extra, stream=True), chat=True)
    assert ("".join(pieces), reason) == (whole["text"][:at], "stop")
    served.until_idle()


def test_content_in_parts_and_an_answer_given_back(client: Any) -> None:
    parts = [{"type": "text", "text": REVERSE[:20]}, {"type": "text", "text": REVERSE[20:]}]
    answer = client.chat.completions.create(model="demo", messages=[{"role": "user", "content": parts}])
    assert answer.choices[0].message.content == ANSWER
    talk = [*user(REVERSE), answer.choices[0].message.model_dump(), *user(REVERSE)]
    assert client.chat.completions.create(model="demo", messages=talk).usage.prompt_tokens > 40


def test_many_clients_at_once_get_what_they_get_alone(demo_model: LLaDA, served: Served, client: Any) -> None:
    """More than rows, in three groups, streaming and not."""
    kinds: list[dict[str, Any]] = [{}, {"policy": "topk=8"}, {"cache": "none"}]
    limits, answers, failures = (16, 40, 96), dict[int, Any](), []

    def ask(i: int) -> None:
        try:
            answers[i] = seen(
                client.chat.completions.create(
                    model="demo", messages=user(SUM if i % 2 else REVERSE), max_tokens=limits[i % 3], seed=i,
                    extra_body=kinds[i % 5 % 3],
                )
            )  # fmt: skip
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failures
    for i, answer in answers.items():
        limit = limits[i % 3]
        settings = dict(kinds[i % 5 % 3])
        if settings.pop("policy", None):
            settings |= {"policy": "topk", "steps": -(-limit // 32) * 4}
        assert answer == alone(demo_model, SUM if i % 2 else REVERSE, limit, seed=i, **settings)
    served.until_idle()


def test_control_tokens_are_text(client: Any) -> None:
    """An end token that ended the question would cut it; the mask would be a hole to fill in."""
    plain = client.chat.completions.create(model="demo", messages=user("Copy: 0 Amy Ford, 1 zzz, 2 Alan Wells"))
    for name in ("<|mdm_mask|>", "<|endoftext|>", "<|eot_id|>", "<|unknown|>"):
        asked = client.chat.completions.create(model="demo", messages=user(f"Copy: 0 Amy Ford, 1 {name}, 2 Alan Wells"))
        assert asked.usage.prompt_tokens == plain.usage.prompt_tokens, "a word that the vocabulary does not have"
        assert asked.choices[0].message.content == plain.choices[0].message.content


@pytest.mark.parametrize(
    "text", ["数学 🙂 é", "\x00\x01\x1f\x7f", "\u202e\ufeff\u200b", "\ud7ff\ue000\uffff", "a" * 3000]
)
def test_any_text_is_answered(client: Any, text: str) -> None:
    answer = client.chat.completions.create(model="demo", messages=user(text), max_tokens=8)
    assert answer.choices[0].finish_reason in ("stop", "length")


@pytest.mark.parametrize(("texts", "inline"), [([""] * 200, True), ([""] * 201, False), (["a" * 20_000], False)])
def test_long_work_is_not_done_on_the_loop(
    served: Served, client: Any, monkeypatch: pytest.MonkeyPatch, texts: list[str], inline: bool
) -> None:
    """Many texts take long, too, whatever is in them."""
    on_loop: list[bool] = []

    def encode(messages: Any) -> Any:
        with contextlib.suppress(RuntimeError):
            on_loop.append(bool(asyncio.get_running_loop()))
        raise ValueError("nothing to decode")

    monkeypatch.setattr(served.server.encoder, "chat", encode)
    with pytest.raises(openai.BadRequestError, match="nothing to decode"):
        client.chat.completions.create(model="demo", messages=[user(text)[0] for text in texts])
    assert on_loop == [True] * inline


def test_models_health_and_metrics(served: Served, client: Any) -> None:
    import httpx

    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").owned_by == "dllm-engine"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")
    health = httpx.get(f"{served.url}/health").json()
    assert health == {"status": "ok", "running": 0, "waiting": 0}
    before = served.metric("dllm_requests_total", endpoint="/v1/chat/completions", status="200")
    answer = client.chat.completions.create(model="demo", messages=user(SUM))
    text = httpx.get(f"{served.url}/metrics").text
    for name in (
        "dllm_requests_total", "dllm_rows_running", "dllm_queue_length", "dllm_prompt_tokens_total",
        "dllm_completion_tokens_total", "dllm_forward_passes_total", "dllm_groups_total",
        "dllm_tokens_per_forward_bucket", "dllm_queue_seconds_bucket", "dllm_first_block_seconds_bucket",
        "dllm_request_seconds_bucket",
    ):  # fmt: skip
        assert f"\n{name}" in text
    served.until("dllm_requests_total", before + 1, endpoint="/v1/chat/completions", status="200")
    assert served.metric("dllm_forward_passes_total") >= answer.usage.forward_passes


# -- clients that leave, limits, the end ------------------------------------------------------------------------------


def _post(body: bytes, path: str = "/v1/chat/completions") -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body


SLOW = (
    b'{"model": "demo", "policy": "topk", "end_of_text": "off", "max_tokens": 128, "stream": %b,'
    b' "messages": [{"role": "user", "content": "Copy: 0 Amy Ford"}]}'
)


@pytest.mark.parametrize("stream", [b"true", b"false"])
def test_clients_that_leave_free_their_rows(demo_model: LLaDA, slow_steps: None, stream: bytes) -> None:
    with serving(demo_model, max_batch=2) as served:
        for _ in range(6):
            served.raw(_post(SLOW % stream), leave=True)
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        assert client.chat.completions.create(model="demo", messages=user(REVERSE)).choices[0].message.content == ANSWER
        served.until_idle()
        assert served.metric("dllm_completion_tokens_total") == 8, "nobody's answer was finished for nobody"
        served.until("dllm_requests_total", 6, endpoint="/v1/chat/completions", status="499")


def test_a_stream_that_is_closed_midway(served: Served, client: Any) -> None:
    stream = client.chat.completions.create(
        model="demo", messages=user(SUM), stream=True,
        extra_body={"block_length": 4, "policy": "topk", "end_of_text": "off"},
    )  # fmt: skip
    next(iter(stream))
    stream.close()
    served.until_idle()


def test_a_full_queue(demo_model: LLaDA, slow_steps: None) -> None:
    with serving(demo_model, max_batch=1, max_queue=2) as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        answered: list[Any] = []
        refused: list[openai.RateLimitError] = []
        slow = {"block_length": 1, "policy": "topk", "cache": "none", "end_of_text": "off"}

        def ask(stream: bool) -> None:
            try:
                answered.append(
                    list(
                        client.chat.completions.create(
                            model="demo", messages=user(REVERSE), stream=stream, extra_body=slow
                        )
                    )
                )
            except openai.RateLimitError as error:
                refused.append(error)

        threads = [threading.Thread(target=ask, args=(bool(i % 2),)) for i in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(answered) + len(refused) == 12
        assert len(answered) >= 2  # what the queue holds; a third, if a row was free before the others came
        assert refused
        for error in refused:
            assert error.response.headers["retry-after"] == "1"
            assert (error.code, error.type) == ("queue_full", "rate_limit_error")
        patient = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=5)
        assert patient.chat.completions.create(model="demo", messages=user(REVERSE)).choices[0].message.content


def test_requests_that_take_too_long(demo_model: LLaDA, slow_steps: None) -> None:
    with serving(demo_model, max_batch=1, timeout=0.1) as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=2)
        slow = {"block_length": 1, "policy": "topk", "cache": "none", "end_of_text": "off"}
        ask: dict[str, Any] = {"model": "demo", "messages": user(REVERSE), "extra_body": slow}
        with pytest.raises(openai.InternalServerError, match="took longer than this server allows") as caught:
            client.chat.completions.create(**ask)
        assert (caught.value.status_code, caught.value.code) == (503, "timeout")
        with pytest.raises(openai.APIError, match="took longer than this server allows"):
            list(client.chat.completions.create(**ask, stream=True))
        told = {"endpoint": "/v1/chat/completions", "status": "503"}
        served.until("dllm_requests_total", 2, **told)
        assert served.metric("dllm_requests_total", **told) == 2, "the client is told not to try again"


def test_a_stopping_server_finishes_what_it_took(demo_model: LLaDA) -> None:
    answers: list[Any] = []
    with serving(demo_model, max_batch=2) as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        ask = {"model": "demo", "messages": user(SUM), "extra_body": {"policy": "topk", "block_length": 8}}
        threads = [
            threading.Thread(target=lambda: answers.append(client.chat.completions.create(**ask))) for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 60
        while served.server.accepted < 6:
            assert time.monotonic() < deadline
            time.sleep(0.001)
    for thread in threads:
        thread.join(60)
    assert len(answers) == served.server.answered == 6
    assert {seen(answer)["text"] for answer in answers} == {
        alone(demo_model, SUM, policy="topk", block_length=8)["text"]
    }

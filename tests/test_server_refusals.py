"""What the server refuses: with the field's name, in OpenAI's words, and never with a 5xx."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import Served, serving

from dllm_engine import LearnedFilter, LLaDA
from dllm_engine.built_in import DEMO_MODEL
from dllm_engine.integrations.serve_errors import ApiError
from dllm_engine.integrations.serve_protocol import CompletionRequest
from dllm_engine.integrations.serve_settings import Planner, Settings
from dllm_engine.integrations.serve_worker import Job
from dllm_engine.integrations.server import create_app

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
GOOD: dict[str, Any] = {"model": "demo", "max_tokens": 8, "messages": [{"role": "user", "content": "Copy: 0 Amy Ford"}]}


@pytest.fixture(scope="module")
def served(demo_model: LLaDA) -> Iterator[Served]:
    with serving(demo_model, max_body=100_000) as served:
        yield served


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[Any]:
    with httpx.Client(base_url=served.url, timeout=60) as client:
        yield client


def refusal(response: Any, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == ("rate_limit_error" if status == 429 else "invalid_request_error")
    return error


def message(**changes: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "Copy"} | changes]


@pytest.mark.parametrize(
    ("changes", "param", "says"),
    [
        ({"model": 5}, "model", "model: Input should be a valid string"),
        ({"model": None}, "model", "model: Input should be a valid string"),
        ({"messages": "hello"}, "messages", "messages: Input should be a valid array"),
        ({"messages": []}, "messages", "messages: an empty list given"),
        ({"messages": [5]}, "messages", "messages.0: Input should be"),
        ({"messages": [{"role": "user"}]}, "messages", "messages.0.content: a text, or a list of text parts"),
        ({"messages": message(content=None)}, "messages", "messages.0.content: a text"),
        ({"messages": message(content=[{"type": "image_url"}])}, "messages", "only parts of type text"),
        ({"messages": message(content=[{"type": "text", "text": 3}])}, "messages", "messages.0.content: a text"),
        ({"messages": message(role="user<|eot_id|>")}, "messages", "messages.0.role: 'user<|eot_id|>' given; known"),
        ({"messages": message(tool_calls=[{"id": "x"}])}, "messages", "messages.0.tool_calls: not supported"),
        (
            {"messages": message(content="Copy " * 300)},
            "messages",
            "tokens given; this server takes prompts of at most",
        ),
        ({"max_tokens": 0}, "max_tokens", "max_tokens: 0 given; 1 to 128 allowed"),
        ({"max_tokens": 129}, "max_tokens", "max_tokens: 129 given; 1 to 128 allowed"),
        ({"max_tokens": 10**30}, "max_tokens", "1 to 128 allowed"),
        ({"max_tokens": "8"}, "max_tokens", "max_tokens: Input should be a valid integer"),
        ({"max_tokens": 8.5}, "max_tokens", "max_tokens: Input should be a valid integer"),
        ({"max_tokens": True}, "max_tokens", "max_tokens: Input should be a valid integer"),
        ({"max_completion_tokens": 9}, "max_tokens", "max_completion_tokens: max_tokens says otherwise"),
        ({"block_length": 48, "max_tokens": 100}, "max_tokens", "max_tokens: 100 given; 1 to 96 allowed"),
        ({"temperature": -1}, "temperature", "temperature: -1.0 given; 0 to 2 allowed"),
        ({"temperature": 2.1}, "temperature", "0 to 2 allowed"),
        ({"temperature": "hot"}, "temperature", "temperature: Input should be a valid number"),
        ({"temperature": 1, "policy": "credit"}, "temperature", "Credit decides without one"),
        ({"seed": -1}, "seed", "seed: -1 given"),
        ({"seed": 2**63}, "seed", "must lie in 0 to"),
        ({"seed": "x"}, "seed", "seed: Input should be a valid integer"),
        ({"stop": 5}, "stop", "stop: a text or a list of at most 4"),
        ({"stop": ["a"] * 5}, "stop", "stop: a text or a list of at most 4"),
        ({"stop": ["a", ""]}, "stop", "none empty"),
        ({"stop": ""}, "stop", "none empty"),
        ({"stream": "yes"}, "stream", "stream: Input should be a valid boolean"),
        ({"stream_options": {"include_usage": "x"}}, "stream_options", "stream_options.include_usage"),
        ({"policy": "nothing"}, "policy", "policy: 'nothing' given; known"),
        ({"policy": "oracle"}, "policy", "policy: 'oracle' given; known"),
        ({"policy": "threshold=2"}, "policy", "threshold: 2.0 given"),
        ({"policy": "topk=5"}, "policy", "tokens a step must divide"),
        ({"policy": "topk=64"}, "policy", "topk=64 given; tokens a step must divide block_length 32"),
        ({"policy": "freedave=20000"}, "policy", "drafts: 20000 given; 2 to 32 allowed"),
        ({"policy": "learn2pd="}, "policy", "policy: "),
        ({"policy": "learn2pd=/etc/passwd"}, "policy", "policy: a request cannot name a file"),
        ({"policy": "learn2pd=" + str(DEMO_MODEL)}, "policy", "policy: a request cannot name a file"),
        ({"cache": "big"}, "cache", "cache: 'big' given; known"),
        ({"cache": "none/4"}, "cache", "without a cache every call computes all"),
        ({"block_length": 0}, "block_length", "block_length: 0 given; 1 to 128 allowed"),
        ({"block_length": 129}, "block_length", "1 to 128 allowed"),
        ({"end_of_text": "maybe"}, "end_of_text", "end_of_text: 'maybe' given; known"),
        ({"n": True}, "n", "n: True given; this server does not support it, only 1"),
        ({"logprobs": 0}, "logprobs", "logprobs: 0 given; this server does not support it, only False"),
        (
            {"stream_options": {"include_obfuscation": True}},
            "stream_options",
            "include_obfuscation: Input should be False",
        ),
        ({"stream_options": {"x": True}}, "stream_options", "stream_options.x: Extra inputs are not permitted"),
        ({"n": 2}, "n", "n: 2 given; this server does not support it, only 1"),
        ({"logprobs": True}, "logprobs", "logprobs: True given; this server does not support it, only False"),
        ({"top_p": 0.5}, "top_p", "top_p: 0.5 given"),
        ({"tools": [{"type": "function"}]}, "tools", "tools: "),
        ({"tool_choice": "required"}, "tool_choice", "tool_choice: 'required' given"),
        ({"response_format": {"type": "json_object"}}, "response_format", "response_format: "),
        ({"frequency_penalty": 1}, "frequency_penalty", "only 0"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "logit_bias: "),
        ({"reasoning_effort": "low"}, "reasoning_effort", "does not support it"),
        ({"polciy": "topk"}, "polciy", "polciy: unknown parameter"),
    ],
    ids=str,
)
def test_a_field_that_is_wrong_is_named(client: Any, changes: dict[str, Any], param: str | None, says: str) -> None:
    error = refusal(client.post(CHAT, json=GOOD | changes))
    assert error["param"] == param
    assert says in error["message"]


@pytest.mark.parametrize(
    "prompt",
    [
        None,
        5,
        "",
        [],
        [[]],
        [["a"]],
        [1, "a"],
        [True],
        {"a": 1},
        [-1],
        [514],
        [2**70],
        [[1], [2**70]],
        ["a", ""],
        [1.5],
    ],
    ids=str,
)
def test_prompts_that_are_wrong(client: Any, prompt: Any) -> None:
    error = refusal(client.post(TEXT, json={"model": "demo", "max_tokens": 8, "prompt": prompt}))
    assert error["param"] == "prompt"


def test_log_probabilities_are_refused(client: Any) -> None:
    error = refusal(client.post(TEXT, json={"model": "demo", "max_tokens": 8, "prompt": "Copy", "logprobs": 0}))
    assert error["param"] == "logprobs"


def test_too_many_prompts(client: Any) -> None:
    error = refusal(client.post(TEXT, json={"model": "demo", "max_tokens": 8, "prompt": ["Copy"] * 257}))
    assert error["message"] == "prompt: 257 given; this server takes 256 at once"


def test_fields_that_ask_for_nothing_are_taken(client: Any) -> None:
    extra = {
        "n": 1, "top_p": 1.0, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "logprobs": False,
        "tools": [], "tool_choice": "none", "user": "someone", "metadata": {"a": "b"}, "store": False,
        "response_format": {"type": "text"}, "parallel_tool_calls": True, "reasoning_effort": None, "stop": None,
        "stream": None, "stream_options": None, "seed": None, "temperature": None, "max_completion_tokens": 8,
        "policy": None,
    }  # fmt: skip
    assert client.post(CHAT, json=GOOD | extra).status_code == 200
    said = {"stream_options": {"include_usage": False, "include_obfuscation": False}}
    assert client.post(CHAT, json=GOOD | said).status_code == 200
    extra = {"echo": False, "best_of": 1, "suffix": None, "logprobs": None}
    assert client.post(TEXT, json={"model": "demo", "prompt": "Copy", "max_tokens": 8, **extra}).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"null", b"[]", b"5", b'"x"', b"\xff\xfe", b"\x00", b'{"model": "demo"', b"{'model': 'demo'}",
        b'{"model": "demo", "messages": [{"role": "user", "content": "\\ud800"}]}', b"[" * 50_000,
        b'{"a":' * 10_000, b'{"model": "demo", "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"model": "demo", "temperature": NaN, "messages": [{"role": "user", "content": "Copy"}]}',
        b'{"model": "demo", "temperature": 1e999, "messages": [{"role": "user", "content": "Copy"}]}',
        b"--boundary\r\nContent-Disposition: form-data\r\n\r\nx\r\n",
    ],
    ids=lambda body: repr(body[:40]),
)  # fmt: skip
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_bodies_that_are_no_request(client: Any, path: str, body: bytes) -> None:
    refusal(client.post(path, content=body, headers={"content-type": "application/json"}))


def test_other_content_types_paths_and_methods(client: Any) -> None:
    """A page in a browser can send text/plain to this machine without asking it first."""
    body = json.dumps(GOOD)
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        error = refusal(client.post(CHAT, content=body, headers={"content-type": kind}))
        assert "application/json is needed" in error["message"]
    good = {"content-type": "Application/JSON; charset=utf-8"}
    assert client.post(CHAT, content=body, headers=good).status_code == 200
    refusal(client.post("/v1/embeddings", json={}), 404)
    assert refusal(client.get("/"), 404)["code"] == "not_found"
    for response, allowed in ((client.get(CHAT), {"POST"}), (client.delete("/v1/models"), {"GET", "HEAD"})):
        error = refusal(response, 405)
        assert error["code"] == "method_not_allowed"
        assert error["message"].endswith(": not allowed")
        assert {*response.headers["allow"].split(", ")} == allowed
    assert refusal(client.post(CHAT, json=GOOD | {"model": "gpt-4o"}), 404)["code"] == "model_not_found"


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("size", [100_001, 5_000_000])
def test_huge_bodies(client: Any, size: int, chunked: bool) -> None:
    body = json.dumps(GOOD).encode() + b" " * size
    content = (body[i : i + 65536] for i in range(0, len(body), 65536)) if chunked else body
    try:
        response = client.post(CHAT, content=content, headers={"content-type": "application/json"})
    except httpx.TransportError:
        assert size > 8 * 100_000, "what is read in full is answered; what is far too long, is cut off"
    else:
        assert "100,000 bytes" in refusal(response, 413)["message"]
    fits = json.dumps(GOOD).encode().ljust(100_000)
    assert client.post(CHAT, content=fits, headers={"content-type": "application/json"}).status_code == 200


@pytest.mark.parametrize(
    "data",
    [b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"POST /v1/completions HTTP/9\r\n\r\n", b"x" * 100_000,
     b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
     b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"],
    ids=lambda data: repr(data[:30]),
)  # fmt: skip
def test_what_is_no_http(served: Served, client: Any, data: bytes) -> None:
    answer = served.raw(data)
    assert not answer or b" 400 " in answer.split(b"\r\n")[0], "refused, or closed"
    assert client.get("/health").status_code == 200


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
FIELDS = (
    "model", "messages", "prompt", "max_tokens", "temperature", "seed", "stop", "stream", "stream_options", "policy",
    "cache", "block_length", "end_of_text", "n", "tools", "logprobs", "top_p", "response_format", "user",
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=3), chat=st.booleans())
def test_no_request_gets_a_5xx(client: Any, changes: dict[str, Any], chat: bool) -> None:
    body = GOOD | changes if chat else {"model": "demo", "prompt": "Copy", "max_tokens": 8} | changes
    response = client.post(CHAT if chat else TEXT, json=body)
    assert response.status_code in (200, 400, 404), response.text


# -- the key ----------------------------------------------------------------------------------------------------------


def test_a_key(demo_model: LLaDA) -> None:
    with serving(demo_model, api_key=" se¢ret\n") as served, httpx.Client(base_url=served.url) as client:
        for header in (None, "", "Bearer", "Bearer wrong", "Basic secret", "se¢ret", "Bearer se¢re", "Bearer ¢"):
            headers = {} if header is None else {"authorization": header.encode()}
            for response in (client.post(CHAT, json=GOOD, headers=headers), client.get("/v1/models", headers=headers)):
                assert refusal(response, 401)["code"] == "invalid_api_key"
        assert client.post(CHAT, json=GOOD, headers={"authorization": "Bearer se¢ret".encode()}).status_code == 200
        assert client.get("/health").status_code == client.get("/metrics").status_code == 200
        with pytest.raises(openai.AuthenticationError, match="a wrong API key was given"):
            openai.OpenAI(base_url=f"{served.url}/v1", api_key="guess").models.list()


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"max_batch": 0}, "max_batch: 0 given; at least 1"),
        ({"max_queue": 0}, "max_queue: 0 given"),
        ({"max_body": -1}, "max_body: -1 given"),
        ({"timeout": 0}, "timeout: 0 given; a finite number, more than 0 seconds"),
        ({"temperature": 5.0}, "temperature: 5.0 given; 0 to 2 allowed"),
        ({"timeout": math.inf}, "timeout: inf given; a finite number"),
        ({"timeout": math.nan}, "timeout: nan given; a finite number"),
        ({"api_key": " "}, "api_key: an empty text given"),
        ({"max_length": 10}, "max_length: 10 given; a block of 32 and a prompt must fit into max_length 10"),
        ({"block_length": 5000}, "block_length: 5000 given; a block of 5000 and a prompt must fit"),
        ({"max_length": 2000}, "max_length: 2000 given; the model has max_sequence_length 1024"),
        ({"max_tokens": 40}, "max_tokens: 40 given; block_length 32 must divide it"),
        ({"max_tokens": 256}, "max_tokens: 256 given; max_length 256 leaves no room for a prompt"),
        ({"gen_length": 129}, "gen_length: 129 given; max_tokens allows 128"),
        ({"policy": "nothing"}, "policy: 'nothing' given"),
        ({"cache": "nothing"}, "cache: 'nothing' given"),
        ({"temperature": -1}, "temperature: -1"),
        ({"end_of_text": "nothing"}, "end_of_text: 'nothing' given"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit(demo_model: LLaDA, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        create_app(demo_model, Settings(**{"model_name": "demo", "max_length": 256} | changes))


def test_what_settings_are_by_default(demo_model: LLaDA) -> None:
    fitted = Settings("demo").fitted(demo_model)
    assert (fitted.max_length, fitted.max_tokens, fitted.gen_length) == (1024, 512, 128)
    fitted = Settings("demo", max_length=100).fitted(demo_model)
    assert (fitted.max_length, fitted.max_tokens, fitted.gen_length) == (100, 32, 32)
    assert Planner(demo_model, fitted).longest_prompt == 68


def test_a_generation_config_gives_the_servers_defaults(demo_model: LLaDA, monkeypatch: pytest.MonkeyPatch) -> None:
    beside = {"gen_length": 64, "block_length": 16, "policy": "threshold=0.7", "temperature": 0.5, "steps": 4}
    monkeypatch.setattr(demo_model, "generation_defaults", beside)
    planner = Planner(demo_model, Settings("demo", max_length=256).fitted(demo_model))
    job = planner.jobs(CompletionRequest(model="demo", prompt=""), [[4]], lambda event: None)[0]
    options = job.options
    assert (job.gen_length, options.block_length, options.temperature) == (64, 16, 0.5)
    assert repr(options.policy) == "Threshold(threshold=0.7)"
    assert options.steps == options.gen_length  # its static schedule is for one length, requests have many
    planner = Planner(demo_model, Settings("demo", max_length=256, block_length=8, policy="topk").fitted(demo_model))
    options = planner.jobs(CompletionRequest(model="demo", prompt=""), [[4]], lambda event: None)[0].options
    assert (options.block_length, repr(options.policy)) == (8, "TopK()")


def test_a_request_is_not_blamed_for_the_servers_policy(demo_model: LLaDA) -> None:
    planner = Planner(demo_model, Settings("demo", max_length=256, policy="topk=4").fitted(demo_model))
    request = CompletionRequest(model="demo", prompt="", block_length=6)
    with pytest.raises(ApiError) as error:
        planner.jobs(request, [[4]], lambda event: None)
    assert (error.value.status, error.value.param) == (400, "block_length")
    assert str(error.value).startswith("block_length: 6 given, which does not fit this server's policy: topk=4 given;")


def test_prompts_of_a_block_causal_model_are_counted_in_whole_blocks() -> None:
    model = LLaDA.from_pretrained(DEMO_MODEL, device="cpu", dtype="float32")
    model.config = replace(model.config, block_size=16, max_sequence_length=256)
    settings = Settings("demo").fitted(model)
    assert (settings.block_length, settings.max_length, settings.max_tokens) == (16, 256, 128)
    planner = Planner(model, settings)
    assert planner.jobs(CompletionRequest(model="demo", prompt=""), [[4] * 128], lambda event: None)
    # 120 tokens of an answer and 136 are not 256 in blocks of 24
    request = CompletionRequest(model="demo", prompt="", block_length=24)
    assert planner.jobs(request, [[4] * 120], lambda event: None)
    with pytest.raises(ApiError, match="a prompt of 128 tokens \\+ 120 exceeds .* 256, 240 of them in whole"):
        planner.jobs(request, [[4] * 120, [4] * 128], lambda event: None)


def test_what_a_generation_config_says_in_vain_is_told(demo_model: LLaDA, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model, "generation_defaults", {"steps": 4, "cfg_scale": 0.5, "policy": "topk"})
    with pytest.warns(UserWarning, match=r"generation_config.json: the server does not use steps and cfg_scale$"):
        create_app(demo_model, Settings("demo", max_length=256))


def test_which_requests_run_together(demo_model: LLaDA) -> None:
    planner = Planner(demo_model, Settings("demo", max_length=256).fitted(demo_model))

    def job(**fields: Any) -> Job:
        return planner.jobs(CompletionRequest(model="demo", prompt="", **fields), [[4]], lambda event: None)[0]

    one, other = job(max_tokens=20, policy="threshold"), job(max_tokens=128, policy="threshold", seed=3)
    assert one.options is other.options
    assert (one.gen_length, other.gen_length, one.options.gen_length) == (32, 128, 128)
    assert job(policy="threshold", temperature=0.5).options is not one.options
    for policy in ("adablock", "ete"):  # how far they look depends on the length
        assert [job(max_tokens=n, policy=policy).options.gen_length for n in (20, 32, 33)] == [32, 32, 64]
    kept = len(planner._kept)
    for i in range(200):
        job(temperature=i / 100)
        assert job(policy="threshold").options is one.options, "options in use were made anew"
    assert kept < len(planner._kept) == 64


def test_a_server_may_have_a_filter_of_its_own(demo_model: LLaDA, tmp_path: Path) -> None:
    for name in ("own", "other"):
        LearnedFilter(32, threshold=0.7).save_pretrained(tmp_path / name)
    own = f"learn2pd={tmp_path / 'own'}"
    planner = Planner(demo_model, Settings("demo", max_length=256, policy=own).fitted(demo_model))

    def options(**fields: Any) -> Any:
        return planner.jobs(CompletionRequest(model="demo", prompt="", **fields), [[4]], lambda event: None)[0].options

    assert options() is options(policy=own)
    assert options().policy.threshold == 0.7
    with pytest.raises(ApiError, match="a request cannot name a file"):
        options(policy=f"learn2pd={tmp_path / 'other'}")

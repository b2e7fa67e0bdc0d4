"""The page about the server is true: its commands run, and what it names is there."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dllm_engine import cli_serve
from dllm_engine.integrations.serve_metrics import Metrics

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "server.md").read_text(encoding="utf-8")
CLI = [sys.executable, "-c", "import sys; from dllm_engine.cli import main; sys.exit(main())"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def port() -> Iterator[str]:
    """Of the server that the page's command starts."""
    install, serve = blocks("sh")[0].splitlines()
    assert install == 'pip install "dllm-engine[serve]"'
    words = serve.replace("--port 8000", "--port 0").split()
    assert words[0] == "dllm-engine"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("DLLM_API_KEY", None)
    process = subprocess.Popen(
        CLI + words[1:], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        found = re.fullmatch(r"serving dllm-demo on http://127\.0\.0\.1:(\d+)/v1\n", said)
        assert found, (said, process.communicate()[1] if process.poll() is not None else "")
        assert said.strip().replace(found[1], "8000") in PAGE
        yield found[1]
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
        assert re.search(r"stopped: (\d+) requests accepted, \1 answered", errors)
        assert process.returncode in (0, -signal.SIGTERM)
    finally:
        process.kill()


def test_the_clients_snippets(port: str) -> None:
    said, names = io.StringIO(), dict[str, object]()
    with contextlib.redirect_stdout(said):
        for snippet in blocks("python"):
            exec(snippet.replace("8000", port), names)
    first, second, streamed = said.getvalue().split("\n")
    assert first == "Amy Ford, Grace Wright, Alan Wells"
    assert re.fullmatch(r"8 tokens in \d+ forward passes", second)
    pieces = streamed.split("|")
    assert "".join(pieces) == first
    assert sum(map(bool, pieces)) > 1


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_the_curl_commands(port: str) -> None:
    said = []
    for command in blocks("sh")[1:]:
        done = subprocess.run(
            ["bash", "-ec", command.replace("8000", port)], capture_output=True, text=True, check=True, timeout=60
        )
        said.append(done.stdout)
    assert '"content":"Amy Ford, Grace Wright, Alan Wells"' in said[0]
    assert '"status":"ok"' in said[1]
    assert "dllm_requests_total{" in said[1]


def test_options_and_metrics_of_the_page_are_there() -> None:
    parser = argparse.ArgumentParser()
    cli_serve.add_arguments(parser)
    options = set(parser._option_string_actions) | {"--model", "--device", "--dtype"}
    assert set(re.findall(r"--[a-z][a-z-]+", PAGE.partition("## Under load")[0])) <= options
    metrics = Metrics().text().decode()
    for name in re.findall(r"`(dllm_[a-z_]+)`", PAGE):
        assert f"# TYPE {name} " in metrics, name


@pytest.mark.parametrize(
    ("arguments", "key", "says"),
    [
        (["--host", "0.0.0.0"], None, "--host: 0.0.0.0 given; to listen beyond this machine, requests must need a key"),
        (["--host", "example.org"], None, "--host: example.org given"),
        ([], " ", "--api-key-env: DLLM_API_KEY is set but empty"),
        (["--api-key-env", "OTHER", "--host", "::"], None, "set OTHER"),
        (["--timeout", "inf"], None, "timeout: inf given; a finite number"),
        (["--port", "70000"], None, "--port: 70000 given; 0 to 65535 allowed"),
        (["--max-length", "9999"], None, "max_length: 9999 given; the model has max_sequence_length 1024"),
        (["--host", "192.0.2.1"], "key", "--host, --port: cannot listen on 192.0.2.1:0: "),
        (["--host", "nowhere.invalid"], "key", "--host, --port: cannot listen on nowhere.invalid:0: "),
    ],
    ids=str,
)
def test_a_command_that_is_wrong(
    arguments: list[str],
    key: str | None,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from dllm_engine.cli import main

    monkeypatch.delenv("DLLM_API_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("DLLM_API_KEY", key)
    assert main(["serve", "--port", "0", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from dllm_engine.cli import main

    monkeypatch.delitem(sys.modules, "dllm_engine.integrations.server", raising=False)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["serve"]) == 2
    assert 'pip install "dllm-engine[serve]"' in capsys.readouterr().err

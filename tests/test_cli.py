"""The command line, end to end on the demo model."""

from __future__ import annotations

import io
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError

import dllm_engine
from dllm_engine import LLaDA, cli, cli_options, tables, tasks
from dllm_engine.built_in import DEMO_MODEL
from dllm_engine.watch import Watch

PROMPT = "Reverse: 0 Alan Wells, 1 Grace Wright, 2 Emma Reed"
ANSWER = "Emma Reed, Grace Wright, Alan Wells"
LENGTH = ("--gen-length", "32")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        status = cli.main(arguments)
    except SystemExit as stop:  # argparse
        status = int(stop.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


def test_one_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "generate", "--prompt", PROMPT, *LENGTH) == (0, ANSWER + "\n", "")
    status, out, _ = run(capsys, "generate", "--prompt", PROMPT, "--no-chat", *LENGTH)
    assert status == 0
    assert out != ANSWER + "\n"  # without its template the demo model does not know what to do


def test_the_template_is_applied_where_there_is_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DEMO_MODEL / name, tmp_path)
    given = ("generate", "--model", str(tmp_path), "--dtype", "float32", "--prompt", PROMPT, *LENGTH)
    assert run(capsys, *given) == (0, ANSWER + "\n", "")
    (tmp_path / "chat_template.jinja").unlink()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    del config["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    plain = run(capsys, "generate", "--prompt", PROMPT, "--no-chat", "--policy", "threshold", *LENGTH)
    assert run(capsys, *given) == plain
    assert "no chat template" in run(capsys, *given, "--chat")[2]


@pytest.mark.parametrize(
    "command", [[str(Path(sys.executable).parent / "dllm-engine")], [sys.executable, "-m", "dllm_engine"]]
)
def test_the_installed_command_reads_stdin(command: list[str]) -> None:
    command = [*command, "generate", *LENGTH]
    done = subprocess.run(command, input=PROMPT + "\n", capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, ANSWER + "\n", "")


@pytest.mark.parametrize(
    "options",
    [
        ("--policy", "topk", "--cache", "none"),
        ("--policy", "topk", "--steps", "8"),
        ("--policy", "topk=4"),
        ("--policy", "margin=4"),
        ("--policy", "wedlm"),
        ("--policy", "localleap=0.9/0.6/2"),
        ("--policy", "threshold=0.95"),
        ("--policy", "factor=0.9", "--cache", "prefix"),
        ("--end-of-text", "off", "--block-length", "16"),
        ("--cfg-scale", "0.1", "--dtype", "float32", "--device", "cpu"),
        ("--temperature", "0.05", "--seed", "3", "--backend", "eager"),
    ],
)
def test_options(capsys: pytest.CaptureFixture[str], options: tuple[str, ...]) -> None:
    status, out, _ = run(capsys, "generate", "--prompt", PROMPT, "--json", *LENGTH, *options)
    assert status == 0
    row = json.loads(out)
    assert set(row) == {"prompt", "text", "generated_tokens", "forward_passes", "tokens_per_forward", "seed"}
    few = "8" in options or "topk=4" in options
    if "--cfg-scale" not in options and not few:
        assert row["text"] == ANSWER
    if few:
        assert row["forward_passes"] <= 8


def test_a_file_of_prompts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rng = random.Random(5)
    samples = [tasks.generate("reverse", rng) for _ in range(5)]
    rows: list[dict[str, object]] = [{"prompt": s.prompt, "answer": s.answer} for s in samples[:3]]
    rows += [{"messages": [{"role": "user", "content": s.prompt}]} for s in samples[3:]]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    status, out, _ = run(capsys, "generate", "--prompts", str(file), "--json", "--batch-size", "2", *LENGTH)
    assert status == 0
    answers = [json.loads(line) for line in out.splitlines()]
    assert sum(tasks.score(s, a["text"]) for s, a in zip(samples, answers, strict=True)) >= 4
    assert [a.get("answer") for a in answers] == [s.answer for s in samples[:3]] + [None] * 2
    status, plain, _ = run(capsys, "generate", "--prompts", str(file), *LENGTH)
    assert plain.splitlines() == [a["text"] for a in answers]


def test_watch_draws_every_step(demo_model: LLaDA) -> None:
    from rich.console import Console

    from dllm_engine.tokenizer import encode_prompt

    screen = io.StringIO()
    prompt = encode_prompt(demo_model.tokenizer, PROMPT, chat=True)
    with Watch(demo_model, "a title", Console(file=screen, force_terminal=True, width=80)) as watch:
        dllm_engine.decode(demo_model, [prompt], gen_length=32, policy="topk", end_of_text="off", streamer=watch)
    text = screen.getvalue()
    assert "a title" in text
    assert "·" in text
    assert "Grace Wright" in text
    assert watch.steps == 32
    with Watch(demo_model, "a title", Console(file=screen)) as watch:
        settings = {"gen_length": 64, "block_length": 16, "policy": "topk", "end_of_text": "off"}
        dllm_engine.decode(demo_model, [prompt], **settings, streamer=watch)
    assert watch.steps == 64
    assert text.count("step ") >= 32


def test_watch_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "generate", "--prompt", PROMPT, "--watch", *LENGTH)
    assert status == 0
    assert ANSWER in out
    assert out.endswith("╯\n")  # also where rich ends no line, as there is no terminal
    assert "[/b] [red]hi" in run(capsys, "generate", "--prompt", "[/b] [red]hi", "--watch", *LENGTH)[1]
    assert run(capsys, "generate", "--prompt", "", "--watch", *LENGTH)[0] == 0
    status, _, err = run(capsys, "generate", "--prompt", PROMPT, "--watch", "--json")
    assert status == 2
    assert "--watch: cannot be joined with --json" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "--prompt", "x", "--model", "/no/such/dir"), "no directory /no/such/dir"),
        (("generate", "--prompt", "x", "--gen-length", "30"), "block_length: 32 given; it must divide gen_length 30"),
        (("generate", "--prompt", "x", "--policy", "best"), "policy: 'best' given; known: auto, topk"),
        (
            ("generate", "--prompt", "x", "--policy", "topk=3"),
            "topk=3 given; tokens a step must divide gen_length 128",
        ),
        (("generate", "--prompt", "x", "--policy", "auto=3"), "policy: 'auto=3' given; auto takes no value"),
        (("generate", "--prompt", "x", "--policy", "factor=a"), "'a' given for factor; a number is needed"),
        (("generate", "--prompt", "x", "--policy", "threshold=2"), "threshold: 2.0 given; 0 to 1"),
        (("generate", "--prompt", "x", "--policy", "learn2pd=/no/filter"), "filter: /no/filter does not exist"),
        (("generate", "--prompt", "x", "--cache", "triple"), "cache: 'triple' given; known: none, prefix, dual"),
        (
            ("generate", "--prompt", "x", "--backend", "abacus"),
            "backend: 'abacus' given; known: auto, cpu, triton, cuda, eager",
        ),
        (("generate", "--prompt", "x", "--dtype", "int4"), "dtype: 'int4' given"),
        (("generate", "--prompt", "x", "--batch-size", "0"), "--batch-size: 0 given; at least 1"),
        (("generate", "--prompt", "", "--no-chat"), "prompt 0: prompt: '' gives no token"),
        (
            ("generate", "--prompts", "/no/file.jsonl"),
            "dllm-engine generate: /no/file.jsonl: No such file or directory\n",
        ),
        (("eval", "--output", __file__), f"dllm-engine eval: {__file__}: File exists\n"),
        (("generate", "--prompt", "x", "--device", "toaster"), "device: 'toaster' given"),
        (("generate", "--prompt", "x", "--device", "cuda:99"), "device: 'cuda:99' given; this torch sees"),
        (("generate", "--fast"), "unrecognized arguments: --fast"),
        (("demo", "--data", "/no/poem.jsonl"), "no task is called 'poem'"),
        (("demo", "--data", "/no/copy.jsonl"), "No such file"),
        (("demo", "--limit", "3"), "--limit: needs --data"),
        (("demo", "--batch-size", "0"), "--batch-size: 0 given"),
        (("demo", "--batch-size", "5"), "--batch-size: needs --data"),
        (("demo", "--data", "copy.jsonl", "--seed", "3"), "--seed: of the ten questions, not of --data"),
        (("generate", "--prompt", "x", "--device", "mps"), "device: 'mps' given; cpu, cuda or cuda:N allowed"),
        (("generate", "--prompt", "x", "--policy", "learn2pd="), "'learn2pd=' given; a filter's file or directory"),
        (("generate", "--prompt", "x", "--policy", "learn2pd=@0.5"), "'learn2pd=@0.5' given; a filter's file"),
        (("generate", "--prompt", "x", "--policy", "freedave=99"), "drafts: 99 given; 2 to 32 allowed"),
        ((), "COMMAND"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_errors_are_one_line_and_exit_2(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2: not JSON"),
        ('{"text": "x"}', 'line 2: {"prompt": str} or {"messages"'),
        ('{"messages": []}', "line 2"),
        ('{"messages": [{"role": "user"}]}', "line 2"),
        ("[1]", "line 2"),
        ("[" * 200_000, "line 2: not JSON (maximum recursion depth exceeded"),
        ('{"prompt": "x", "n": ' + "1" * 5000 + "}", "line 2: not JSON (Exceeds the limit"),
        ('{"prompt": "x", "n": [1e999]}', "line 2: not JSON (1e999 given; a finite number is needed)"),
        ('{"prompt": "x", "n": -Infinity}', "line 2: not JSON (-Infinity given; a finite number is needed)"),
        ('{"prompt": "x", "n": NaN}', "line 2: not JSON (NaN given; a finite number is needed)"),
        ('{"prompt": "\\ud800"}', "line 2: half of a surrogate pair"),
        ('{"prompt": "x", "id": ["\\ud800"]}', "line 2: half of a surrogate pair"),
        (json.dumps({"prompt": "Copy " * 1000}), "prompt 1: 1008 tokens given; the model has room for 896"),
    ],
)
def test_bad_rows_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path, row: str, message: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "x"}\n' + row, encoding="utf-8")
    status, _, err = run(capsys, "generate", "--prompts", str(file))
    assert status == 2
    assert message in err
    file.write_bytes(b'{"prompt": "caf\xe9"}')
    assert "rows.jsonl: not UTF-8" in run(capsys, "generate", "--prompts", str(file))[2]
    file.write_text("\n", encoding="utf-8")
    assert "no row in it" in run(capsys, "generate", "--prompts", str(file))[2]


def test_rows_of_a_closed_stdin(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    status, _, err = run(capsys, "generate", "--prompts", "-", *LENGTH)
    assert status == 2
    assert "stdin: closed; rows are needed" in err


def test_a_terminal_gets_answers_without_a_bar_between(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(3 * (json.dumps({"prompt": PROMPT}) + "\n"), encoding="utf-8")
    arguments = ("generate", "--prompts", str(file), "--batch-size", "1", *LENGTH)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert "3/3" in run(capsys, *arguments)[2]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run(capsys, *arguments) == (0, 3 * (ANSWER + "\n"), "")


@pytest.mark.parametrize("width", [20, 40, 80])
def test_tables_are_whole_in_narrow_terminals(width: int) -> None:
    """The terminal wraps the lines; squeezed to it, names stood upright and figures were cut."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("policy", overflow="fold")
    for name in ("interval", "tokens/\nsecond"):
        table.add_column(name, no_wrap=True)
    table.add_row("threshold=0.9", "[green]87.9 to 100.0[/]", "2,837")
    console = Console(width=width, file=io.StringIO())
    tables.show(console, table)
    out = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(word in out for word in ("threshold=0.9", "87.9 to 100.0", "2,837", "tokens/"))
    assert console.width == width


def test_rows_that_have_what_decoding_adds_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": PROMPT, "text": "x"}), encoding="utf-8")
    status, _, err = run(capsys, "generate", "--prompts", str(file), "--json")
    assert status == 2
    assert "rows.jsonl, row 0: has a field 'text' already, which decoding adds; rename it" in err
    assert run(capsys, "generate", "--prompts", str(file), *LENGTH)[:2] == (0, ANSWER + "\n")


def test_no_prompt_at_all(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for stdin in (io.StringIO(" \n"), None):
        monkeypatch.setattr(sys, "stdin", stdin)
        status, out, err = run(capsys, "generate", *LENGTH)
        assert (status, out) == (2, "")
        assert "no prompt: give --prompt TEXT" in err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    assert "stdin: not UTF-8" in run(capsys, "generate", *LENGTH)[2]


@pytest.mark.parametrize("error", [MemoryError("120 GB are needed"), RuntimeError("NaN"), SafetensorError("disk full")])
def test_failures_are_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(args: object) -> None:
        raise error

    monkeypatch.setattr(cli_options, "load", fail)
    assert run(capsys, "generate", "--prompt", "x") == (1, "", f"dllm-engine generate: {error}\n")


def test_a_closed_stdout_and_warnings_without_a_place() -> None:
    command = f'"{sys.executable}" -c "import sys; from dllm_engine.cli import main; sys.exit(main())" '
    for arguments, said in (
        ("info >&-", ""),
        (f'generate --prompt "{PROMPT}" --cache none --gen-length 32', "warning: the filter was trained on cache"),
    ):
        done = subprocess.run(command + arguments, shell=True, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr[: len(said)]) == (0, said)
        assert len(done.stderr.splitlines()) == bool(said)


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_options, "load", interrupted)
    assert run(capsys, "generate", "--prompt", "x")[0] == 130


def test_info_tells_what_is_wrong_with_the_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DLLM_BACKEND", "foo")
    status, out, _ = run(capsys, "info")
    assert status == 0
    assert "DLLM_BACKEND: 'foo' given; known: auto" in out


def test_no_name_is_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "generate", "--model", "", "--prompt", PROMPT)
    assert (status, "path: '' given" in err) == (2, True)


def test_info_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "info")
    assert status == 0
    assert "backend eager   ready" in out
    facts = json.loads(run(capsys, "info", "--json")[1])
    assert facts["KV cache"] == "built-in model, float32: 4,096 bytes a token, 4,194,304 for 1,024 tokens"
    assert facts["dllm-engine"] == dllm_engine.__version__
    assert facts["backends"]["eager"] == "ready"
    assert run(capsys, "--version")[1] == f"dllm-engine {dllm_engine.__version__}\n"


_WITHOUT = """
import sys

class Without:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Without())
from dllm_engine.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("missing", "arguments", "message"),
    [
        ("fastapi", "serve", "the server needs more packages: pip install"),
        ("prometheus_client", "serve", "the server needs more packages: pip install"),
        ("uvicorn", "serve", "the server needs more packages: pip install"),
        (
            "dllm_engine._cpu",
            "generate --prompt x --backend cpu",
            "missing (No module named 'dllm_engine._cpu'): no C++",
        ),
    ],
)
def test_what_is_missing_is_told_with_its_mending(missing: str, arguments: str, message: str) -> None:
    command = [sys.executable, "-c", _WITHOUT, missing, *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode > 0
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1

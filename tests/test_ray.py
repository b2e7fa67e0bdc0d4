"""Batch decoding on Ray. Most tests need no cluster; those that start one on this machine are slow."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_shards import read, some_rows, write

from dllm_engine import Engine, LLaDA, cli, decode, policies
from dllm_engine.integrations import ray as on_ray
from dllm_engine.integrations.ray_file import decode_file
from dllm_engine.integrations.shards import COLUMNS
from dllm_engine.tokenizer import answer_text, encode_prompt

SHORT: dict[str, Any] = {"gen_length": 32, "policy": "threshold"}
NICENESS = {"RAY_worker_niceness": "0"}  # by default Ray's workers yield to everything else that runs here
# some seconds for a few dozen rows: time to kill something in
LONG: dict[str, Any] = {"gen_length": 64, "policy": "topk", "cache": "none", "end_of_text": "off", "temperature": 0.3}


def expected(model: LLaDA, rows: list[dict[str, Any]], seed: int, **options: Any) -> list[dict[str, Any]]:
    """The rows with what one engine in this process makes of them."""
    prompts = [encode_prompt(model.tokenizer, row.get("messages") or row["prompt"], chat=True) for row in rows]
    answered: dict[int, dict[str, Any]] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a worker has
    with Engine(model, max_batch=8, max_length=1024) as engine:
        for one in engine.generate_many(prompts, seed=seed, **options):
            rate = round(one.tokens_per_forward, 3)
            figures = (answer_text(model, one.generated.tolist()), one.generated_tokens, one.passes, rate, one.seed)
            answered[one.index] = dict(zip(COLUMNS, figures, strict=True))
    torch.set_num_threads(threads)
    return [row | answered[i] for i, row in enumerate(rows)]


# -- without a cluster -------------------------------------------------------------------------------------------------


def worker(**options: Any) -> Any:
    options = on_ray.checked(options)
    return on_ray._Worker(None, batch_size=3, seed=50, chat=True, device="cpu", dtype=None, options=options)


def table(rows: dict[str, list[Any]]) -> Any:
    return pytest.importorskip("pyarrow").table(rows)


def test_a_worker_adds_what_decode_gives_each_row_alone(demo_model: LLaDA) -> None:
    rows = some_rows(7)
    numbers = [4, 0, 11, 2, 9, 5, 30]  # as Ray may cut and order them
    columns = {
        "index": numbers,
        "prompt": [row.get("prompt") for row in rows],
        "messages": [row.get("messages") for row in rows],
        "id": [row["id"] for row in rows],
    }
    settings: dict[str, Any] = {"gen_length": 32, "policy": "threshold", "temperature": 1.0}
    decoder = worker(**settings)
    done = decoder(table(columns)).to_pylist()
    for row, number, record in zip(rows, numbers, done, strict=True):
        ids = encode_prompt(demo_model.tokenizer, row.get("messages") or row["prompt"], chat=True)
        alone = decode(demo_model, [ids], seed=50 + number, **settings)
        assert record["text"] == answer_text(demo_model, alone.sequences[0, len(ids) :].tolist())
        assert (record["generated_tokens"], record["forward_passes"]) == (
            int(alone.generated_tokens[0]),
            int(alone.sequence_passes[0]),
        )
        assert (record["id"], record["index"], record["seed"]) == (row["id"], number, 50 + number)
    longer = table({"index": [4], "prompt": ["Copy: " + ", ".join(f"{i} Alan Wells" for i in range(15))]})
    assert decoder(longer).to_pylist()[0]["seed"] == 54  # the engine has grown
    as_text = table(columns | {"messages": [m and json.dumps(m) for m in columns["messages"]]})
    assert [r["text"] for r in decoder(as_text).to_pylist()] == [r["text"] for r in done]


def test_a_worker_names_the_row_that_it_cannot_decode() -> None:
    decoder = worker(**SHORT)
    for row, message in (
        ({"index": [3], "prompt": ["Copy: " + "Alan Wells " * 2000]}, r"prompt 3 has \d+ tokens"),
        ({"index": [5], "prompt": [None]}, 'row 5: prompt: None given, and no "messages"; a text is needed'),
        ({"index": [5], "prompt": [[5, 6]]}, r"row 5: prompt: \[5, 6\] given"),
        ({"index": [6], "messages": ['"hello"']}, "row 6: messages: 'hello' given; a list is needed"),
        ({"index": [6], "messages": ["[5]"]}, r"row 6: messages: \[5\] given; a list of {\"role\": str"),
        ({"index": [6], "messages": [[{"role": "user"}]]}, "row 6: messages: "),
        ({"index": [-1], "prompt": ["x"]}, "index: -1 given; a number of each row, an int ≥ 0"),
        ({"index": ["a"], "prompt": ["x"]}, "index: 'a' given"),
        ({"index": [6], "messages": ["[{"]}, "row 6: "),
    ):
        with pytest.raises(ValueError, match=message):
            decoder(table(row))


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r'pip install "dllm-engine\[ray\]"'):
        decode_file(write(tmp_path / "rows.jsonl", some_rows(1)), tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-c", "import sys, dllm_engine.integrations.ray_file; print('ray' in sys.modules)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompts", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--workers", "0"), "workers: 0 given; at least 1 is needed"),
        (("--rows-per-task", "0"), "rows_per_task: 0 given"),
        (("--policy", "best"), "policy: 'best' given"),
        (("--policy", "topk=3", "--gen-length", "128"), "tokens a step must divide gen_length 128"),
        (("--cache", "triple"), "cache: 'triple' given"),
        (("--end-of-text", "soon"), "end_of_text: 'soon' given"),
        (("--model", "./nowhere"), "model: no directory nowhere (and './nowhere' is no hub id"),
        (("--seed", "-1"), "seed: -1 given"),
    ],
)
def test_bad_arguments_fail_before_ray_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    file = write(tmp_path / "rows.jsonl", some_rows(2))
    assert cli.main(["ray-decode", "--prompts", str(file), "--output", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# -- on a cluster of this machine --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """Two CPUs for workers and one for what feeds them."""
    ray = pytest.importorskip("ray")
    os.environ |= NICENESS
    ray.init(
        num_cpus=3,
        object_store_memory=100_000_000,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="warning",
    )
    yield ray
    ray.shutdown()


@pytest.mark.slow
def test_a_file_is_decoded_as_by_one_engine(ray: Any, demo_model: LLaDA, tmp_path: Path) -> None:
    rows, settings = some_rows(50), SHORT | {"temperature": 0.8}
    file = write(tmp_path / "rows.jsonl", rows)
    report = decode_file(file, tmp_path / "out", workers=2, rows_per_task=8, batch_size=3, seed=70, **settings)
    right = expected(demo_model, rows, 70, **settings)
    assert read(tmp_path / "out") == right
    assert (report.rows, report.decoded) == (50, 50)
    assert report.generated_tokens == sum(row["generated_tokens"] for row in right)
    one = tmp_path / "one"
    decode_file(file, one, workers=1, rows_per_task=50, seed=70, **settings)
    assert read(one) == right


@pytest.mark.slow
def test_a_dataset_gets_columns(ray: Any, demo_model: LLaDA) -> None:
    rows = [{"index": i, **row} for i, row in enumerate(some_rows(20)) if "prompt" in row]
    random.Random(0).shuffle(rows)
    ds = ray.data.from_items(rows, override_num_blocks=3)
    rule = policies.Threshold(0.8)
    done = on_ray.decode_dataset(ds, workers=2, rows_per_task=5, gen_length=32, policy=rule, seed=3).take_all()
    by_index = {row["index"]: row for row in done}
    assert len(done) == len(by_index) == len(rows)
    for row in rows:
        (right,) = expected(demo_model, [row], 3 + row["index"], gen_length=32, policy=rule)
        assert by_index[row["index"]] == right
    with pytest.raises(ValueError, match="'index' is needed, for the seeds"):
        on_ray.decode_dataset(ds.drop_columns(["index"]))
    with pytest.raises(ValueError, match='"prompt" or "messages" is needed'):
        on_ray.decode_dataset(ds.drop_columns(["prompt"]))
    with pytest.raises(ValueError, match="has a column 'text' already"):
        on_ray.decode_dataset(ds.rename_columns({"id": "text"}))


@pytest.mark.slow
def test_a_workers_error_is_told_in_its_own_words_and_the_rest_is_kept(
    ray: Any, demo_model: LLaDA, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = some_rows(12)
    broken = [*rows[:-1], rows[-1] | {"messages": [{"role": "user", "content": "Alan Wells " * 2000}]}]
    file, output = write(tmp_path / "rows.jsonl", broken), tmp_path / "out"
    with pytest.raises(RuntimeError, match=r"^a worker failed: ValueError: prompts: prompt 11 has \d+ tokens; 992 fit"):
        decode_file(file, output, rows_per_task=3, seed=1, **SHORT)
    assert "Traceback" not in capfd.readouterr().err
    write(file, rows)  # mended
    decode_file(file, output, rows_per_task=3, seed=1, **SHORT)
    assert read(output) == expected(demo_model, rows, 1, **SHORT)


def workers_at_work() -> list[int]:
    """Processes under this one that are inside a task of the actor pool."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            title = (directory / "cmdline").read_bytes()
            parent = pid = int(directory.name)
            while parent > 1 and parent != os.getpid():
                parent = int((Path("/proc") / str(parent) / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):  # it has ended
            continue
        if title.startswith(b"ray::MapWorker") and b"submit" in title and parent == os.getpid():
            found.append(pid)
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the workers by /proc")
def test_a_killed_worker_loses_nothing(ray: Any, demo_model: LLaDA, tmp_path: Path) -> None:
    rows = some_rows(24)
    file, output = write(tmp_path / "rows.jsonl", rows), tmp_path / "out"
    results: list[Any] = []
    run = threading.Thread(
        target=lambda: results.append(decode_file(file, output, workers=2, rows_per_task=6, seed=5, **LONG))
    )
    run.start()
    while not (at_work := workers_at_work()) and run.is_alive():
        time.sleep(0.05)
    time.sleep(0.3)  # in the middle of its batch
    parts = len([*output.glob("part-*.jsonl")])
    os.kill(at_work[0], signal.SIGKILL)
    run.join()
    assert parts < 4
    assert not Path(f"/proc/{at_work[0]}").exists()
    assert results[0].decoded == 24
    assert read(output) == expected(demo_model, rows, 5, **LONG)


@pytest.mark.slow
def test_a_killed_driver_goes_on_where_it_stopped(demo_model: LLaDA, tmp_path: Path) -> None:
    rows = some_rows(24)
    file, output = write(tmp_path / "rows.jsonl", rows), tmp_path / "out"
    command = [sys.executable, "-c", "import sys; from dllm_engine.cli import main; sys.exit(main())", "ray-decode"]
    command += ["--prompts", str(file), "--output", str(output), "--rows-per-task", "4", "--seed", "5"]
    for name, value in LONG.items():
        command += ["--" + name.replace("_", "-"), str(value)]
    environment = os.environ | NICENESS
    environment.pop("RAY_ADDRESS", None)
    first = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while len([*output.glob("part-*.jsonl")]) < 2 and first.poll() is None:
        time.sleep(0.05)
    first.kill()
    first.wait()
    there = {part: part.stat().st_mtime_ns for part in output.glob("part-*.jsonl")}
    assert 2 <= len(there) < 6
    again = [*command, "--workers", "2", "--json"]
    with open(tmp_path / "printed", "w+", encoding="utf-8") as printed:  # Ray's processes would hold a pipe open
        subprocess.run(again, env=environment, stdout=printed, stderr=subprocess.DEVNULL, check=True)
        printed.seek(0)
        assert json.load(printed)["decoded"] == 24 - 4 * len(there)
    assert {part: part.stat().st_mtime_ns for part in there} == there
    assert read(output) == expected(demo_model, rows, 5, **LONG)

"""Every benchmark of whole decodes runs, at sizes that say nothing about speed."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import SLOWLY
from conftest import ending_model
from rich.console import Console

from dllm_engine import LLaDA, backends, decode, graphs, policies
from dllm_engine.layers import Kernels
from dllm_engine.policy_text import PolicyText

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a script in this process (torch is loaded already) and gives what it printed."""

    def run(script: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [script, *arguments, "--dry-run"])
        runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
        printed = capsys.readouterr().out
        assert "appended" not in printed
        return printed

    return run


def test_block_step(run: Run) -> None:
    text = run("block_step.py", "--small", "--layers", "1", "--lengths", "64", "--batches", "2", "--seconds", "0")
    assert "1 layers of 256, 8,192 words, float32" in text
    assert "bytes floor" in text


def test_a_shape_counts_what_its_model_has() -> None:
    from models import SHAPES, random_model

    sizes = {"d_model": 32, "n_layers": 2, "mlp": 24, "vocab": 64}
    for shape in (
        SHAPES["tiny"],
        replace(SHAPES["moe"], n_heads=2, **sizes),
        replace(SHAPES["dream"], n_heads=4, kv_heads=1, **sizes),
    ):
        model = random_model(shape, device=torch.device("cpu"), dtype=torch.float32, max_length=64)
        matrices = {name: p.numel() for name, p in model.named_parameters() if p.ndim > 1}
        assert shape.parameters() == sum(matrices.values())
        assert shape.read_parameters() == shape.parameters() - matrices["wte.weight"]
        unused = sum(n for name, n in matrices.items() if name.endswith(("gate_up", "down")))
        unused = unused * (shape.experts - shape.chosen) // max(shape.experts, 1)
        assert shape.used_parameters() == shape.read_parameters() - unused


@pytest.mark.parametrize("dream", [False, True])
def test_a_block_step_is_no_refresh(monkeypatch: pytest.MonkeyPatch, dream: bool) -> None:
    """What is timed as a step computes the rows of the block, again and again."""
    import block_step
    from models import SHAPES, random_model

    model = random_model(
        replace(SHAPES["tiny"], dream=dream), device=torch.device("cpu"), dtype=torch.float32, max_length=96
    )
    step = block_step.BlockStep(model, 2, 96)
    widths: list[tuple[int, ...]] = []
    hidden_states = LLaDA.hidden_states

    def noted(self: LLaDA, tokens: torch.Tensor, *rest: Any) -> Any:
        widths.append(tuple(tokens.shape))
        return hidden_states(self, tokens, *rest)

    monkeypatch.setattr(LLaDA, "hidden_states", noted)
    step.step()
    step.step()
    assert widths == [(2, block_step.BLOCK + dream)] * 2


def test_products(run: Run) -> None:
    pytest.importorskip("triton")
    text = run("products.py", "--shape", "tiny", "--rows", "3", "--seconds", "0")
    assert [name in text for name in ("qkv: 3 rows x 96 x 32", "ff_out: 3 rows x 32 x 48")] == [True, True]


@pytest.mark.skipif(not SLOWLY, reason="test_ops runs this one by Triton's interpreter")
def test_products_by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is swept through is checked and timed; what is wrong is told."""
    import products
    from models import SHAPES

    for name, (size, depth) in products.matrices(SHAPES["8b"]).items():
        found = products.choices(size, depth, 32)
        config = products.products.CONFIG
        assert (config, products.products.shares(size, depth, config)) in found, name
    monkeypatch.setattr(products, "choices", lambda *shape: [(products.Config(64, 32, 4, 3), 2)])
    problem = products.Problem(3, 70, 96, torch.bfloat16, torch.device("cpu"), 1)
    with io.StringIO() as file:
        records = products.measure(problem, True, 0.0, 1e9, Console(file=file, width=200))
        assert [r["contender"] for r in records] == ["torch", "kernel", "64 x 32, 4 warps, 3 stages, 2 parts"]
        assert not file.getvalue()
        monkeypatch.setattr(products, "linear", lambda x, weight, **_: x @ weight.T * 1.1)
        records = products.measure(problem, True, 0.0, 1e9, Console(file=file, width=200))
        assert [r["contender"] for r in records] == ["torch"]
        assert "kernel is not timed: off by" in file.getvalue()


@pytest.mark.skipif(not SLOWLY, reason="test_ops runs this one by Triton's interpreter")
def test_block_step_with_and_without_layer_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: both ways take turns on the same buffers and state, each by its own kernels."""
    import block_step
    from models import SHAPES, random_model

    from dllm_engine.kernels import early

    calls: list[Kernels] = []
    hidden_states = LLaDA.hidden_states

    def noted(self: LLaDA, *arguments: Any) -> Any:
        calls.append(arguments[5] if arguments[5:] else Kernels.NONE)
        return hidden_states(self, *arguments)

    monkeypatch.setattr(graphs, "supported", lambda forward, options: True)
    monkeypatch.setattr(block_step, "BLOCK", 2)
    shape = SHAPES["tiny"]
    model = random_model(shape, device=torch.device("cpu"), dtype=torch.float32, max_length=8)
    step = block_step.BlockStep(model, 1, 8)
    committed = []
    monkeypatch.setattr(LLaDA, "hidden_states", noted)
    assert list(step.others) == [Kernels.NONE]  # products in float32 are torch's in any case
    for loop, kernels in (
        (step.loop, Kernels.PRODUCTS),
        (step.others[Kernels.NONE], Kernels.NONE),
        (step.loop, Kernels.PRODUCTS),
    ):
        calls.clear()
        step.step(loop)
        assert calls == [kernels]
        committed.append(step.state.tokens.clone())
    assert all(torch.equal(tokens, committed[0]) for tokens in committed)
    monkeypatch.setattr(block_step, "graphed", lambda run: run)
    record = block_step.measure(model, shape, 1, 8, {"bandwidth": 1.0, "flops": 1.0}, 0.0)
    assert record["layer_kernels"] == "PRODUCTS"
    assert record["step_NONE_seconds"] > 0
    half = random_model(shape, device=torch.device("cpu"), dtype=torch.bfloat16, max_length=8)
    monkeypatch.setattr(early, "unavailable", lambda device: "no GPU")
    step = block_step.BlockStep(half, 1, 8)
    assert list(step.others) == [Kernels.NONE, Kernels.BETWEEN]
    calls.clear()
    step.step(step.others[Kernels.BETWEEN])
    assert calls == [Kernels.BETWEEN]
    assert step.left_out() == []

    def races(self: LLaDA, *arguments: Any) -> Any:
        hidden = noted(self, *arguments)
        return hidden * (-1) ** len(calls) if calls[-1] is Kernels.BETWEEN else hidden

    monkeypatch.setattr(LLaDA, "hidden_states", races)
    [message] = step.left_out()
    assert message == "layer kernels BETWEEN left out: a step gives something else from turn to turn"
    assert list(step.others) == [Kernels.NONE]
    assert "DLLM_LAYER_KERNELS" not in os.environ


def test_what_cannot_run_is_told_and_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A compiler that is missing, a backend that breaks: the others have their figures."""
    import decode_step

    def broken(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("no C compiler\nand many lines")

    monkeypatch.setattr(torch, "compile", lambda function, **options: broken)
    monkeypatch.setitem(backends.BACKENDS, "broken", backends.Backend("", (), broken, broken))
    head = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    args = argparse.Namespace(backends=["broken", "eager"], without=["a"], seconds=0.0)
    with (tmp_path / "out").open("w+") as file:
        console = Console(file=file, width=200)
        records = decode_step.measure(decode_step.Problem(16, 64, 2, torch.float32, head), 2, args, console)
        file.seek(0)
        told = file.read()
    assert [record["contender"] for record in records] == ["eager", "b", "d"]
    assert told.splitlines() == [f"{name} is not timed: RuntimeError: no C compiler" for name in ("broken", "c")]


def test_a_watched_rule_decides_as_it_is() -> None:
    """With all its hooks: one that asks for logits, one that kernels decide."""
    import end_of_text

    model = ending_model()
    for name in ("credit", "threshold"):
        policy = policies.resolve(name, model, block_length=8, cache="dual")
        options: dict[str, Any] = {"gen_length": 16, "block_length": 8, "cache": "dual"}
        watched = end_of_text.Watched.of(policy)
        out, expected = (decode(model, [[5, 6], [7, 8]], policy=p, **options) for p in (watched, policy))
        assert torch.equal(out.sequences, expected.sequences)
        assert sum(len(sequences) for sequences, _ in watched.seen) == out.sequence_passes.sum()
        assert watched.after(torch.full((2,), -1)) > watched.after(torch.full((2,), 16)) == 0


def test_scaling(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "new" / "scaling.png"
    sizes = ["--lengths", "64", "128", "--batches", "1", "2", "--gen-lengths", "32", "64", "--prompt-length", "5"]
    text = run("scaling.py", "--shape", "tiny", *sizes, "--seconds", "0", "--plot", str(picture))
    assert all(title in text for title in ("a step by length", "a decode by batch", "a decode by gen_length"))
    assert picture.stat().st_size > 0


def test_end_to_end_on_the_demo_model(run: Run) -> None:
    text = run("end_to_end.py", "--case", "demo", "--gen-lengths", "32", "--turns", "2")
    for name in ("LLaDA's loop", "our op", "+ dual cache", "+ learned filter", "predicted", "Fast-dLLM's loop"):
        assert name in text
    assert text.count("100%") == 2  # both lines that must give a loop's tokens did


@pytest.mark.slow
def test_serve_load(run: Run) -> None:
    text = run("serve_load.py", "--requests", "24", "--turns", "2", "--sample", "8", "--clients", "4", "--rows", "2")
    assert "36 requests: 0 errors, 0 of 8 differ from a decode alone" in text
    accepted, answered, whole, broken = re.findall(r"SIGTERM under load: (\d+) .*?(\d+) .*?(\d+) .*?(\d+) ", text)[0]
    assert accepted == answered == whole
    assert broken == "0"


@pytest.mark.slow
def test_end_to_end_with_a_real_vocabulary(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "bars.png"
    text = run(
        "end_to_end.py", "--case", "vocab", "--layers", "2", "--prompt-length", "16", "--gen-lengths", "64",
        "--turns", "1", "--plot", str(picture),
    )  # fmt: skip
    assert "126,464 words" in text
    assert "100%" in text
    assert picture.stat().st_size > 0


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("end_to_end.py", ["--case", "8b", "--device", "cpu"], "this needs a GPU with 16 GiB free; --layers 2"),
        ("end_to_end.py", ["--gen-lengths", "33"], "--gen-lengths: 33 given; multiples of 32 are needed"),
        ("end_to_end.py", ["--turns", "0"], "--turns: 0 given; at least 1 is needed"),
        ("block_step.py", ["--device", "cpu"], "needs a GPU with 15 GiB and more; --small runs on a CPU"),
        ("block_step.py", ["--small", "--moe"], "--moe: not allowed with argument --small"),
        ("block_step.py", ["--small", "--lengths", "32"], "--lengths must be above 32"),
        ("scaling.py", ["--device", "cpu", "--shape", "8b"], "LLaDA-8B's shape needs a GPU"),
        ("serve_load.py", ["--turns", "0"], "--turns, --sample: a turn has at least a request"),
        ("scaling.py", ["--lengths", "--batches", "--gen-lengths"], "are all empty"),
    ],
)
def test_arguments_that_cannot_be(
    run: Run, capsys: pytest.CaptureFixture[str], script: str, arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as error:
        run(script, *arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_policies_report(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    arguments = ("--prompts", "1", "--rules", "threshold", "margin", "--keep", str(tmp_path / "kept"))
    text = run("policies_report.py", *arguments)
    for name in ("topk", "threshold=0.7", "margin=4", "policies.png written"):
        assert name in text
    kept = tmp_path / "kept"
    page = (kept / "policies.md").read_text(encoding="utf-8")
    assert page.count("policies_report: begin") == page.count("policies_report: end") == 1
    assert "\n| `threshold=0.95` | dual | " in page.replace("**", "")
    assert page.index("## What wins where") < page.index("| rule | cache |") < page.index("policies_report: end")
    assert (kept / "policies.png").read_bytes().startswith(b"\x89PNG")
    settings = json.loads((kept / "policies.json").read_text(encoding="utf-8"))["settings"]
    assert [(s["setting"], s["cache"]) for s in settings[:2]] == [("topk", "none"), ("threshold=0.95", "dual")]
    assert {s["cache"] for s in settings if s["setting"] == "threshold"} == {"none", "prefix", "dual"}
    first = settings[0]["figures"]
    assert (first["mean"]["prompts"], first["lists"]["prompts"], first["sums"]["prompts"]) == (7, 6, 1)
    assert (first["mean"]["loss"], first["not trained"]["prompts"]) == (0.0, 2)
    size = {file: file.stat().st_size for file in kept.glob("*.jsonl")}
    run("policies_report.py", *arguments)  # all rows are kept: nothing is decoded again
    assert {file: file.stat().st_size for file in kept.glob("*.jsonl")} == size


def test_the_report_replaces_what_is_between_the_markers() -> None:
    pytest.importorskip("matplotlib")
    from policies_report import BEGIN, END, SETTINGS, update

    page = f"a\n\n{BEGIN}\n\nold\n\n{END}\n\nz\n"
    assert update(page, "new") == page.replace("old", "new")
    assert update(update(page, "new"), "old") == page
    for broken in ("a", f"{END} {BEGIN}", f"{BEGIN} {BEGIN} {END}", f"{BEGIN} {END} {END}"):
        with pytest.raises(ValueError, match="the page needs"):
            update(broken, "new")
    assert set(SETTINGS) == set(policies.names())
    for name, texts in SETTINGS.items():
        assert name in texts
        assert all(PolicyText.parse(text).name == name for text in texts)


def test_counters(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What a profiler looks at runs; and `gpu.py` hands it to the profiler that there is."""
    monkeypatch.setattr(
        sys, "argv", ["counters.py", "--device", "cpu", "--shape", "500x32", "--backends", "cpu", "cuda"]
    )
    runpy.run_path(str(BENCHMARKS / "counters.py"), run_name="__main__")
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first == "cpu, 32 rows x 500x32"
    assert second.startswith("cuda, 32 rows: left out: ")
    steps = runpy.run_path(str(BENCHMARKS / "gpu.py"))["steps"]
    command = steps("python3", ["pytest"], [], None, "/bin/ncu")[-1].command
    assert (command[0], command[-2:]) == ("/bin/ncu", ["python3", "benchmarks/counters.py"])
    assert "counters" not in [step.name for step in steps("python3", ["pytest"], [], None, None)]


def test_make_gpu_takes_every_file_that_has_gpu_tests() -> None:
    """And these do without what a machine with a GPU may lack."""
    gpu = runpy.run_path(str(BENCHMARKS / "gpu.py"))
    files = {file.stem: file.read_text(encoding="utf-8") for file in Path(__file__).parent.glob("test_*.py")}
    marked = {name for name, text in files.items() if "mark." + "gpu" in text}
    assert "test_gpu" in marked
    assert marked <= set(gpu["TESTS"])
    foreign = re.compile(r"^(?:from|import) (tokenizers|transformers|jinja2|matplotlib)", re.MULTILINE)
    assert not [name for name in gpu["TESTS"] if foreign.search(files[name])]


def test_gpu_steps_are_stopped_in_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a step printed before and while it was stopped is kept."""
    gpu = runpy.run_path(str(BENCHMARKS / "gpu.py"))
    watched = gpu["watched"]
    gpu["heed_interrupts"]()
    hangs = "import time; print('begun', flush=True); time.sleep(60)"
    assert watched([sys.executable, "-c", hangs], 1.5, os.environ, tmp_path / "log") == 1
    assert watched([sys.executable, "-c", "print('done'); raise SystemExit(3)"], 20, os.environ, tmp_path / "log") == 3
    text = (tmp_path / "log").read_text(encoding="utf-8")
    assert re.search(r"begun\n(.*\n)*KeyboardInterrupt\n(.*\n)*done\n", text)
    assert "stopped: no time" in capsys.readouterr().out

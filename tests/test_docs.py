"""Every command and every Python snippet of the README and of docs/ runs.

Commands run in a directory with the files that the pages name, made here and small. What the pages do at full size is
made small by `SUBSTITUTIONS`, and by nothing else.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import block_causal
import dreams
import fast_dllm
import mixtures
import pytest
import torch
from conftest import eight_b_in_miniature

from dllm_engine import LearnedFilter, LLaDA, LLaDAConfig, cli, decode
from dllm_engine.built_in import DEMO_MODEL
from dllm_engine.filter import model_ids
from dllm_engine.tokenizer import answer_text, encode_prompt
from dllm_engine.weights import places_of

ROOT = Path(__file__).resolve().parent.parent
# tested by the tests of what they describe
ELSEWHERE = ("docs/server.md", "docs/lm-eval.md", "docs/transformers.md")
PAGES = [
    page
    for page in ("README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md")))
    if page not in ELSEWHERE
]
SUBSTITUTIONS = {
    'device="cuda", dtype="bfloat16"': 'device="cpu", dtype="float32"',
    "gen_length=256": "gen_length=32",
    "--gen-length 256": "--gen-length 32",
    "steps=128, gen_length=128": "steps=32, gen_length=32",
    "--limit 200": "--limit 1",
    "--prompts 200": "--prompts 2",
    "--prompts 600": "--prompts 4",
    "--prompts 50": "--prompts 2",
    "LLaDA-8B-Instruct --prompt": "LLaDA-8B-Instruct --gen-length 32 --prompt",  # random weights never end a text
    "learn2pd=filter --prompt": "learn2pd=filter --gen-length 32 --prompt",
    "bench --model": "bench --count 1 --turns 1 --gen-length 32 --model",
    "--benchmark gsm8k": "--benchmark gsm8k --gen-length 32",
    "train-filter --model": "train-filter --epochs 2 --risk 0.9 --gen-length 32 --model",
    "benchmarks/ray_decode.py --workers 1 2":
        "benchmarks/ray_decode.py --workers 1 --prompts 4 --rows-per-task 2 --policy threshold --gen-length 32",
    "benchmarks/decode_step.py": "benchmarks/decode_step.py --shapes 500x32",
    "benchmarks/block_step.py": "benchmarks/block_step.py --layers 1 --lengths 64 --batches 1 --seconds 0",
}  # fmt: skip
# more than some seconds each
SLOW = ("ray", "train-filter", "eval --policy", "--sweep", "--benchmark", "benchmarks/", "dllm-engine demo")
# names that a page's Python takes from the reader
GIVEN: dict[str, dict[str, Any]] = {
    "README.md": {"prompts": [[126080, 5, 6], [126080, 7]], "input_ids": torch.tensor([[126080, 5, 6]])}
}


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks() -> list[Block]:
    found = []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for match in re.finditer(r"^```(\S*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            found.append(Block(page, text[: match.start()].count("\n") + 1, match[1], match[2]))
    return found


def commands(block: Block) -> list[str]:
    """Without comments, continued lines joined."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [command for line in lines if (command := re.sub(r"(^|\s)#.*", "", line).strip())]


COMMANDS = [
    (f"{block} {command}", command) for block in blocks() if block.language == "sh" for command in commands(block)
]
SNIPPETS = [page for page in PAGES if any(b.page == page and b.language == "python" for b in blocks())]


def param(name: str, *values: Any) -> Any:
    marks = [pytest.mark.slow] if any(part in name for part in SLOW) else []
    return pytest.param(*values, id=name[:90], marks=marks)


def smaller(text: str) -> str:
    for full, small in SUBSTITUTIONS.items():
        text = text.replace(full, small)
    return text


def stored(model: LLaDA) -> dict[str, torch.Tensor]:
    """Its tensors under the names of a checkpoint."""
    return {
        name: torch.cat([model.get_parameter(place.parameter)[place.at] for place in places])
        for name, places in places_of(model, model.config).items()
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the files that the pages name."""
    place = tmp_path_factory.mktemp("place")

    def write(name: str, *rows: dict[str, Any]) -> None:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    eight_b = eight_b_in_miniature(place / "LLaDA-8B-Instruct")
    (place / "GSAI-ML").mkdir()
    (place / "GSAI-ML" / "LLaDA-8B-Instruct").symlink_to(eight_b)  # the hub id, found as a directory
    mixtures.save(stored(mixtures.random_model()), place / "inclusionAI" / "LLaDA-MoE-7B-A1B-Instruct")
    dream = LLaDA(LLaDAConfig.from_dict(dreams.RAW)).requires_grad_(False)
    dreams.randomise(dream, 0)
    dreams.write(stored(dream), place / "Dream-org" / "Dream-v0-Instruct-7B")
    for name, raw in {
        "inclusionAI/LLaDA2.0-mini": block_causal.RAW_LLADA2, "inclusionAI/LLaDA2.1-mini": block_causal.RAW_LLADA2,
        "JetLM/SDAR-4B-Chat": block_causal.RAW_SDAR,
    }.items():  # fmt: skip
        raw = raw | {"max_position_embeddings": 512}
        made = LLaDA(LLaDAConfig.from_dict(block_causal.IDS | raw)).requires_grad_(False)
        dreams.randomise(made, 0)
        block_causal.write(stored(made), place / name, raw)
    raw = fast_dllm.RAW | {"bd_size": 32}
    fast = LLaDA(LLaDAConfig.from_dict(raw | {"mask_token_id": 59})).requires_grad_(False)
    dreams.randomise(fast, 0)
    fast_dllm.write(stored(fast), place / "Efficient-Large-Model" / "Fast_dLLM_v2_1.5B", raw)
    write(
        "questions.jsonl", {"prompt": "Copy: 0 Alan Wells, 1 Amy Fox"}, {"prompt": "Reverse: 0 Carol King, 1 Amy Fox"}
    )
    write("prompts.jsonl", *({"messages": [{"role": "user", "content": f"w{i} w{3 * i}"}]} for i in range(1, 13)))
    write("rows.jsonl", {"prompt": "w1 w2", "answer": "w3"})
    write("gsm8k/test.jsonl", {"question": "How many?", "answer": "#### 3"})
    names = json.dumps(["Ann Lee", "Joe Hall"])
    write("copy.jsonl", {"input": {"context": names}, "answer": names})
    write("ParallelBench/test/copy.jsonl", {"input": {"context": names}, "answer": names})
    config = "waiting_line/copy:\n  metric: list_match_score\n  prompt: 'Copy {context}'\n"
    (place / "ParallelBench" / "test" / "task_config.yaml").write_text(config, encoding="utf-8")
    shutil.copytree(DEMO_MODEL, place / "DIR")  # directories with filters
    shutil.copytree(DEMO_MODEL, place / "DIR2")
    learned = LearnedFilter()
    model = LLaDA.from_pretrained(eight_b, device="cpu")
    learned.ids, learned.cache = model_ids(model), "dual"
    learned.save_pretrained(place / "filter")
    (place / "docs").mkdir()
    return place


@pytest.fixture(autouse=True)
def ray_ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RAY_worker_niceness", "0")  # by default its workers yield to everything else that runs here
    yield
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


@pytest.mark.parametrize("block", blocks(), ids=str)
def test_every_block_is_of_a_kind_that_is_tested(block: Block) -> None:
    assert block.language in ("sh", "python", "text"), f"{block}: untested"


@pytest.mark.parametrize("command", [param(name, command) for name, command in COMMANDS])
def test_command(
    command: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    first, *arguments = shlex.split(smaller(command))
    if first == "make":
        check_make(arguments)
    elif first == "pip":
        check_pip(arguments)
    elif first == "hf":
        check_hf(arguments)
    elif first == "dllm-engine":
        monkeypatch.chdir(place)
        target = io.StringIO()
        if ">" in arguments:
            at = arguments.index(">")
            arguments = arguments[:at]
        if "--plot" in arguments:
            pytest.importorskip("matplotlib")
        if "ray-decode" in arguments:
            pytest.importorskip("ray")
        if "train-filter" in arguments:  # the others take the filter that is there
            arguments[arguments.index("--output") + 1] = str(tmp_path / "filter")
        with contextlib.redirect_stdout(target):
            status = cli.main(arguments)
        assert status == 0, capsys.readouterr().err
        assert target.getvalue().strip()
    elif first == "python" and arguments[0].startswith("benchmarks/"):
        import common

        monkeypatch.setattr(common, "RESULTS", tmp_path)
        monkeypatch.setattr(sys, "argv", arguments)
        runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")
    else:
        pytest.fail(f"{command}: untested")


def check_make(arguments: list[str]) -> None:
    targets = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {argument for argument in arguments if "=" not in argument} <= targets


def check_pip(arguments: list[str]) -> None:
    """Names and extras are ours; files exist."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = re.findall(r"^([\w-]+) = \[", project.partition("[project.optional-dependencies]")[2], re.MULTILINE)
    assert arguments.pop(0) == "install"
    while arguments:
        argument = arguments.pop(0)
        if argument == "-c":
            assert (ROOT / arguments.pop(0)).is_file()
        elif argument != "-e":
            match = re.fullmatch(r"(\.|dllm-engine)(?:\[([\w,-]+)\])?", argument)
            assert match, argument
            assert {*(match[2] or "").split(",")} - {""} <= {*extras}


def check_hf(arguments: list[str]) -> None:
    """huggingface_hub's command, which is not run: it downloads."""
    assert "hf" in {point.name for point in entry_points(group="console_scripts")}
    assert arguments[0] == "download"
    assert {argument for argument in arguments if argument.startswith("-")} <= {"--local-dir", "--include"}


@pytest.mark.parametrize("page", [param(page, page) for page in SNIPPETS])
def test_python(page: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The snippets of a page one after the other, as a reader would run them."""
    monkeypatch.chdir(place)
    names: dict[str, Any] = {"__name__": "__main__"} | GIVEN.get(page, {})
    for block in blocks():
        if block.page == page and block.language == "python":
            source = "\n" * block.line + smaller(block.text)
            exec(compile(source, str(ROOT / page), "exec"), names)
    assert capsys.readouterr().out.strip()


def test_the_built_in_model_answers_what_the_pages_ask_it(demo_model: LLaDA) -> None:
    """A reader who runs an example sees a right answer, and the one that is shown beside it."""
    pages = [*PAGES, *ELSEWHERE, "dllm_engine/cli.py", "dllm_engine/demo_model/README.md"]
    asked: dict[str, str] = {}
    for page in pages:
        text = (ROOT / page).read_text(encoding="utf-8")
        for task, listed in re.findall(r"\b(Copy|Reverse|Sort): ((?:0 \w+ \w+)(?:, \d \w+ \w+)*)", text):
            names = [name.partition(" ")[2] for name in listed.split(", ")]
            answer = {"Copy": names, "Reverse": names[::-1], "Sort": sorted(names)}[task]
            asked[f"{task}: {listed}"] = ", ".join(answer)
    asked |= dict(re.findall(r"^    (\S.*)\n    →  (.*)$", text, re.MULTILINE))  # the model card, the last of them
    assert len(asked) >= 8
    prompts = [encode_prompt(demo_model.tokenizer, question, chat=True) for question in asked]
    out = decode(demo_model, prompts, gen_length=64)
    found = [answer_text(demo_model, ids) for ids in out.sequences[:, -64:].tolist()]
    assert dict(zip(asked, found, strict=True)) == asked


def test_every_substitution_is_of_something_on_a_page() -> None:
    pages = "".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    assert [full for full in SUBSTITUTIONS if full not in pages] == []


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            target = os.path.normpath(ROOT / Path(page).parent / link.partition("#")[0])
            known = str(Path(target).relative_to(ROOT)) in ELSEWHERE if target.startswith(str(ROOT)) else False
            assert re.match(r"https?:|#", link) or known or Path(target).exists(), f"{page}: {link}"


def test_every_page_is_listed() -> None:
    listed = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in (*PAGES, *ELSEWHERE):
        name = page.rpartition("/")[2]
        assert name == "README.md" or f"({name})" in listed
    assert "(docs/README.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_kernels_page_shows_the_figures_of_the_results() -> None:
    """Milliseconds and shares of the roofs are those of the results file, rounded."""
    rows: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    results = ROOT / "benchmarks" / "results" / "AMD_EPYC.jsonl"
    for line in results.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["benchmark"] == "decode_step":
            rows.setdefault((row["dtype"], row["rows"]), {})[row["contender"]] = row
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    for (dtype, count), of in rows.items():
        cpu = of["cpu"]
        floor = 1e3 * cpu["bandwidth"] * cpu["seconds"] / cpu["roof_bandwidth"]  # bytes over bandwidth
        cells = [
            dtype,
            str(count),
            f"{1e3 * cpu['seconds']:.0f}",
            f"{floor:.0f}",
            f"{cpu['bandwidth'] / cpu['roof_bandwidth']:.0%}".replace("%", " %"),
            f"{cpu['flops'] / cpu['roof_flops']:.0%}".replace("%", " %"),
            *(f"{1e3 * of[name]['seconds']:,.0f}" for name in ("b", "d", "a")),
        ]
        assert f"| {' | '.join(cells)} |" in page

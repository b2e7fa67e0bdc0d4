"""`dllm-engine lm-eval` with the real harness on the built-in model, without a network."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_lm_eval import LIST, SUM, few_tasks, no_network  # noqa: F401

pytest.importorskip("lm_eval")

from dllm_engine import LLaDA, cli, decode, tasks
from dllm_engine.tokenizer import encode_prompt


def run(*arguments: str, status: int = 0) -> dict[str, Any]:
    """The results file that the command wrote under out/."""
    shutil.rmtree("out", ignore_errors=True)
    assert cli.main(["lm-eval", *arguments, "--output_path", "out"]) == status
    (file,) = Path("out").glob("*/results_*.json")
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return results


def samples(task: str) -> list[dict[str, Any]]:
    (file,) = Path("out").glob(f"*/samples_{task}_*.jsonl")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def write_task(name: str, rows: list[dict[str, Any]], text: str) -> str:
    """A task over a JSONL file here; the path of its YAML."""
    Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    head = (
        f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {name}.jsonl\ntest_split: test\n"
    )
    Path(f"{name}.yaml").write_text(head + text, encoding="utf-8")
    return f"{name}.yaml"


def test_generation_tasks_and_what_they_cost(demo_model: LLaDA, capsys: pytest.CaptureFixture[str]) -> None:
    common = ("--tasks", "demo_reverse,demo_sums", "--apply_chat_template", "--limit", "6", "--log_samples")
    results = run(*common, "--batch_size", "4", "--model_args", "policy=threshold=0.9,cache=dual")
    config, table = results["config"], capsys.readouterr().out
    assert "demo_reverse" in table
    assert config["model"] == "dllm_engine"
    assert results["model_name"] == "demo"
    decoding = config["decoding"]
    assert (decoding["policy"], decoding["cache"]) == ("Threshold(threshold=0.9)", "dual")
    assert (config["device"], config["model_device"], config["model_dtype"]) == ("cpu", "cpu", "torch.float32")
    passes = tokens = 0
    for task in ("demo_reverse", "demo_sums"):
        rows, own = samples(task), config["generation"]["tasks"][task]
        prompts = [encode_prompt(demo_model.tokenizer, row["doc"]["question"], chat=True) for row in rows]
        out = decode(demo_model, prompts, gen_length=64, policy="threshold=0.9")
        texts = demo_model.tokenizer.batch_decode(out.sequences[:, -64:], skip_special_tokens=True)
        assert [row["resps"][0][0] for row in rows] == texts
        right = [float(row["acc"]) for row in rows]
        about = [tasks.Sample(r["doc"]["task"], "", "", json.loads(r["doc"]["about"])) for r in rows]
        assert right == [tasks.score(one, text) for one, text in zip(about, texts, strict=True)]
        assert results["results"][task]["acc,none"] == sum(right) / 6 >= 0.5
        assert own["generated_tokens"] == int(out.generated_tokens.sum())
        assert own["forward_passes"] == pytest.approx(float(out.sequence_passes.double().mean()))
        assert own["tokens_per_forward"] == pytest.approx(own["generated_tokens"] / int(out.sequence_passes.sum()))
        assert own["tokens_per_second"] == pytest.approx(own["generated_tokens"] / own["seconds"])
        passes, tokens = passes + int(out.sequence_passes.sum()), tokens + own["generated_tokens"]
    total = config["generation"]
    assert (total["prompts"], total["generated_tokens"]) == (12, tokens)
    assert total["tokens_per_forward"] == pytest.approx(tokens / passes)
    assert total["seconds"] == pytest.approx(sum(own["seconds"] for own in total["tasks"].values()))
    assert config["likelihood"] == {"mc_num": 128, "is_check_greedy": True}


def test_a_file_in_the_format_of_gsm8k(demo_model: LLaDA) -> None:
    rows = [{"question": SUM, "answer": "He has 4 + 3 = <<4+3=7>>7 books.\n#### 7"}] * 3
    rows.append({"question": SUM, "answer": "wrong on purpose\n#### 8"})
    yaml = write_task(
        "gsm8k_local",
        rows,
        """output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs:
  until: ["Question:"]
  do_sample: false
  temperature: 0.0
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
    ignore_punctuation: false
    regexes_to_ignore: [",", "\\\\$", "(?s).*#### ", "\\\\.$"]
filter_list:
  - name: flexible-extract
    filter:
      - function: regex
        group_select: -1
        regex_pattern: "(-?[$0-9.,]{2,})|(-?[0-9]+)"
      - function: take_first
""",
    )
    results = run("--tasks", yaml, "--apply_chat_template", "--model_args", "gen_length=64")
    (own,) = results["results"].values()
    assert own["exact_match,flexible-extract"] == 0.75


def test_multiple_choice_by_likelihood() -> None:
    rows = [
        {"q": LIST, "choices": ["Amy Ford, Grace Wright, Alan Wells", "Grace Wright, Amy Ford, Alan Wells"], "gold": 0},
        {"q": LIST, "choices": ["Alan Wells, Grace Wright, Amy Ford", "Amy Ford, Grace Wright, Alan Wells"], "gold": 1},
    ]
    text = "output_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: choices\ndoc_to_target: gold\n"
    yaml = write_task("choices", rows, text + 'target_delimiter: ""\n')
    common = ("--tasks", yaml, "--apply_chat_template", "--log_samples", "--batch_size", "16")
    results = run(*common, "--model_args", "mc_num=8")
    first, own = samples("choices"), results["config"]["likelihood"]
    assert results["results"]["choices"]["acc,none"] == 1
    assert own["prompts"] == 4
    assert own["mc_num"] == 8
    assert [answer[0][1] for row in first for answer in row["resps"]] == ["True", "False", "False", "True"]
    run(*common, "--model_args", "mc_num=8", "is_check_greedy=False")
    again = samples("choices")
    assert [r["resps"][0][0][0] for r in again] == [r["resps"][0][0][0] for r in first]  # lm-eval's --seed
    assert {answer[0][1] for row in again for answer in row["resps"]} == {"False"}
    run(*common, "--model_args", "mc_num=8", "--seed", "5")
    assert [r["resps"][0][0][0] for r in samples("choices")] != [r["resps"][0][0][0] for r in first]


def test_answers_are_kept_by_use_cache() -> None:
    common = ("--tasks", "demo_copy,demo_choice", "--apply_chat_template", "--limit", "2", "--use_cache", "kept")
    first = run(*common, "--model_args", "mc_num=4")
    assert first["config"]["generation"]["prompts"] == 2
    again = run(*common, "--model_args", "mc_num=4")
    assert again["results"] == first["results"]
    assert again["config"]["generation"] == {"tasks": {}}
    assert "forward_passes" not in again["config"]["likelihood"]


def test_a_script_imports_the_module_and_names_the_model() -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    yaml = write_task("one", [{"q": LIST, "a": "x"}], "output_type: generate_until\ndoc_to_text: q\ndoc_to_target: a\n")
    results = lm_eval.simple_evaluate(
        model="dllm_engine",
        model_args="pretrained=demo,gen_length=32",
        tasks=["one"],
        task_manager=TaskManager(include_path=str(Path(yaml).parent.absolute()), include_defaults=False),
        apply_chat_template=True,
        batch_size=2,
    )
    assert results["samples"]["one"][0]["resps"][0][0] == "Amy Ford, Grace Wright, Alan Wells"


def test_other_subcommands_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["lm-eval", "--help"])
    assert "--apply_chat_template" in capsys.readouterr().out
    assert cli.main(["lm-eval", "validate", "--tasks", "demo_copy"]) == 0
    assert sys.argv[0] != "dllm-engine lm-eval"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "nothing_such"), "Tasks not found: nothing_such"),
        (("--tasks", "demo_copy", "--model", "hf"), "--model: it is dllm_engine here"),
        (("--tasks", "demo_copy", "-M=hf"), "--model: it is dllm_engine here"),
        (("--tasks", "demo_copy", "--batch_size", "auto"), "batch_size: 'auto' given; an int is needed"),
        (("--tasks", "demo_copy", "--model_args", "polcy=topk"), "model_args: polcy given; known: backend, batch_size"),
        (("--tasks", "demo_copy", "--model_args", "pretrained=/no/such"), "no directory /no/such"),
        (("--tasks", "demo_copy", "--model_args", "policy=best"), "policy: 'best' given; known: auto, topk"),
        (("--tasks", "demo_copy", "--model_args", "gen_length=50"), "block_length: 32 given; it must divide"),
        (("--tasks", "demo_copy", "--model_args", "block_length=x"), "block_length: 'x' given; an int"),
        (("--tasks", "demo_copy", "--model_args", "mc_num=0"), "mc_num: 0 given; at least 1"),
        (("--tasks", "demo_copy", "--model_args", "max_length=-1"), "max_length: -1.0 given; an int"),
        (("--tasks", "demo_copy", "--model_args", "max_length=0"), "max_length: 0 given; at least 1"),
        (("--tasks", "demo_copy", "--model_args", "max_length=5000"), "max_length: 5000 given; the model has max_seq"),
        (("--tasks", "demo_copy", "--device", "cuda:99"), "device: 'cuda:99' given; this torch sees"),
        (("--tasks", "demo_copy", "--model_args", "seed=-1"), "seed: -1.0 given; an int"),
    ],
)
def test_errors(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str) -> None:
    assert cli.main(["lm-eval", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("dllm-engine lm-eval: ")
    assert message in err.splitlines()[-1]


def test_without_lm_eval_the_extra_is_named() -> None:
    script = "import sys; sys.modules['lm_eval'] = None; from dllm_engine.cli import main; sys.exit(main(['lm-eval']))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert 'pip install "dllm-engine[lm-eval]"' in done.stderr
    script = "import sys, dllm_engine.cli; print([m for m in sys.modules if m.startswith(('lm_eval', 'datasets'))])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

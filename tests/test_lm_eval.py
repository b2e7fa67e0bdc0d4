"""`dllm-engine lm-eval` with the real harness on the built-in model, without a network."""

from __future__ import annotations

import functools
import json
import logging
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

from dllm_engine import LLaDA, cli, decode, likelihood, tasks
from dllm_engine.demo import DEMO_MODEL
from dllm_engine.integrations.lm_eval import DLLMEngine
from dllm_engine.tokenizer import encode_prompt

LIST = "Reverse: 0 Alan Wells, 1 Grace Wright, 2 Amy Ford"
SUM = "Alan starts with 4 books. then Alan finds 3 more books. how many books are left?"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    def refuse(*args: Any) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def few_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval reads the YAMLs of all of its own tasks first, which takes seconds a run."""
    from lm_eval import tasks as theirs

    monkeypatch.setattr(theirs, "TaskManager", functools.partial(theirs.TaskManager, include_defaults=False))


@pytest.fixture(scope="module")
def lm() -> DLLMEngine:
    return DLLMEngine(batch_size=4, seed=0)


def request(kind: str, *arguments: Any, task: str = "task") -> Any:
    from lm_eval.api.instance import Instance

    return Instance(kind, {}, arguments, 0, metadata=(task, 0, 1))


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


# -- the command ----------------------------------------------------------------------------------------------------


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


# -- the model ------------------------------------------------------------------------------------------------------


def generate(lm: DLLMEngine, text: str = LIST, **kwargs: Any) -> str:
    chat = lm.apply_chat_template([{"role": "user", "content": text}])
    return lm.generate_until([request("generate_until", chat, kwargs)], disable_tqdm=True)[0]


def test_stop_strings_and_lengths(lm: DLLMEngine) -> None:
    whole = "Amy Ford, Grace Wright, Alan Wells"
    assert generate(lm, until=["\n"]) == generate(lm) == generate(lm, until=None) == whole
    assert generate(lm, until=["Alan", "Grace"]) == "Amy Ford, "
    assert generate(lm, until=" Wright") == "Amy Ford, Grace"
    assert generate(lm, until=[""]) == whole
    lm.generated.clear()
    cut = generate(lm, max_gen_toks=3)
    assert cut == lm.tokenizer.decode(lm.tokenizer(whole, add_special_tokens=False)["input_ids"][:3])
    assert lm.generated["task"]["generated_tokens"] == 3
    assert lm._lengths({"max_gen_toks": 33}) == (33, 64)
    assert lm._lengths({}) == (256, 256)
    fixed = DLLMEngine(gen_length=32, block_length=16)
    assert fixed._lengths({"max_gen_toks": 512}) == (32, 32)
    assert generate(fixed, max_gen_toks=512) == whole


def test_the_tasks_sampling_holds_unless_model_args_says_more(monkeypatch: pytest.MonkeyPatch) -> None:
    from dllm_engine import Engine

    seen: list[dict[str, Any]] = []
    many = Engine.generate_many

    def watched(self: Engine, prompts: Any, **options: Any) -> Any:
        seen.append(options)
        return many(self, prompts, **options)

    monkeypatch.setattr(Engine, "generate_many", watched)
    plain, hot = DLLMEngine(seed=7), DLLMEngine(temperature=0.4, seed=7)
    for one in (plain, hot):
        generate(one, max_gen_toks=32)
        generate(one, max_gen_toks=32, temperature=0.9, do_sample=True)
        generate(one, max_gen_toks=32, temperature=0.9, do_sample=False)
    assert [options.get("temperature") for options in seen] == [None, 0.9, 0.0, 0.4, 0.4, 0.4]
    generate(plain, max_gen_toks=32, do_sample=True)
    assert seen.pop()["temperature"] == 1.0
    assert {options["seed"] for options in seen} == {7}


def test_what_a_task_asks_for_and_is_not_there_is_refused(lm: DLLMEngine) -> None:
    asked = {"until": ["\n"], "do_sample": False, "temperature": 0, "top_p": 1.0, "top_k": None, "num_beams": 1}
    assert generate(lm, max_new_tokens=32, **asked) == "Amy Ford, Grace Wright, Alan Wells"
    for name, value, message in (
        ("top_p", 0.95, r"top_p=0.95 given; known: until, .*; --gen_kwargs top_p=1 does without"),
        ("foo", 3, "foo=3 given; known: until, max_gen_toks"),
        ("policy", "topk", "policy=topk given; it goes to --model_args"),
        ("gen_length", 64, "gen_length=64 given; it goes to --model_args"),
    ):
        with pytest.raises(ValueError, match=f"^gen_kwargs: {message}"):
            generate(lm, **{name: value})


def test_repeated_requests_are_drawn_anew() -> None:
    lm = DLLMEngine(temperature=1.5, batch_size=3, gen_length=32, seed=1)
    chat = lm.apply_chat_template([{"role": "user", "content": SUM}])
    same = [request("generate_until", chat, {"until": []})] * 3
    assert len(set(first := lm.generate_until(same, disable_tqdm=True))) > 1
    assert lm.generate_until(same, disable_tqdm=True) == first


def test_generation_config_counts_where_nobody_says(tmp_path: Path) -> None:
    shutil.copytree(DEMO_MODEL, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text('{"max_new_tokens": 40, "policy": "factor"}')
    lm = DLLMEngine(str(tmp_path / "model"), dtype="float32")
    assert lm._lengths({}) == (40, 64)
    assert lm._lengths({"max_gen_toks": 8}) == (8, 32)
    assert str(lm.settings["policy"]) == "Factor(factor=1.0)"


def test_long_prompts_lose_their_beginning(
    lm: DLLMEngine, demo_model: LLaDA, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("lm_eval"), "propagate", True)
    short = DLLMEngine(max_length=96, batch_size=2)
    text = " ".join(["Copy: 0 Alan Wells, 1 Grace Wright"] * 30)
    ids = short.tok_encode(text)
    found = short.generate_until(
        [request("generate_until", t, {"max_gen_toks": 32}) for t in (text, "Copy: 0 Amy")], disable_tqdm=True
    )
    assert f"1 prompts (of up to {len(ids)} tokens) lose their beginning: with their answers at most 96" in caplog.text
    out = decode(demo_model, [ids[-64:]], gen_length=32)
    assert found[0] == demo_model.tokenizer.decode(out.sequences[0, 64:], skip_special_tokens=True)
    ((value, _),) = short.loglikelihood([request("loglikelihood", text, " Alan")], disable_tqdm=True)
    target = short.tok_encode(text + " Alan")[len(ids) :]
    (expected,) = likelihood.log_likelihood(demo_model, [ids[-(96 - len(target)) :]], [target], seed=short.seed)
    assert value == pytest.approx(expected.value, rel=1e-5)
    with pytest.raises(ValueError, match="max_length: 96 leaves no room for a prompt beside 96 tokens"):
        generate(short, max_gen_toks=96)


def test_choices_are_a_distribution() -> None:
    """Targets of one token: exact, so those of all ids sum to one; a context is never empty."""
    lm = DLLMEngine(batch_size=64)
    context = lm.tok_encode(LIST)
    asked = [(("", ""), context, [token]) for token in range(lm.model.config.embedding_size)]
    found = lm._loglikelihood_tokens(asked, disable_tqdm=True)
    assert torch.tensor([value for value, _ in found]).exp().sum().item() == pytest.approx(1, abs=1e-4)
    assert sum(same for _, same in found) == 1
    ((value, _),) = lm.loglikelihood([request("loglikelihood", "", "Alan")], disable_tqdm=True)
    target = lm.tok_encode("Alan", add_special_tokens=False)
    (expected,) = likelihood.log_likelihood(lm.model, [[lm.tokenizer.bos_token_id]], [target], seed=lm.seed)
    assert value == pytest.approx(expected.value, rel=1e-5)


def test_whole_texts_are_the_sum_of_their_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "greedy_matches", None)  # nobody asks whether a window is what decoding gives
    lm = DLLMEngine(max_length=12, mc_num=6, seed=3, batch_size=4)
    text = "Alan Wells, Grace Wright, Amy Ford, Alan Wells, Grace Wright, Amy Ford, Alan Wells, Grace Wright"
    ids = lm.tok_encode(text, add_special_tokens=False)
    assert len(ids) > 22
    sums = lm.loglikelihood_rolling([request("loglikelihood_rolling", t) for t in (text, "Amy", "")], disable_tqdm=True)
    # the first window has the start token before it, the last one as many tokens before it as there is room for
    windows = [([lm.tokenizer.bos_token_id], ids[:11])]
    windows += [(ids[i - 1 : i], ids[i : i + 11]) for i in range(11, len(ids) - 11, 11)]
    done = 11 * len(windows)
    windows.append((ids[len(ids) - 12 : done], ids[done:]))
    contexts, targets = zip(*windows, strict=True)
    assert [token for target in targets for token in target] == ids
    assert {len(context) + len(target) for context, target in windows} == {12}
    expected = sum(one.value for one in likelihood.log_likelihood(lm.model, contexts, targets, samples=6, seed=3))
    assert sums[0] == pytest.approx(expected, rel=1e-5)
    assert sums[1] < 0 == sums[2]


def test_chat_templates(lm: DLLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    text = lm.apply_chat_template([{"role": "user", "content": LIST}])
    assert lm.tok_encode(text) == encode_prompt(lm.tokenizer, LIST, chat=True)  # no second start token
    assert lm.apply_chat_template(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], add_generation_prompt=False
    ).endswith("b")
    monkeypatch.setattr(lm.tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="no chat template"):
        lm.apply_chat_template([{"role": "user", "content": LIST}])


def test_a_text_gets_one_start_token(lm: DLLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The built-in tokenizer adds none of its own; Llama's do."""
    asked: list[bool] = []

    class Adds:
        bos_token = "<s>"

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            asked.append(add_special_tokens)
            return {"input_ids": [0]}

    monkeypatch.setattr(lm, "tokenizer", Adds())
    for text, add in (("plain", None), ("<s>a chat", None), ("plain", False), ("<s>a chat", True)):
        assert lm.tok_encode(text, add_special_tokens=add) == [0]
    assert asked == [True, False, False, True]


def test_other_questions_are_asked_for_by_metadata() -> None:
    from dllm_engine.integrations import lm_eval_demo

    first, other = (lm_eval_demo.questions("copy", 3, seed, pretrained="demo")["test"] for seed in (0, 1))
    assert len(first) == 3
    assert first[0] != other[0]
    choices = lm_eval_demo.questions("choice", 40)["test"]
    assert all(len(set(row["choices"])) == len(row["choices"]) >= 3 for row in choices)
    assert {row["gold"] for row in choices} >= {0, 1, 2}


def test_guidance_reaches_the_likelihoods() -> None:
    values = []
    for cfg_scale in (0.0, 2.0):
        lm = DLLMEngine(cfg_scale=cfg_scale, seed=0)
        values.append(lm.loglikelihood([request("loglikelihood", LIST, " Amy Ford")], disable_tqdm=True)[0][0])
    assert values[0] != pytest.approx(values[1], rel=1e-3)

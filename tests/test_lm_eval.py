"""The model that lm-evaluation-harness asks, on the built-in model, without a network."""

from __future__ import annotations

import functools
import logging
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

from dllm_engine import LLaDA, decode, likelihood
from dllm_engine.built_in import DEMO_MODEL
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

"""Defaults of decode(), generate_many() and the command from generation_config.json beside the weights."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ending_model
from test_generate import LikeTransformers

from dllm_engine import Engine, LLaDA, cli, decode, evaluate, generation_config, tasks
from dllm_engine.built_in import DEMO_MODEL

PROMPT = "Reverse: 0 Alan Wells, 1 Grace Wright, 2 Emma Reed"
LLADA_8B = {"_from_model_config": True, "bos_token_id": 126080, "eos_token_id": 126081, "pad_token_id": 126081}


@pytest.fixture
def model() -> LLaDA:
    return ending_model()


def told(model: LLaDA, **given: Any) -> dict[str, Any]:
    settings = decode(model, [[4, 5]], **given).settings
    return settings | {"policy": repr(settings["policy"])}


def beside(directory: Path, **keys: Any) -> Path:
    """The demo model with a generation config."""
    copy = directory / "model"
    shutil.copytree(DEMO_MODEL, copy, dirs_exist_ok=True)
    (copy / generation_config.FILE).write_text(json.dumps(keys), encoding="utf-8")
    return copy


def test_the_default_stays_without_a_file(model: LLaDA) -> None:
    settings = told(model, seed=3)
    assert settings == {
        "gen_length": 128, "block_length": 32, "steps": None, "policy": "Threshold(threshold=0.9)", "cache": "dual",
        "temperature": 0.0, "cfg_scale": 0.0, "end_of_text": "committed", "backend": "cpu", "seed": [3],
    }  # fmt: skip
    model.generation_defaults = generation_config.defaults(LLADA_8B | {"top_p": 0.9, "transformers_version": "4.46.3"})
    assert model.generation_defaults == {}
    model.generation_defaults = generation_config.defaults({"do_sample": True, "top_p": 0.9, "max_length": 4096})
    assert told(model, seed=3) == settings


def test_argument_before_file_before_default(model: LLaDA) -> None:
    model.generation_defaults = generation_config.defaults(
        {
            "max_new_tokens": 64, "block_length": 16, "policy": "threshold=0.8", "cache": "prefix", "cfg_scale": 0.5,
            "temperature": 0.3, "end_of_text": "off", "steps": 32, "top_k": 3,
        }
    )  # fmt: skip
    settings = told(model)
    assert (settings["gen_length"], settings["block_length"], settings["steps"]) == (64, 16, 32)
    assert (settings["policy"], settings["cache"]) == ("Threshold(threshold=0.8)", "prefix")
    assert (settings["cfg_scale"], settings["temperature"], settings["end_of_text"]) == (0.5, 0.3, "off")
    own = told(model, gen_length=32, policy="factor", cache="none", temperature=0.0, cfg_scale=0, end_of_text="auto")
    assert (own["gen_length"], own["block_length"], own["steps"]) == (32, 16, 32)
    assert (own["policy"], own["cache"], own["temperature"], own["cfg_scale"]) == ("Factor(factor=1.0)", "none", 0.0, 0)
    assert own["end_of_text"] == "committed"
    assert generation_config.defaults({"gen_length": 32, "max_new_tokens": 64}) == {"gen_length": 32}


def test_a_temperature_under_do_sample_false_says_nothing() -> None:
    assert generation_config.defaults({"temperature": 0.7}) == {"temperature": 0.7}
    assert generation_config.defaults({"temperature": 0.7, "do_sample": True}) == {"temperature": 0.7}
    assert generation_config.defaults({"temperature": 0.7, "do_sample": False}) == {}
    assert generation_config.defaults({"temperature": None, "max_new_tokens": None}) == {}


def test_a_policy_that_sets_steps_and_steps(model: LLaDA) -> None:
    assert told(model, policy="topk=4")["steps"] == 32
    with pytest.raises(ValueError, match="steps: 8 given; topk=4 sets its own"):
        told(model, policy="topk=4", steps=8)
    model.generation_defaults = {"steps": 16}
    assert told(model)["steps"] == 16
    assert told(model, policy="topk=4")["steps"] == 32  # the caller's policy goes before the file's steps
    model.generation_defaults = {"policy": "topk=4"}
    assert told(model)["steps"] == 32
    assert told(model, gen_length=64)["steps"] == 16
    assert told(model, steps=8)["steps"] == 8  # and the caller's steps before those of the file's policy
    assert told(model, steps=8)["policy"] == "TopK()"
    assert told(model, policy="threshold")["steps"] is None


def test_every_way_in_asks_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = beside(tmp_path, max_new_tokens=32, policy="threshold=0.95", cache="none", eos_token_id=1)
    model = LLaDA.from_pretrained(path, device="cpu", dtype="float32")
    prompt = model.tokenizer("x")["input_ids"]
    assert decode(model, [prompt]).settings["cache"] == "none"
    assert decode(model, [prompt]).sequences.shape == (1, len(prompt) + 32)
    assert decode(model, [prompt], cache="dual").settings["cache"] == "dual"
    with Engine(model, max_batch=1, max_length=64) as engine:
        assert engine.cache is not None
        assert engine.cache.name == "none"
        assert len(next(engine.generate_many([prompt])).generated) == 32
        assert repr(engine.decode([prompt]).settings["policy"]) == "Threshold(threshold=0.95)"
    with Engine(model, max_batch=1, max_length=64, cache="dual") as engine:
        assert engine.decode([prompt]).settings["cache"] == "dual"
    raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
    module = LikeTransformers(model, raw)
    module.config._name_or_path = str(path)
    assert decode(module, [prompt]).sequences.shape == (1, len(prompt) + 32)

    arguments = ["generate", "--model", str(path), "--dtype", "float32", "--chat", "--prompt", PROMPT, "--json"]
    assert cli.main([*arguments]) == 0
    own = json.loads(capsys.readouterr().out)
    assert cli.main([*arguments, "--policy", "topk", "--steps", "32"]) == 0
    slow = json.loads(capsys.readouterr().out)
    assert own["text"] == slow["text"] == "Emma Reed, Grace Wright, Alan Wells"
    assert own["forward_passes"] < slow["forward_passes"] <= 32


def test_evaluation_and_traces_say_everything(demo_model: LLaDA, tmp_path: Path) -> None:
    """Comparisons and training data do not move with the file."""
    path = beside(tmp_path, temperature=2.0, cfg_scale=3.0, steps=1, policy="topk=32", gen_length=32)
    other = LLaDA.from_pretrained(path, device="cpu", dtype="float32")
    setting = evaluate.Setting("threshold", gen_length=32)
    sample = [tasks.generate("worded_sums", random.Random(3))]
    rows = [evaluate.run(model, sample, setting)[0] for model in (demo_model, other)]
    assert rows[0].text == rows[1].text
    assert rows[0].passes == rows[1].passes > 1

    from dllm_engine import traces

    prompts = [demo_model.tokenizer(f"Copy: 0 Amy {i}")["input_ids"] for i in range(2)]
    made = [
        traces.collect(model, prompts, tmp_path / name, gen_length=32, block_length=32, progress=False)
        for name, model in (("a", demo_model), ("b", other))
    ]
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"eos_token_id": "1"}, "eos_token_id is '1'; a whole number is needed"),
        ({"eos_token_id": [1, {}]}, r"eos_token_id is \{\}; a whole number is needed"),
        ({"eos_token_id": True}, "eos_token_id is True; a whole number is needed"),
        ({"max_new_tokens": "many"}, "max_new_tokens: 'many' given; an int is needed"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0 given; at least 1"),
        ({"gen_length": 12.0}, "gen_length: 12.0 given; an int"),
        ({"block_length": True}, "block_length: True given"),
        ({"steps": -1}, "steps: -1 given"),
        ({"temperature": "hot"}, "temperature: 'hot' given; a finite number"),
        ({"cfg_scale": -1}, "cfg_scale: -1 given"),
        ({"policy": "best"}, "policy: 'best' given; known: auto, topk"),
        ({"policy": 3}, "policy: 3 given; a text is needed"),
        ({"policy": "threshold=2"}, "threshold: 2.0 given"),
        ({"cache": "triple"}, "cache: 'triple' given"),
        ({"cache": 1}, "cache: int given"),
        ({"end_of_text": "soon"}, "end_of_text: 'soon' given"),
    ],
)
def test_a_bad_value_is_an_error_that_names_the_file(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    path = beside(tmp_path, **keys)
    with pytest.raises(ValueError, match=message) as raised:
        LLaDA.from_pretrained(path, device="cpu")
    assert str(raised.value).startswith(f"{path / 'generation_config.json'}: ")


def test_values_that_do_not_fit_the_call_name_the_file_too(model: LLaDA) -> None:
    model.generation_defaults = {"gen_length": 100, "temperature": 0.5}
    with pytest.raises(ValueError, match=r"gen_length 100 \(gen_length, temperature: from generation_config.json\)"):
        decode(model, [[4]])
    with pytest.raises(ValueError, match=r"FreeDave decides without one, at 0 \(temperature: from generation_config"):
        decode(model, [[4]], gen_length=32, policy="freedave")
    with pytest.raises(ValueError, match=r"block_length: 3 given; it must divide gen_length 32$"):
        decode(model, [[4]], gen_length=32, block_length=3, temperature=0.0)


def test_names_take_values_as_on_the_command_line(model: LLaDA) -> None:
    assert told(model, policy="threshold=0.95")["policy"] == "Threshold(threshold=0.95)"
    a = decode(model, [[4, 5]], gen_length=32, policy="topk=8")
    assert torch.equal(a.sequences, decode(model, [[4, 5]], gen_length=32, policy="topk", steps=4).sequences)
    with pytest.raises(ValueError, match="policy: topk=5 given; tokens a step must divide gen_length 32"):
        decode(model, [[4, 5]], gen_length=32, policy="topk=5")

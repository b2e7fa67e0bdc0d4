"""generate() against LLaDA's algorithm spelled out in float64 (see naive.py), with every flag."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import naive
import pytest
import torch
from conftest import tiny_model
from torch import nn

import dllm_engine as dllm
from dllm_engine import LLaDA, decode

PROMPTS = [[7, 3, 22, 41], [59, 12, 5, 30]]  # the second holds the mask id


@pytest.fixture(scope="module")
def model() -> LLaDA:
    """A random model that likes its end ids: without that the *_inf flags would change nothing."""
    made = tiny_model(seed=3)
    made.end_ids = (1, 2)
    made.lm_head[1] = made.lm_head[40] * 1.5
    made.lm_head[2] = made.lm_head[17] * 1.4
    made.lm_head[59] = made.lm_head[33] * 1.6  # and its mask id
    return made


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"steps": 5, "block_length": 16},
        {"logits_eos_inf": True},
        {"confidence_eos_eot_inf": True},
        {"logits_eos_inf": True, "confidence_eos_eot_inf": True},
        {"cfg_scale": 0.7},
        {"remasking": "random"},
        {"remasking": "random", "steps": 4},
        {"temperature": 0.8},
        {"temperature": 0.5, "remasking": "random", "cfg_scale": 0.5},
    ],
    ids=lambda s: "-".join(f"{k}={v}" for k, v in s.items()) or "plain",
)
def test_equals_the_algorithm_spelled_out(model: LLaDA, settings: dict[str, Any]) -> None:
    settings = {"steps": 16, "gen_length": 16, "block_length": 8} | settings
    torch.manual_seed(11)
    seed = int(torch.randint(2**31, ()))
    expected = [naive.generate(model, p, seed=seed + i, **settings) for i, p in enumerate(PROMPTS)]
    torch.manual_seed(11)
    out = dllm.generate(model, torch.tensor(PROMPTS), **settings)
    assert out.tolist() == expected
    generated = out[:, 4:].flatten().tolist()
    assert model.mask_id not in generated
    if not settings.get("logits_eos_inf"):
        return
    assert 1 not in generated


def test_flags_change_what_is_decoded(model: LLaDA) -> None:
    """Otherwise the comparison above would prove nothing about them."""
    plain = dllm.generate(model, torch.tensor(PROMPTS), steps=16, gen_length=16, block_length=8)
    assert 1 in plain[:, 4:]
    for flag in ("logits_eos_inf", "confidence_eos_eot_inf"):
        flags = {flag: True}
        other = dllm.generate(model, torch.tensor(PROMPTS), steps=16, gen_length=16, block_length=8, **flags)
        assert not torch.equal(plain, other)


def test_the_default_mask_id_is_the_models_own(model: LLaDA) -> None:
    prompt = torch.tensor(PROMPTS)
    own = dllm.generate(model, prompt, steps=8, gen_length=8, block_length=8, mask_id=59)
    assert torch.equal(own, dllm.generate(model, prompt, steps=8, gen_length=8, block_length=8, mask_id=126336))
    with pytest.raises(ValueError, match="mask_id: 7 given; this model's mask id is 59"):
        dllm.generate(model, prompt, steps=8, gen_length=8, block_length=8, mask_id=7)
    with pytest.raises(ValueError, match="remasking: 'best' given; known: low_confidence, random"):
        dllm.generate(model, prompt, steps=8, gen_length=8, block_length=8, remasking="best")
    with pytest.raises(ValueError, match=r"remasking: \[\] given"):
        dllm.generate(model, prompt, steps=8, gen_length=8, block_length=8, remasking=[])  # type: ignore[arg-type]


def test_more_steps_than_tokens_act_as_one_token_a_step(model: LLaDA) -> None:
    prompt = torch.tensor(PROMPTS)
    few = dllm.generate(model, prompt, steps=8, gen_length=8, block_length=8)
    assert torch.equal(few, dllm.generate(model, prompt, steps=128, gen_length=8, block_length=8))


class LikeTransformers(nn.Module):
    """What a loaded ``LLaDAModelLM`` shows: a config with ``to_dict`` and parameters under ``model.transformer``."""

    def __init__(self, model: LLaDA, raw: dict[str, Any]) -> None:
        super().__init__()

        class Config:
            _name_or_path = ""

            def to_dict(self) -> dict[str, Any]:
                return raw

        self.config = Config()
        self.model = nn.Module()
        self.model.transformer = model

    def forward(self, *args: Any) -> None:
        raise AssertionError("the module's own forward must not run")


def test_a_transformers_module_shares_its_tensors(model: LLaDA) -> None:
    from conftest import tiny_config

    module = LikeTransformers(model, tiny_config(eos_token_id=[1, 2]))
    shared = LLaDA.from_transformers(module)
    assert shared.lm_head.data_ptr() == model.lm_head.data_ptr()
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(shared.parameters(), model.parameters(), strict=True))
    prompt = torch.tensor(PROMPTS)
    expected = dllm.generate(model, prompt, steps=8, gen_length=8, block_length=8)
    assert torch.equal(dllm.generate(module, prompt, steps=8, gen_length=8, block_length=8), expected)
    first = decode(module, PROMPTS, gen_length=16, block_length=8, policy="threshold").sequences
    assert torch.equal(first, decode(model, PROMPTS, gen_length=16, block_length=8, policy="threshold").sequences)
    for size in (40, 64):
        assert LLaDA.from_transformers(module, vocab_size=size).vocab_size == size
    with pytest.raises(ValueError, match="vocab_size: 65 given; 1 to 64"):
        LLaDA.from_transformers(module, vocab_size=65)
    with pytest.raises(ValueError, match="Linear has no transformers config"):
        LLaDA.from_transformers(nn.Linear(2, 2))
    away = tiny_model()
    away.blocks[1].to("meta")
    with pytest.raises(ValueError, match="model: weights on cpu, meta; all on one device are needed"):
        LLaDA.from_transformers(LikeTransformers(away, tiny_config()))
    with pytest.raises(
        TypeError, match=r"model: weights of torch.float64 given; float32, bfloat16 or float16 is needed"
    ):
        LLaDA.from_transformers(LikeTransformers(tiny_model().double(), tiny_config()))


def test_a_modules_config_is_looked_at_again(model: LLaDA) -> None:
    from conftest import tiny_config

    raw = tiny_config(eos_token_id=[1, 2])
    module = LikeTransformers(model, raw)
    settings: dict[str, Any] = {"gen_length": 16, "block_length": 8, "policy": "topk"}
    first = decode(module, PROMPTS, **settings).sequences
    raw["rope_theta"] = 50.0
    changed = decode(module, PROMPTS, **settings).sequences
    assert torch.equal(changed, decode(LikeTransformers(model, raw), PROMPTS, **settings).sequences)
    assert not torch.equal(changed, first)


def test_a_module_from_the_hub_is_described_by_its_snapshot(
    model: LLaDA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from a directory: its generation config's end ids count. What the cache does not hold is no error."""
    from conftest import tiny_config
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "generation_config.json").write_text('{"eos_token_id": 7}')
    (tmp_path / "models--owner--name" / "refs").mkdir()
    (tmp_path / "models--owner--name" / "refs" / "main").write_text("0123")
    module = LikeTransformers(model, tiny_config(eos_token_id=[1]))
    for name, ends in (("owner/name", (1, 7)), ("owner/another", (1,)), ("not a name/at all", (1,)), ("", (1,))):
        module.config._name_or_path = name
        assert LLaDA.from_transformers(module).end_ids == ends, name

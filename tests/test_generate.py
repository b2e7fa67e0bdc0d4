"""generate() against LLaDA's algorithm spelled out in float64 (see naive.py), with every flag."""

from __future__ import annotations

from typing import Any

import naive
import pytest
import torch
from conftest import tiny_model
from torch import nn

import dllm_engine as dllm
from dllm_engine import Engine, LLaDA, decode

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


def test_a_transformers_module_whose_head_is_tied() -> None:
    from conftest import tiny_config

    tied = tiny_model(weight_tying=True)
    module = LikeTransformers(tied, tiny_config(weight_tying=True))
    tied.ff_out = nn.Linear(32, 64, bias=False)
    tied.ff_out.weight = tied.wte.weight
    assert LLaDA.from_transformers(module).lm_head.data_ptr() == tied.wte.weight.data_ptr()
    tied.ff_out.weight = nn.Parameter(tied.wte.weight * 2)
    with pytest.raises(ValueError, match="no place for, the first: ff_out.weight"):
        LLaDA.from_transformers(module)


def test_a_transformers_module_in_two_dtypes_is_refused() -> None:
    from conftest import tiny_config

    mixed = tiny_model()
    mixed.ln_f.weight = nn.Parameter(mixed.ln_f.weight.bfloat16())
    with pytest.raises(ValueError, match=r"tensors are \['torch.bfloat16', 'torch.float32'\]; one of"):
        LLaDA.from_transformers(LikeTransformers(mixed, tiny_config()))


def test_a_transformers_module_keeps_its_engine_while_its_tensors_stay(model: LLaDA) -> None:
    import copy
    import gc
    import weakref

    from conftest import tiny_config

    module = LikeTransformers(copy.deepcopy(model), tiny_config(eos_token_id=[1, 2]))
    settings: dict[str, Any] = {"gen_length": 16, "block_length": 8, "policy": "threshold"}
    first = decode(module, PROMPTS, **settings).sequences
    kept = Engine.kept(module)
    assert kept.nbytes > 0
    assert Engine.kept(module) is kept
    with torch.no_grad():
        module.model.transformer.ff_out.weight.mul_(-1)  # in place: the shared tensor is the same one
    assert Engine.kept(module) is kept
    second = decode(module, PROMPTS, **settings).sequences
    assert not torch.equal(first, second)
    module.model.transformer.ff_out.weight = nn.Parameter(model.lm_head.clone(), requires_grad=False)
    assert torch.equal(decode(module, PROMPTS, **settings).sequences, first)
    assert Engine.kept(module) is not kept
    gone = weakref.ref(Engine.kept(module))
    del module, kept
    gc.collect()
    assert gone() is None

"""What others do to a model: adapters in place of its matrices, hooks, torch.compile around a decode."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import tiny_model
from torch import Tensor, nn

from dllm_engine import Engine, LLaDA, decode, generate

SETTINGS: dict[str, Any] = {"gen_length": 16, "block_length": 8, "policy": "topk", "end_of_text": "off"}
PROMPTS = [[4, 5, 6], [7, 8]]


class Adapter(nn.Module):
    """As adapters are: what it wraps is there by the old names, and calling it does something else."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    @property
    def weight(self) -> Tensor:
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor:
        return self.base.bias  # type: ignore[return-value]

    @property
    def eps(self) -> float:
        return self.base.eps  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        return -2 * self.base(x)


def loaded() -> LLaDA:
    """With weights that are multiplied together lying together."""
    source = tiny_model()
    model = LLaDA.uninitialised(source.config, torch.device("cpu"), torch.float32)
    model.load_state_dict(source.state_dict())
    assert all(model.joined_weights())
    return model.requires_grad_(False)


@pytest.mark.parametrize(
    "name", ["q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out", "attn_norm", "ff_norm", "ln_f"]
)
def test_adapters_are_called(name: str) -> None:
    """In any of the modules: as in a copy, whose weights lie apart so that every module is called."""
    model = loaded()
    before = decode(model, PROMPTS, **SETTINGS).sequences
    holder = model if name == "ln_f" else model.blocks[1]
    setattr(holder, name, Adapter(getattr(holder, name)))
    out = decode(model, PROMPTS, **SETTINGS).sequences
    assert not torch.equal(out, before)
    assert torch.equal(out, decode(copy.deepcopy(model), PROMPTS, **SETTINGS).sequences)
    assert model.altered()
    setattr(holder, name, getattr(holder, name).base)
    assert torch.equal(decode(model, PROMPTS, **SETTINGS).sequences, before)
    assert all(model.joined_weights())


def test_hooks_are_called() -> None:
    model, calls = loaded(), {"forward": 0, "before": 0, "replaced": 0}

    def counts(name: str) -> Any:
        def hook(*_: Any) -> None:
            calls[name] += 1

        return hook

    first, second = model.blocks
    up = second.up_proj.forward

    def replaced(x: Tensor) -> Tensor:  # as accelerate does
        calls["replaced"] += 1
        return up(x)  # type: ignore[no-any-return, operator]

    handles = [first.q_proj.register_forward_hook(counts("forward"))]
    handles += [second.register_forward_pre_hook(counts("before"))]
    second.up_proj.forward = replaced
    passes = decode(model, PROMPTS, **SETTINGS).forward_passes
    assert calls == dict.fromkeys(calls, passes)
    del second.up_proj.forward
    for handle in handles:
        handle.remove()
    decode(model, PROMPTS, **SETTINGS)
    assert calls == dict.fromkeys(calls, passes)


def test_a_head_that_is_not_only_its_weight_is_refused() -> None:
    model = loaded()
    handle = model.ff_out.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="model: its LM head, ff_out, is a Linear or has hooks"):
        decode(model, PROMPTS, **SETTINGS)
    handle.remove()
    decode(model, PROMPTS, **SETTINGS)
    model.ff_out = Adapter(model.ff_out)
    with pytest.raises(ValueError, match="ff_out, is a Adapter or has hooks"):
        model(torch.tensor([[4, 5]]))


def test_decodes_run_as_they_are_inside_a_compiled_function() -> None:
    """Nothing of the engine is compiled, whichever way it is called, and the sizes may change."""
    model, graphs = loaded(), []

    def counting(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph

    prompt = torch.tensor([[4, 5, 6]])
    with Engine(model, max_batch=2, max_length=64) as engine:
        ways: dict[str, Any] = {
            "decode": decode,
            "caller": lambda *given, **more: decode(*given, **more),
            "engine": lambda model, *given, **more: engine.decode(*given, **more),
        }
        for name, way in ways.items():
            torch.compiler.reset()
            compiled = torch.compile(way, backend=counting)
            for prompts in (PROMPTS, PROMPTS[:1], [[4] * 9, [5]]):
                found = compiled(model, prompts, **SETTINGS).sequences
                assert torch.equal(found, decode(model, prompts, **SETTINGS).sequences), name
        want = generate(model, prompt, steps=8, gen_length=16, block_length=8)
        found = torch.compile(generate, backend=counting)(model, prompt, steps=8, gen_length=16, block_length=8)
        assert torch.equal(found, want)
    assert not graphs


def test_hooks_of_all_modules_are_heard() -> None:
    model = loaded()
    before = decode(model, PROMPTS, **SETTINGS).sequences

    def negated(module: nn.Module, given: Any, out: Tensor) -> Tensor | None:
        return -out if module in layers else None

    layers = [m for m in model.blocks.modules() if isinstance(m, nn.Linear)]
    apart = copy.deepcopy(model)  # whose modules are called one by one in any case
    for module in apart.blocks.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, given, out: -out)
    hook = nn.modules.module.register_module_forward_hook(negated)
    try:
        out = decode(model, PROMPTS, **SETTINGS).sequences
    finally:
        hook.remove()
    assert torch.equal(out, decode(apart, PROMPTS, **SETTINGS).sequences)
    assert not torch.equal(out, before)
    assert torch.equal(decode(model, PROMPTS, **SETTINGS).sequences, before)


def test_another_config_has_other_rotations() -> None:
    model, fresh = tiny_model(), tiny_model()
    before = decode(model, PROMPTS, **SETTINGS).sequences
    model.config = fresh.config = replace(model.config, rope_theta=50.0, max_sequence_length=2048)
    out = decode(model, PROMPTS, **SETTINGS).sequences
    assert torch.equal(out, decode(fresh, PROMPTS, **SETTINGS).sequences)
    assert not torch.equal(out, before)
    decode(model, [[5] * 1500], gen_length=8, block_length=8)  # beyond the tables of before

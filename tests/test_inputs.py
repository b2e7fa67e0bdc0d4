"""Every bad argument gets an exception that names it, before the first forward pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_model

from dllm_engine import LLaDA, decode
from dllm_engine.checks import seeds_of
from dllm_engine.policies import Factor, Learn2PD, Threshold


@pytest.fixture(scope="module")
def model() -> LLaDA:
    made = tiny_model()

    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a forward pass was made before the arguments were checked")

    made.hidden_states = forbidden  # type: ignore[method-assign]
    return made


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"gen_length": 30}, ValueError, "block_length: 8 given; it must divide gen_length 30"),
        ({"gen_length": 4}, ValueError, "block_length: 8 given; it must divide gen_length 4"),
        ({"gen_length": 0}, ValueError, "gen_length: 0 given; at least 1"),
        ({"block_length": -8}, ValueError, "block_length: -8 given; at least 1"),
        ({"gen_length": 32.0}, TypeError, "gen_length: 32.0 given; an int"),
        ({"steps": True}, TypeError, "steps: True given; an int"),
        ({"steps": 0}, ValueError, "steps: 0 given; at least 1"),
        ({"steps": 6}, ValueError, r"steps: 6 given; the 4 blocks .* must divide it"),
        ({"gen_length": 1024}, ValueError, "prompt of 2 tokens \\+ 1024 exceeds .* max_sequence_length 1024"),
        ({"policy": "best"}, ValueError, "policy: 'best' given; known: auto, topk, random, threshold"),
        ({"policy": 3}, TypeError, "policy: int given; a name or a policies.Policy"),
        ({"policy": "learn2pd"}, ValueError, "policy: 'learn2pd' by name needs filter.safetensors"),
        ({"policy": "learn2pd@0.5"}, ValueError, "policy: 'learn2pd' by name needs filter.safetensors"),
        ({"policy": "topk=16"}, ValueError, "policy: topk=16 given; tokens a step must divide block_length 8"),
        ({"cache": "triple"}, ValueError, "cache: 'triple' given; known: none, prefix, dual"),
        ({"end_of_text": "maybe"}, ValueError, "end_of_text: 'maybe' given; known: auto, off, committed, predicted"),
        ({"backend": "abacus"}, ValueError, "backend: 'abacus' given; known: auto, cpu, triton, cuda, eager"),
        ({"temperature": -1.0}, ValueError, "temperature: -1.0 given; a finite number ≥ 0"),
        ({"temperature": True}, ValueError, "temperature: True given"),
        ({"temperature": float("nan")}, ValueError, "temperature: nan given"),
        ({"temperature": 1e38}, ValueError, r"temperature: 1e\+38 given; a finite number ≥ 0, at most 1e\+30"),
        ({"temperature": 10**400}, ValueError, "temperature: 1000"),
        ({"cfg_scale": 1e300}, ValueError, r"cfg_scale: 1e\+300 given"),
        ({"cfg_scale": float("inf")}, ValueError, "cfg_scale: inf given"),
        ({"seed": -1}, ValueError, "seed: -1 given; seeds .* 0 to 2"),
        ({"seed": 2**63}, ValueError, "seed: 9223372036854775808 given; seeds .* 0 to 2"),
        ({"seed": [1, 2, 3]}, ValueError, "seed: 3 seeds given for a batch of 1"),
        ({"seed": [True]}, TypeError, r"seed: \[True\] given; an int"),
        ({"seed": "x"}, TypeError, "seed: 'x' given; an int, a list of ints or None"),
        ({"input_ids": []}, ValueError, "input_ids: an empty batch"),
        ({"input_ids": [[]]}, ValueError, "input_ids: prompt 0 is empty"),
        ({"input_ids": [[1], []]}, ValueError, "input_ids: prompt 1 is empty"),
        ({"input_ids": [["a"]]}, TypeError, "input_ids: prompt 0 holds something other than ints"),
        ({"input_ids": [[3, True]]}, TypeError, "input_ids: prompt 0 holds something other than ints"),
        ({"input_ids": "hello"}, TypeError, "input_ids: str given; a LongTensor"),
        ({"input_ids": [1, 2]}, TypeError, "input_ids: a list of int given; a LongTensor"),
        ({"input_ids": [b"abc"]}, TypeError, "input_ids: a list of bytes given; a LongTensor"),
        ({"input_ids": [{"input_ids": [1]}]}, TypeError, "input_ids: a list of dict given; .* its 'input_ids'"),
        ({"input_ids": {"input_ids": [[1]]}}, TypeError, "input_ids: a dict given; its own 'input_ids' are needed"),
        ({"input_ids": np.ones((1, 2))}, TypeError, "input_ids: ndarray given; a LongTensor"),
        ({"input_ids": torch.ones(1, 2, dtype=torch.long).to_sparse()}, TypeError, "a dense one with values"),
        ({"input_ids": torch.ones(1, 2, dtype=torch.long, device="meta")}, TypeError, "a dense one with values"),
        ({"input_ids": [[2**70]]}, ValueError, "input_ids: an id does not fit 64 bits"),
        ({"input_ids": [[64]]}, ValueError, "input_ids: id 64 given; the model has ids 0 to 63"),
        ({"input_ids": [[-1]]}, ValueError, "input_ids: id -1 given; the model has ids 0 to 63"),
        ({"input_ids": torch.zeros(0, 3, dtype=torch.long)}, ValueError, "input_ids: .*\\[0, 3\\]"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, ValueError, "input_ids: .*\\[1, 0\\]"),
        ({"input_ids": torch.zeros(3, dtype=torch.long)}, ValueError, "input_ids: .*\\[3\\]"),
        ({"input_ids": torch.zeros(1, 3)}, TypeError, "input_ids: .*float32"),
        (
            {"input_ids": torch.ones(1, 2, dtype=torch.long), "attention_mask": np.array([["a", "b"]])},
            ValueError,
            "attention_mask: ndarray given; a tensor of input_ids' shape",
        ),
        (
            {"input_ids": torch.ones(1, 3, dtype=torch.long), "attention_mask": torch.ones(1, 2)},
            ValueError,
            "attention_mask: \\[1, 2\\] given; a tensor of input_ids' shape \\[1, 3\\]",
        ),
        (
            {"input_ids": torch.ones(1, 3, dtype=torch.long), "attention_mask": torch.tensor([[1, 1, 0]])},
            ValueError,
            "attention_mask: a 0 follows a 1; only left padding",
        ),
        (
            {"input_ids": torch.ones(1, 3, dtype=torch.long), "attention_mask": torch.tensor([[0, 0, 0]])},
            ValueError,
            "attention_mask: a prompt without any token",
        ),
        (
            {"input_ids": torch.ones(1, 3, dtype=torch.long), "attention_mask": torch.tensor([[0, 2, 1]])},
            ValueError,
            "attention_mask: values other than 0 and 1",
        ),
        (
            {"input_ids": [[1, 2]], "attention_mask": torch.ones(1, 2)},
            ValueError,
            "attention_mask: goes with a tensor",
        ),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items())[:50] if isinstance(value, dict) else "",
)
def test_error(model: LLaDA, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"input_ids": [[4, 5]], "gen_length": 32, "block_length": 8} | arguments
    with pytest.raises(error, match=message):
        decode(model, given.pop("input_ids"), **given)


def test_the_seed_of_a_later_prompt_has_a_limit_too() -> None:
    of = seeds_of(2**63 - 2)
    assert [of(0), of(1)] == [2**63 - 2, 2**63 - 1]
    with pytest.raises(ValueError, match="seed: 9223372036854775808 given"):
        of(2)


def test_padding_that_all_prompts_have_takes_no_room() -> None:
    model = tiny_model(max_sequence_length=20)
    ids = torch.tensor([[0] * 9 + [4, 5, 6], [0] * 8 + [7, 4, 5, 6]])
    settings: dict[str, Any] = {"gen_length": 16, "block_length": 8}
    out = decode(model, ids, attention_mask=(ids > 0).long(), **settings)
    assert (
        out.sequences[:, -16:].tolist()
        == decode(model, [[4, 5, 6], [7, 4, 5, 6]], **settings).sequences[:, -16:].tolist()
    )
    with pytest.raises(ValueError, match="a prompt of 5 tokens \\+ 16 exceeds"):
        decode(model, [[4] * 5, [4]], **settings)


def test_rules_check_their_own_numbers() -> None:
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"threshold: .* given; 0 to 1 allowed"):
            Threshold(bad)
    for bad in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"factor: .* given; a finite number ≥ 0"):
            Factor(bad)
    with pytest.raises(FileNotFoundError, match="no/such/filter"):
        Learn2PD("no/such/filter.safetensors")


def test_a_module_that_is_no_model(model: LLaDA) -> None:
    with pytest.raises((TypeError, ValueError), match="Linear"):
        decode(torch.nn.Linear(2, 2), [[1]])
    with pytest.raises(TypeError, match="model: dict given"):
        decode({}, [[1]])  # type: ignore[arg-type]


def test_prompts_may_be_tensors_and_hold_integers_of_numpy() -> None:
    made, prompts = tiny_model(), [[5, 3], [7, 8, 9]]
    expected = decode(made, prompts, gen_length=8, block_length=8).sequences
    array = [np.array(p, dtype=np.int32) for p in prompts]
    for same in ([torch.tensor(p) for p in prompts], [list(p) for p in array], array):
        assert torch.equal(decode(made, same, gen_length=8, block_length=8).sequences, expected)
    with pytest.raises(TypeError, match="prompt 1 holds something other than ints"):
        decode(made, [[5], torch.tensor([0.5])], gen_length=8, block_length=8)


def test_a_model_in_float64_is_named() -> None:
    with pytest.raises(TypeError, match="model: weights of torch.float64 given; float32, bfloat16 or float16"):
        decode(tiny_model().double(), [[5]], gen_length=8, block_length=8)


def test_a_batch_may_be_an_array() -> None:
    made, prompts = tiny_model(), [[5, 3], [7, 8]]
    settings: dict[str, Any] = {"gen_length": 8, "block_length": 8}
    expected = decode(made, prompts, **settings).sequences
    for dtype in (np.int64, np.uint16):
        assert torch.equal(decode(made, np.array(prompts, dtype=dtype), **settings).sequences, expected)
    padded = decode(made, np.array([[0, 5, 3]]), attention_mask=np.array([[0, 1, 1]]), **settings)
    assert padded.sequences[0, 1:].tolist() == expected[0].tolist()


def test_weights_that_no_call_could_multiply() -> None:
    """Before the first pass: torch's own messages come from inside a layer, or are of its meta device."""
    norm, half, nowhere, away = (tiny_model() for _ in range(4))
    norm.blocks[1].attn_norm.bfloat16()
    half.wte.bfloat16()
    nowhere.to("meta")
    away.blocks[1].to("meta")
    for model, error, message in (
        (norm, TypeError, "model: weights of torch.bfloat16, torch.float32 given; layers need one dtype"),
        (half, TypeError, "layers need one dtype"),
        (nowhere, ValueError, "model: weights on meta; all on one device are needed"),
        (away, ValueError, "model: weights on cpu, meta; all on one device"),
    ):
        with pytest.raises(error, match=message):
            decode(model, [[4, 5]], gen_length=8, block_length=8)


@pytest.mark.parametrize("name", ["temperature", "cfg_scale"])
def test_numbers_may_be_of_numpy(name: str) -> None:
    made = tiny_model()
    settings: dict[str, Any] = {"gen_length": 8, "block_length": 8, "seed": 0}
    expected = decode(made, [[5, 3]], **settings, **{name: 0.5})
    out = decode(made, [[5, 3]], **settings, **{name: np.float32(0.5)})
    assert torch.equal(out.sequences, expected.sequences)
    assert type(out.settings[name]) is float

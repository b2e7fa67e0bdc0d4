"""Block calls as on a GPU: the kernels of a layer, of attention and of the step, in one decode.

On a CPU they are only interpreted (`test_ops.test_interpreted_triton` runs this file so).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import INTERPRETED, SLOWLY
from conftest import ending_model
from mixtures import random_model
from test_graphs import PROMPTS, Fake, fixed  # noqa: F401

from dllm_engine import LLaDA, decode, graphs
from dllm_engine.layers import Kernels, Mixture
from dllm_engine.policies import Threshold

pytest.importorskip("triton")

from dllm_engine.kernels import early, layer, products

pytestmark = [
    pytest.mark.skipif(not SLOWLY, reason="test_ops runs these by Triton's interpreter"),
    pytest.mark.usefixtures("fixed"),
]


def loaded(source: LLaDA, dtype: torch.dtype) -> LLaDA:
    """The same weights, as they lie in a model that was loaded."""
    model = LLaDA.uninitialised(source.config, torch.device("cpu"), dtype)
    model.load_state_dict(source.state_dict())
    return model


@pytest.mark.parametrize(
    ("layers", "kind"),
    [
        ("", {}),
        ("", {"shifted": True}),
        ("", {"block_size": 8}),
        ("", {"block_size": 8, "shifted": True}),
        ("apart", {}),
        ("off", {}),
    ],
    ids=str,
)
def test_the_kernels_give_the_same_tokens(monkeypatch: pytest.MonkeyPatch, layers: str, kind: dict[str, Any]) -> None:
    """The whole call as on a GPU: attention reads its bounds from the state, the layer's kernels write the cache, the
    Triton step commits. Weights that lie apart, and the environment variable, leave the layers to torch.
    """
    sizes: dict[str, Any] = {"d_model": 96, "n_heads": 6, "n_kv_heads": 2, "mlp_hidden_size": 50}  # heads of 16
    torch.manual_seed(0)  # biases
    model = source = ending_model(**sizes, include_qkv_bias=True, **kind)
    if layers != "apart":
        model = loaded(source, torch.float32)
    monkeypatch.setenv("DLLM_LAYER_KERNELS", "0" if layers == "off" else "1")
    want_kernels = Kernels.NONE if layers else Kernels.BETWEEN
    settings: dict[str, Any] = {"policy": Threshold(0.5), "gen_length": 8, "block_length": 4}
    seen: list[tuple[Any, Kernels]] = []
    hidden_states = LLaDA.hidden_states

    def noted(self: LLaDA, tokens: Any, rope: Any, keys: Any, *more: Any) -> Any:
        seen.append((type(keys), more[2] if more[2:] else Kernels.NONE))
        return hidden_states(self, tokens, rope, keys, *more)

    with monkeypatch.context() as patch:
        patch.setattr(graphs, "supported", lambda forward, options: False)
        want = decode(source, PROMPTS[:3], backend="cpu", **settings)
    monkeypatch.setattr(LLaDA, "hidden_states", noted)
    out = decode(model, PROMPTS[:3], backend="triton", **settings)
    block_calls = [call for call in seen if call[0] is tuple]
    assert block_calls, "the kernel of attention was not called"
    assert block_calls == [(tuple, want_kernels)] * len(block_calls)
    assert torch.equal(out.sequences, want.sequences)
    assert torch.equal(out.sequence_passes, want.sequence_passes)


def test_graphs_with_and_without_the_layer_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has graphs of its own on the same buffers; rows too wide for the norm go the other way."""
    model = loaded(ending_model(d_model=32, n_heads=2, n_kv_heads=2), torch.float32)
    calls: list[bool] = []
    hidden_states = LLaDA.hidden_states

    def noted(self: LLaDA, *arguments: Any) -> Any:
        calls.append(arguments[5:] == (Kernels.BETWEEN,))
        return hidden_states(self, *arguments)

    monkeypatch.setattr(LLaDA, "hidden_states", noted)
    found = []
    for value, most in (("1", 32), ("0", 32), ("1", 32), ("1", 31)):
        monkeypatch.setenv("DLLM_LAYER_KERNELS", value)
        monkeypatch.setattr(layer, "MAX_SIZE", most)
        calls.clear()
        out = decode(model, PROMPTS[1:2], policy="topk", gen_length=4, block_length=4, backend="triton")
        found.append(out.sequences)
        assert any(calls) == (value == "1" and most == 32)
    assert Fake.captures == 2
    assert all(torch.equal(one, found[0]) for one in found)


def test_all_kernels_of_a_block_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float16, where each value of the variable changes what runs: the tokens are those of torch's layers."""
    model = loaded(ending_model(d_model=64, n_heads=2, n_kv_heads=2), torch.float16)
    multiplied: list[bool] = []
    linear = products.linear

    def noted(*arguments: Any, early: bool) -> Any:
        multiplied.append(early)
        return linear(*arguments, early=early)

    monkeypatch.setattr(products, "linear", noted)
    settings: dict[str, Any] = {"policy": Threshold(0.5), "gen_length": 8, "block_length": 4, "backend": "triton"}
    found = []
    for kernels in list(Kernels)[: 3 if INTERPRETED or early.unavailable(torch.device("cuda")) else 4]:
        multiplied.clear()
        monkeypatch.setenv("DLLM_LAYER_KERNELS", str(int(kernels)))
        found.append(decode(model, PROMPTS[:2], **settings).sequences)
        calls = [kernels is Kernels.EARLY] * len(multiplied)
        assert multiplied == calls
        assert bool(calls) == (kernels >= Kernels.PRODUCTS)
    assert all(torch.equal(one, found[0]) for one in found)


def test_a_mixture_of_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention by the kernel, all experts at once, and no kernel that knows no norm of queries and keys."""
    model = loaded(random_model(num_attention_heads=2, num_key_value_heads=2), torch.float32)
    settings: dict[str, Any] = {"policy": Threshold(0.5), "gen_length": 8, "block_length": 4}
    with monkeypatch.context() as patch:
        patch.setattr(graphs, "supported", lambda forward, options: False)
        want = decode(model, PROMPTS[:2], backend="cpu", **settings)
    kernels: list[Kernels] = []
    hidden_states = LLaDA.hidden_states

    def noted(self: LLaDA, *arguments: Any) -> Any:
        if isinstance(arguments[2], tuple):
            kernels.append(arguments[5])
        return hidden_states(self, *arguments)

    monkeypatch.setattr(LLaDA, "hidden_states", noted)
    monkeypatch.setattr(Mixture, "_one_by_one", Mixture._all)
    out = decode(model, PROMPTS[:2], backend="triton", **settings)
    assert kernels == [Kernels.NONE] * len(kernels) != []
    assert torch.equal(out.sequences, want.sequences)
    assert torch.equal(out.sequence_passes, want.sequence_passes)


def test_a_wish_for_layer_kernels_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ending_model(d_model=32, n_heads=2, n_kv_heads=2)
    monkeypatch.setattr(early, "unavailable", lambda device: "an H100 is needed")
    for value, message in (
        ("yes", "DLLM_LAYER_KERNELS: 'yes' given; 0, 1, 2, 3 allowed"),
        ("3", "DLLM_LAYER_KERNELS: 3 cannot be had here: an H100 is needed"),
    ):
        monkeypatch.setenv("DLLM_LAYER_KERNELS", value)
        with pytest.raises(ValueError, match=message):
            decode(model, PROMPTS[1:2], policy="topk", gen_length=4, block_length=4, backend="triton")

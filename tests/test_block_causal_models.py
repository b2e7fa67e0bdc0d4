"""LLaDA2 and SDAR: transformers' GLM-4-MoE, Qwen3 and Qwen3-MoE under a block-causal mask compute the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from block_causal import IDS, logits_of, published, reference, write
from block_causal import RAW_LLADA2 as LLADA2
from block_causal import RAW_SDAR as SDAR
from block_causal import RAW_SDAR_MOE as SDAR_MOE
from safetensors.torch import load_file
from torch import Tensor

from dllm_engine import LLaDA, LLaDAConfig, decode
from dllm_engine.layers import Router

LENGTH = 45  # of which LLaDA2 has two blocks


def rows(length: int = LENGTH) -> Tensor:
    return torch.randint(0, 60, (2, length), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("block-causal")
    raws = (SDAR, SDAR_MOE, LLADA2)
    return {raw["model_type"]: write(published(reference(raw), raw), place / raw["model_type"], raw) for raw in raws}


@pytest.mark.parametrize(
    ("raw", "changes"),
    [
        (SDAR, {}),
        (SDAR, {"tie_word_embeddings": True}),
        (SDAR, {"num_key_value_heads": 4, "head_dim": 8, "block_size": 16}),
        (SDAR, {"num_key_value_heads": 1, "head_dim": 6}),
        (SDAR_MOE, {}),
        (SDAR_MOE, {"norm_topk_prob": False}),
        (SDAR_MOE, {"num_experts_per_tok": 1, "tie_word_embeddings": True}),
        (LLADA2, {}),
        (LLADA2, {"num_experts_per_tok": 1}),
        (LLADA2, {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 8}),
        (LLADA2, {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "routed_scaling_factor": 1.0}),
        (LLADA2, {"first_k_dense_replace": 0, "num_shared_experts": 2, "partial_rotary_factor": 0.25}),
        (LLADA2, {"first_k_dense_replace": 3, "partial_rotary_factor": 1.0, "num_key_value_heads": 4}),
        (LLADA2, {"num_shared_experts": 0, "head_dim": 8, "tie_word_embeddings": True}),
    ],
    ids=lambda value: value.get("model_type") or ",".join(f"{key}={v}" for key, v in value.items()) or "as it is",
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_logits_are_those_of_transformers(tmp_path: Path, raw: dict[str, Any], changes: dict[str, Any]) -> None:
    raw = raw | changes
    other, ids = reference(raw), rows()
    model = LLaDA.from_pretrained(write(published(other, raw), tmp_path / "model", raw), device="cpu")
    expected = logits_of(other, ids, raw.get("block_size", 32))
    assert float(expected.std()) > 1
    assert torch.allclose(model(ids), expected, atol=2e-4)
    padded, mask = torch.cat((torch.full((2, 3), 1), ids), dim=1), torch.ones(2, LENGTH + 3)
    mask[:, :3] = 0
    found = model(padded, mask)
    assert found.isfinite().all()
    assert torch.allclose(found[:, 3:], expected, atol=2e-4)


@pytest.mark.parametrize("family", ["sdar", "llada2_moe"])
def test_a_row_sees_its_block_and_those_before(checkpoints: dict[str, Path], family: str) -> None:
    model = LLaDA.from_pretrained(checkpoints[family], device="cpu")
    size = model.config.block_size
    ids = rows(3 * size)[:1]
    before = model(ids)[0]
    for column in (size, 2 * size - 1):
        other = ids.clone()
        other[0, column] = (ids[0, column] + 1) % 60
        same = (model(other)[0] - before).abs().amax(-1) < 1e-6
        assert same.tolist() == [True] * size + [False] * 2 * size


def test_the_router_is_the_formula() -> None:
    config = LLaDAConfig.from_dict(LLADA2 | IDS | {"num_experts": 24, "num_experts_per_tok": 5, "topk_group": 3})
    assert config.routing is not None
    router, generator = Router(config, config.routing).requires_grad_(False), torch.Generator().manual_seed(5)
    router.weight.normal_(0, 0.4, generator=generator)
    router.expert_bias.normal_(-0.5, 0.5, generator=generator)  # some sums are below 0, which a masked 0 would beat
    given = torch.randn(60, 32, generator=generator)
    differ = 0
    for row, shares, experts in zip(given.double(), *router(given), strict=True):
        scores = 1 / (1 + torch.exp(-(router.weight.double() @ row)))
        likes = (scores + router.expert_bias.double()).tolist()
        groups = [range(at, at + 6) for at in range(0, 24, 6)]
        groups.sort(key=lambda group: -sum(sorted(likes[e] for e in group)[-2:]))
        allowed = [e for group in groups[:3] for e in group]
        chosen = sorted(allowed, key=lambda e: -likes[e])[:5]
        differ += set(chosen) != set(sorted(range(24), key=lambda e: -likes[e])[:5])
        assert experts.tolist() == chosen
        assert torch.allclose(shares.double(), 2.5 * scores[chosen] / scores[chosen].sum(), atol=1e-6)
    assert differ > 5  # or the groups would not have been tested


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_leaves_the_router_alone(checkpoints: dict[str, Path], dtype: str) -> None:
    checkpoint = checkpoints["llada2_moe"]
    stored, exact = load_file(checkpoint / "model.safetensors"), LLaDA.from_pretrained(checkpoint, device="cpu")
    model = LLaDA.from_pretrained(checkpoint, device="cpu", dtype=dtype)
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert kept == {f"blocks.{i}.experts.gate.{name}" for i in (1, 2) for name in ("weight", "expert_bias")}
    for name in ("weight", "expert_bias"):
        own = model.get_parameter(f"blocks.1.experts.gate.{name}")
        assert torch.equal(own, stored[f"model.layers.1.mlp.gate.{name}"])
    assert {p.dtype for name, p in model.named_parameters() if name not in kept} == {model.dtype}
    model.check_weights()
    found, expected = model(rows()).float(), exact(rows())
    assert model(rows()).dtype == model.dtype
    # here and there rounding sends a row to another expert
    assert ((found - expected).abs().amax(-1) < 0.3).float().mean() > 0.7
    model.blocks[1].k_proj.float()
    with pytest.raises(TypeError, match="layers need one dtype"):
        model.check_weights()


def test_a_model_that_was_cast_still_runs(checkpoints: dict[str, Path]) -> None:
    model = LLaDA.from_pretrained(checkpoints["llada2_moe"], device="cpu").bfloat16()
    model.check_weights()
    assert model(rows()).isfinite().all()


def test_a_mixture_without_sigmoids_has_one_dtype(checkpoints: dict[str, Path]) -> None:
    model = LLaDA.from_pretrained(checkpoints["sdar_moe"], device="cpu", dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_uninitialised_weights_lie_like_those_loaded(checkpoints: dict[str, Path]) -> None:
    loaded = LLaDA.from_pretrained(checkpoints["llada2_moe"], device="cpu", dtype="bfloat16")
    made = LLaDA.uninitialised(loaded.config, torch.device("cpu"), torch.bfloat16)
    facts = [[(name, p.shape, p.dtype) for name, p in model.named_parameters()] for model in (made, loaded)]
    assert facts[0] == facts[1]
    assert all(joined is not None for joined in made.joined_weights())


@pytest.mark.parametrize("family", ["sdar", "sdar_moe", "llada2_moe"])
def test_joined_weights_compute_the_same(checkpoints: dict[str, Path], family: str) -> None:
    model = LLaDA.from_pretrained(checkpoints[family], device="cpu")
    joined = model.joined_weights()
    dense = [one is not None and one.gate_up is not None for one in joined]
    assert dense == {"sdar": [True] * 2, "sdar_moe": [False] * 2, "llada2_moe": [True, False, False]}[family]
    assert all(one is not None and one.qkv.shape == (128, 32) for one in joined)
    rope = model.rope_tables(torch.arange(LENGTH)[None])
    one, other = (model.hidden_states(rows(), rope, joined=used) for used in (None, joined))
    assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("part", ["experts", "experts.gate"])
def test_hooks_in_a_mixture_are_run(checkpoints: dict[str, Path], part: str) -> None:
    model, seen = LLaDA.from_pretrained(checkpoints["llada2_moe"], device="cpu"), []
    assert not model.altered()
    model.blocks[1].get_submodule(part).register_forward_hook(lambda *_: seen.append(1))
    assert model.altered()
    assert model.joined_weights() == [None] * 3
    model(rows())
    assert seen


# -- a module of transformers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_a_loaded_module_is_shared(checkpoints: dict[str, Path], tmp_path: Path, tied: bool) -> None:
    raw = SDAR | {"tie_word_embeddings": tied}
    other = reference(raw)
    other.config.to_dict = lambda: dict(raw)  # what SDARConfig's says, whose tensors have these names too
    shared = LLaDA.from_transformers(other, vocab_size=61)
    assert shared.lm_head.data_ptr() == other.lm_head.weight.data_ptr()
    assert shared.blocks[1].q_norm.weight.data_ptr() == other.model.layers[1].self_attn.q_norm.weight.data_ptr()
    assert torch.allclose(shared(rows()), logits_of(other, rows(), 4), atol=2e-4)
    other.config.to_dict = lambda: {
        key: value for key, value in raw.items() if key not in ("mask_token_id", "eos_token_id")
    }
    with pytest.raises(ValueError, match="key 'mask_token_id' is missing"):
        LLaDA.from_transformers(other)
    other.config._name_or_path = str(checkpoints["sdar"])  # where it was loaded from
    found = LLaDA.from_transformers(other)
    assert (found.mask_id, found.end_ids, found.vocab_size) == (60, (3, 4), 61)
    first, second = (decode(other, [[3, 4]], gen_length=8).sequences for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("raw", [SDAR_MOE, LLADA2 | IDS], ids=lambda raw: raw["model_type"])
def test_a_module_that_is_a_mixture_is_refused(raw: dict[str, Any]) -> None:
    other = reference(raw)
    other.config.to_dict = lambda: dict(raw)
    with pytest.raises(ValueError, match=r"is a mixture of experts.*LLaDA\.from_pretrained"):
        LLaDA.from_transformers(other)

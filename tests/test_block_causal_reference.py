"""What the block-causal families are tested against, against models of transformers and answers told by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import block_causal
import numpy as np
import pytest
import torch
from block_causal import RAW_LLADA2, RAW_SDAR, Written
from torch import Tensor

SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
    "num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings",
)  # fmt: skip
LLADA2_ONLY = (
    "moe_intermediate_size", "num_experts_per_tok", "n_group", "topk_group", "first_k_dense_replace",
    "routed_scaling_factor", "norm_topk_prob", "use_qk_norm",
)  # fmt: skip
AS_GLM = {
    "model.word_embeddings.": "model.embed_tokens.", ".attention.": ".self_attn.", ".dense.": ".o_proj.",
    ".query_layernorm.": ".q_norm.", ".key_layernorm.": ".k_norm.", ".expert_bias": ".e_score_correction_bias",
}  # fmt: skip


def model_of(kind: str, raw: dict[str, Any], keys: tuple[str, ...], tensors: dict[str, Tensor], **more: Any) -> Any:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    if not hasattr(transformers, f"{kind}ForCausalLM"):
        pytest.skip(f"transformers without {kind}")
    config = getattr(transformers, f"{kind}Config")(
        **{key: raw[key] for key in keys}, attention_bias=False, attn_implementation="eager", **more
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval().requires_grad_(False)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert set(missing) == ({"lm_head.weight"} if raw["tie_word_embeddings"] else set())
    return model.double()


def as_glm(tensors: dict[str, Tensor], raw: dict[str, Any]) -> dict[str, Tensor]:
    """LLaDA2's layers are those of GLM-4.5: other names, queries, keys and values apart, an expert's halves stacked."""
    heads, kv_heads = (raw[f"num_{kind}_heads"] * raw["head_dim"] for kind in ("attention", "key_value"))
    made = {}
    for name, tensor in tensors.items():
        for ours, theirs in AS_GLM.items():
            name = name.replace(ours, theirs)
        if "query_key_value" in name:
            for part, rows in zip("qkv", tensor.split((heads, kv_heads, kv_heads)), strict=True):
                made[name.replace("query_key_value", f"{part}_proj")] = rows
        elif ".experts." not in name:
            made[name] = tensor
    for i in range(raw["first_k_dense_replace"], raw["num_hidden_layers"]):
        experts = f"model.layers.{i}.mlp.experts"
        gate, up, down = (
            torch.stack([tensors[f"{experts}.{e}.{part}_proj.weight"] for e in range(raw["num_experts"])])
            for part in ("gate", "up", "down")
        )
        made |= {f"{experts}.gate_up_proj": torch.cat((gate, up), 1), f"{experts}.down_proj": down}
    return made


def check(model: Any, tensors: dict[str, Tensor], raw: dict[str, Any], block_length: int, length: int) -> None:
    ids = torch.randint(0, raw["vocab_size"], (1, length), generator=torch.Generator().manual_seed(length))
    block = torch.arange(length) // block_length
    mask = torch.where(block <= block[:, None], 0.0, -torch.inf).double()[None, None]
    expected = model(ids, attention_mask=mask, use_cache=False).logits[0].numpy()
    np.testing.assert_allclose(Written(tensors, raw).logits(ids[0].tolist(), block_length), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("block_length", "length"), [(4, 19), (32, 40), (5, 5)])
@pytest.mark.parametrize("tied", [False, True])
def test_sdar_is_qwen3(block_length: int, length: int, tied: bool) -> None:
    raw = RAW_SDAR | {"tie_word_embeddings": tied}
    tensors = block_causal.tensors_of(raw, seed=length)
    rope = {"rope_type": "default", "rope_theta": float(raw["rope_theta"])}
    check(model_of("Qwen3", raw, SHARED, tensors, rope_parameters=rope), tensors, raw, block_length, length)


@pytest.mark.parametrize(("block_length", "length"), [(4, 19), (32, 40), (5, 5)])
@pytest.mark.parametrize("changes", [{}, {"num_experts": 16, "num_experts_per_tok": 5, "first_k_dense_replace": 2}])
def test_llada2_is_glm(block_length: int, length: int, changes: dict[str, Any]) -> None:
    raw = RAW_LLADA2 | changes
    tensors = block_causal.tensors_of(raw, seed=length)
    rope = {"rope_type": "default", "rope_theta": float(raw["rope_theta"]), "partial_rotary_factor": 0.5}
    model = model_of(
        "Glm4Moe", raw, SHARED + LLADA2_ONLY, as_glm(tensors, raw), rope_parameters=rope,
        n_routed_experts=raw["num_experts"], n_shared_experts=raw["num_shared_experts"], experts_implementation="eager",
    )  # fmt: skip
    check(model, tensors, raw, block_length, length)


class Told(Written):
    """Column c wants token ``wanted[c]``, the surer the higher ``sure[c]``; the mask and ids without text more."""

    def __init__(self, wanted: list[int], sure: list[float]) -> None:
        super().__init__({}, RAW_SDAR)
        self.wanted, self.sure = wanted, sure
        self.seen: list[list[int]] = []

    def logits(self, ids: Sequence[int], block_length: int) -> np.ndarray:
        self.seen.append([*ids])
        made = np.zeros((len(ids), 64))
        for row, token, sure in zip(made, self.wanted, self.sure, strict=False):
            row[[token, self.mask, 63]] = sure, sure + 0.5, sure + 1
        return made


def test_one_a_step_the_surest_first_and_the_lowest_of_equals() -> None:
    told = Told([9, 9, 10, 11, 12, 13, 14, 15], [9, 9, 2, 3, 1, 5, 5, 4])
    assert told.decode([7, 8], 5, 4, 2.0) == [10, 11, 12, 13, 14]
    m = 60
    assert told.seen == [
        [7, 8, m, m], [7, 8, m, 11],
        [7, 8, 10, 11, m, m, m, m], [7, 8, 10, 11, m, 13, m, m], [7, 8, 10, 11, m, 13, 14, m],
        [7, 8, 10, 11, m, 13, 14, 15],
    ]  # fmt: skip


def test_all_above_the_threshold_and_no_fewer_than_the_quota() -> None:
    wanted, sure = [10, 11, 12, 13], [1.0, 9.0, 2.0, 9.0]
    for threshold, quota, steps in [(0.1, 1, 3), (0.1, 3, 2), (0.01, 1, 1), (2.0, 2, 2), (2.0, 4, 1)]:
        told = Told(wanted, sure)
        assert told.decode([], 4, 4, threshold, quota) == wanted
        assert len(told.seen) == steps, (threshold, quota)


def test_an_end_fills_what_is_behind_it_and_waits_for_what_is_before_it() -> None:
    told = Told([9, 10, 3, 12, 13, 14, 15, 16], [0, 1, 5, 2, 6, 5, 4, 3])
    assert told.decode([3], 6, 4, 2.0, end_ids=(4, 3)) == [10, 3, 4, 4, 4, 4]
    assert told.seen == [[3, 60, 60, 60], [3, 60, 3]]


def test_the_first_of_two_ends_rules() -> None:
    told = Told([10, 4, 12, 3], [1, 2, 3, 4])
    assert told.decode([], 4, 4, 2.0, end_ids=(3, 4)) == [10, 4, 3, 3]
    assert told.seen == [[60] * 4, [60, 60, 60, 3], [60, 60, 12, 3], [60, 4]]

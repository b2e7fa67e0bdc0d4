"""LLaDA2 and SDAR: transformers' GLM-4-MoE, Qwen3 and Qwen3-MoE under a block-causal mask compute the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dllm_engine import LLaDA, LLaDAConfig, decode
from dllm_engine.config import Routing
from dllm_engine.layers import Router
from dllm_engine.tokenizer import load_tokenizer, read_facts

SDAR: dict[str, Any] = {
    "architectures": ["SDARForCausalLM"], "model_type": "sdar", "attention_bias": False, "block_size": 4,
    "debug": False, "ep_size": 1, "eos_token_id": 1, "fuse_cross_entropy": True, "head_dim": 16, "hidden_act": "silu",
    "hidden_size": 32, "intermediate_size": 48, "mask_token_id": 59, "max_position_embeddings": 128,
    "max_window_layers": 2, "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
    "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 64,
}  # fmt: skip
SDAR_MOE = SDAR | {
    "architectures": ["SDARMoeForCausalLM"], "model_type": "sdar_moe", "decoder_sparse_step": 1, "mlp_only_layers": [],
    "moe_intermediate_size": 24, "norm_topk_prob": True, "num_experts": 6, "num_experts_per_tok": 2,
}  # fmt: skip
LLADA2: dict[str, Any] = {
    "architectures": ["LLaDA2MoeModelLM"], "model_type": "llada2_moe", "first_k_dense_replace": 1, "head_dim": 16,
    "hidden_act": "silu", "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 128,
    "moe_intermediate_size": 24, "moe_router_enable_expert_bias": True, "n_group": 4, "norm_head": False,
    "norm_topk_prob": True, "num_attention_heads": 4, "num_experts": 8, "num_experts_per_tok": 3,
    "num_hidden_layers": 3, "num_key_value_heads": 2, "num_shared_experts": 1, "pad_token_id": 1,
    "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 600000, "rotary_dim": 8,
    "routed_scaling_factor": 2.5, "router_dtype": "fp32", "score_function": "sigmoid", "tie_word_embeddings": False,
    "topk_group": 2, "use_bias": False, "use_qk_norm": True, "use_qkv_bias": False, "use_sliding_window": False,
    "vocab_size": 64,
}  # fmt: skip
IDS = {"mask_token_id": 59, "eos_token_id": 1}  # which LLaDA2's config does not have
SPECIAL = {"sdar": {"<|im_end|>": 2, "<|MASK|>": 59}, "llada2_moe": {"<|role_end|>": 2, "<|mask|>": 59}}
LENGTH = 45  # of which LLaDA2 has two blocks


def reference(raw: dict[str, Any], seed: int = 3) -> Any:
    """Random, and peaked enough that rounding decides nothing."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    kind = {"sdar": "Qwen3", "sdar_moe": "Qwen3Moe", "llada2_moe": "Glm4Moe"}[raw["model_type"]]
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
        "rms_norm_eps max_position_embeddings tie_word_embeddings moe_intermediate_size num_experts "
        "num_experts_per_tok norm_topk_prob decoder_sparse_step mlp_only_layers n_group topk_group use_qk_norm "
        "routed_scaling_factor first_k_dense_replace"
    )
    settings = {name: raw[name] for name in names.split() if name in raw}
    rope = {"rope_type": "default", "rope_theta": float(raw["rope_theta"])}
    if kind == "Glm4Moe":
        settings |= {"n_routed_experts": settings.pop("num_experts"), "n_shared_experts": raw["num_shared_experts"]}
        settings |= {"num_mtp_layers": 0, "norm_topk_prob": raw["num_experts_per_tok"] > 1}
        rope["partial_rotary_factor"] = raw["partial_rotary_factor"]
    config = getattr(transformers, f"{kind}Config")(
        **settings, rope_parameters=rope, attention_bias=False, attn_implementation="eager"
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        scale, offset = (1.6 * max(tensor.shape[-1], 1) ** -0.5, 0.0) if tensor.ndim > 1 else (0.2, 1.0)
        tensor.normal_(0.0 if name.endswith("bias") else offset, scale, generator=generator)
    return model


def logits_of(model: Any, ids: Tensor, block_size: int) -> Tensor:
    block = torch.arange(ids.shape[1]) // block_size
    hidden = (block[None, :] > block[:, None])[None, None].expand(len(ids), 1, -1, -1)
    return model(ids, attention_mask=torch.zeros(hidden.shape).masked_fill(hidden, -1e30), use_cache=False).logits


def published(model: Any, raw: dict[str, Any]) -> dict[str, Tensor]:
    """A model's tensors under the names of checkpoints."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for e, both in enumerate(tensor):
                for part, half in zip(("gate_proj", "up_proj"), both.chunk(2), strict=True):
                    tensors[name.replace("gate_up_proj", f"{e}.{part}.weight")] = half
        elif name.endswith("experts.down_proj"):
            tensors |= {name.replace("down_proj", f"{e}.down_proj.weight"): one for e, one in enumerate(tensor)}
        else:
            tensors[name] = tensor
    if raw["tie_word_embeddings"]:
        del tensors["lm_head.weight"]
    if raw["model_type"] == "llada2_moe":
        tensors = {name: t for name, t in tensors.items() if t.numel()}  # no shared experts are some of size 0
        for i in range(raw["num_hidden_layers"]):
            attention = f"model.layers.{i}.self_attn"
            rows = [tensors.pop(f"{attention}.{part}_proj.weight") for part in "qkv"]
            tensors[f"{attention}.query_key_value.weight"] = torch.cat(rows)
        for old, new in {
            "embed_tokens": "word_embeddings", "self_attn.o_proj": "attention.dense", "self_attn": "attention",
            "q_norm": "query_layernorm", "k_norm": "key_layernorm", "e_score_correction_bias": "expert_bias",
        }.items():  # fmt: skip
            tensors = {name.replace(old, new): t for name, t in tensors.items()}
    return {name: t.clone() for name, t in tensors.items()}


def write(tensors: dict[str, Tensor], directory: Path, raw: dict[str, Any]) -> Path:
    from tokenizers import AddedToken, Tokenizer  # which `make gpu` does without
    from tokenizers.models import WordLevel

    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    special = {"<|endoftext|>": 1} | SPECIAL["sdar" if raw["model_type"] == "sdar_moe" else raw["model_type"]]
    words = {f"w{i}": i for i in range(61) if i not in special.values()}
    made = Tokenizer(WordLevel(words | special, unk_token="w0"))
    made.add_special_tokens([AddedToken(name, special=True) for name in special])
    made.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return directory


def rows(length: int = LENGTH) -> Tensor:
    return torch.randint(0, 60, (2, length), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("block-causal")
    raws = (SDAR, SDAR_MOE, LLADA2)
    return {raw["model_type"]: write(published(reference(raw), raw), place / raw["model_type"], raw) for raw in raws}


def changed(checkpoint: Path, place: Path, tensors: dict[str, Tensor | None] | None = None, **raw: Any) -> Path:
    """A copy with other tensors and keys; None: without it."""
    directory = Path(shutil.copytree(checkpoint, place, dirs_exist_ok=True))
    kept = load_file(directory / "model.safetensors") | (tensors or {})
    save_file({name: t for name, t in kept.items() if t is not None}, directory / "model.safetensors")
    settings = json.loads((directory / "config.json").read_text(encoding="utf-8")) | raw
    settings = {key: value for key, value in settings.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    return directory


# -- what is computed -----------------------------------------------------------------------------------------------


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


# -- what files say -------------------------------------------------------------------------------------------------


def test_published_sizes() -> None:
    """inclusionAI/LLaDA2.0-mini and JetLM/SDAR-1.7B-Chat."""
    mini = LLADA2 | {
        "hidden_size": 2048, "num_hidden_layers": 20, "num_attention_heads": 16, "num_key_value_heads": 4,
        "head_dim": 128, "intermediate_size": 5120, "moe_intermediate_size": 512, "num_experts": 256,
        "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "vocab_size": 157184, "rotary_dim": 64,
        "max_position_embeddings": 32768, "mask_token_id": 156895, "eos_token_id": 156892,
    }  # fmt: skip
    config = LLaDAConfig.from_dict(mini)
    assert (config.head_dim, config.rotary_dim, config.block_size) == (128, 64, 32)
    assert (config.mlp_hidden_size, config.shared_hidden_size) == (512, 512)
    assert (config.dense_layers, config.dense_hidden_size) == (1, 5120)
    assert config.routing == Routing(groups=8, kept=4, scale=2.5)
    assert (config.qk_norm, config.norm_topk_prob, config.shifted, config.include_qkv_bias) == (
        True,
        True,
        False,
        False,
    )
    sdar = SDAR | {
        "hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 6144, "vocab_size": 151936, "mask_token_id": 151669,
        "eos_token_id": 151643,
    }  # fmt: skip
    config = LLaDAConfig.from_dict(sdar)
    assert (config.head_dim, config.rotary_dim, config.block_size, config.qk_norm) == (128, 128, 4, True)
    assert (config.num_experts, config.dense_layers, config.routing, config.shifted) == (0, 0, None, False)


def without(raw: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if key not in keys}


def test_keys_that_may_be_missing() -> None:
    flags = [key for key, value in LLADA2.items() if isinstance(value, bool)]
    short = without(LLADA2, *flags, "score_function", "router_dtype", "rope_scaling", "rotary_dim", "pad_token_id")
    full = LLaDAConfig.from_dict(LLADA2 | IDS)
    assert LLaDAConfig.from_dict(short | IDS) == full
    assert LLaDAConfig.from_dict(without(LLADA2, "partial_rotary_factor", "routed_scaling_factor") | IDS) == full
    assert LLaDAConfig.from_dict(without(LLADA2, "num_shared_experts") | IDS).shared_hidden_size == 0
    assert LLaDAConfig.from_dict(without(SDAR, "block_size", "tie_word_embeddings")) == LLaDAConfig.from_dict(SDAR)
    assert LLaDAConfig.from_dict(without(SDAR, "head_dim")).head_dim == 8
    assert not LLaDAConfig.from_dict(without(SDAR_MOE, "norm_topk_prob")).norm_topk_prob
    no_dense = without(LLADA2, "intermediate_size") | IDS | {"first_k_dense_replace": 0}
    assert LLaDAConfig.from_dict(no_dense).dense_hidden_size == 0
    assert LLaDAConfig.from_dict(SDAR | {"block_size": 64}).block_size == 64


@pytest.mark.parametrize("raw", [SDAR, SDAR_MOE, LLADA2 | IDS], ids=lambda raw: raw["model_type"])
def test_a_config_as_transformers_5_writes_it(raw: dict[str, Any]) -> None:
    rope = {"rope_type": "default", "rope_theta": raw["rope_theta"]}
    if "partial_rotary_factor" in raw:
        raw, rope["partial_rotary_factor"] = raw | {"partial_rotary_factor": 0.25}, 0.25
    short = without(raw, "rope_theta", "rope_scaling", "partial_rotary_factor")
    assert LLaDAConfig.from_dict(short | {"rope_parameters": rope}) == LLaDAConfig.from_dict(raw)


@pytest.mark.parametrize(
    ("raw", "changes", "message"),
    [
        (LLADA2, {"norm_head": True}, "norm_head is True; supported: False or None"),
        (LLADA2, {"use_bias": True}, "use_bias is True; supported: False"),
        (LLADA2, {"use_qkv_bias": True}, "use_qkv_bias is True; supported: False"),
        (LLADA2, {"use_qk_norm": False}, "use_qk_norm is False; supported: True"),
        (LLADA2, {"use_rmsnorm": False}, "use_rmsnorm is False; supported: True"),
        (LLADA2, {"rope_scaling": {"type": "yarn", "factor": 4}}, "rope_scaling is {"),
        (LLADA2, {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters is {'rope_type': 'yarn'}; supported"),
        (LLADA2, {"score_function": "softmax"}, "score_function is 'softmax'; supported: 'sigmoid'"),
        (LLADA2, {"norm_topk_prob": False}, "norm_topk_prob is False; supported: True"),
        (LLADA2, {"use_sliding_window": True}, "use_sliding_window is True; supported: False"),
        (LLADA2, {"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: 'silu'"),
        (LLADA2, {"model_type": "llada2_moe_veomni"}, "'llada2_moe_veomni'; this engine runs .*'llada2_moe', 'sdar'"),
        (LLADA2, {"model_type": "Fast_dLLM_Qwen"}, "model_type is 'Fast_dLLM_Qwen'"),
        (LLADA2, {"n_group": 3}, "n_group is 3, topk_group 2; equal groups of at least 2 of num_experts, 8, are"),
        (LLADA2, {"n_group": 8, "topk_group": 4}, "n_group is 8, topk_group 4; equal groups of at least 2"),
        (LLADA2, {"n_group": 0}, "n_group is 0, topk_group 2"),
        (LLADA2, {"topk_group": 5}, "n_group is 4, topk_group 5"),
        (LLADA2, {"topk_group": 0}, "n_group is 4, topk_group 0"),
        (LLADA2, {"topk_group": 1}, "topk_group 1; .* and num_experts_per_tok, 3, in those kept"),
        (LLADA2, {"num_experts_per_tok": 9}, "num_experts_per_tok is 9; 1 to num_experts, 8, is needed"),
        (LLADA2, {"num_experts": None}, "key 'num_experts' is missing"),
        (LLADA2, {"moe_intermediate_size": None}, "key 'moe_intermediate_size' is missing"),
        (LLADA2, {"intermediate_size": None}, "key 'intermediate_size' is missing"),
        (LLADA2, {"partial_rotary_factor": 0.2}, "partial_rotary_factor is 0.2; up to 1 and, of head_dim, 16, an even"),
        (LLADA2, {"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5; up to 1"),
        (LLADA2, {"partial_rotary_factor": 0}, "partial_rotary_factor is 0.0; up to 1"),
        (LLADA2, {"partial_rotary_factor": "half"}, "partial_rotary_factor is 'half'; a number is needed"),
        (LLADA2, {"mask_token_id": None}, "key 'mask_token_id' is missing"),
        (SDAR, {"attention_bias": True}, "attention_bias is True; supported: False"),
        (SDAR, {"rope_scaling": {"type": "yarn", "factor": 4}}, "rope_scaling is {"),
        (SDAR, {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}, "supported: .* all rotated"),
        (SDAR, {"use_sliding_window": True}, "use_sliding_window is True"),
        (SDAR, {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (SDAR, {"block_size": 0}, "block_size is 0; it must be at least 1"),
        (SDAR, {"block_size": 2.5}, "block_size is 2.5; a whole number is needed"),
        (SDAR, {"head_dim": 15}, "head_dim is 15; it or d_model 32 over n_heads 4 must be a whole, even head size"),
        (SDAR, {"head_dim": None, "num_attention_heads": 6}, "head_dim is None; it or d_model 32 over n_heads 6 must"),
        (SDAR_MOE, {"decoder_sparse_step": 2}, "decoder_sparse_step is 2; supported: 1"),
        (SDAR_MOE, {"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\]; supported: \[\]"),
        (SDAR_MOE, {"num_experts": None}, "key 'num_experts' is missing"),
        (SDAR_MOE, {"norm_topk_prob": "yes"}, "norm_topk_prob is 'yes'; true or false is needed"),
    ],
    ids=lambda value: str(value)[:50] if "architectures" not in value else value["model_type"],
)  # fmt: skip
def test_what_is_not_computed_is_refused(raw: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLaDAConfig.from_dict(IDS | raw | changes)


@pytest.mark.parametrize("family", ["sdar", "sdar_moe", "llada2_moe"])
def test_what_the_tokenizer_alone_knows(checkpoints: dict[str, Path], tmp_path: Path, family: str) -> None:
    directory = changed(checkpoints[family], tmp_path, mask_token_id=None, eos_token_id=None)
    model = LLaDA.from_pretrained(directory, device="cpu")
    assert (model.mask_id, model.end_ids, model.fill_id, model.vocab_size) == (59, (1, 2), 1, 61)
    assert model.tokenizer("w5")["input_ids"] == [5]


def test_a_mask_that_is_named_beside_the_tokenizer_comes_first(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    directory = changed(checkpoints["sdar"], tmp_path, mask_token_id=None)
    (directory / "special_tokens_map.json").write_text('{"mask_token": {"content": "w40"}}', encoding="utf-8")
    assert read_facts(directory).mask_id == 40
    assert LLaDA.from_pretrained(directory, device="cpu").mask_id == 40


@pytest.mark.parametrize("fast", [False, True])
def test_sdars_own_tokenizer(tmp_path: Path, fast: bool) -> None:
    """Qwen2's class, with one special token more."""
    from tokenizers.pre_tokenizers import ByteLevel

    special = {"<|endoftext|>": 256, "<|im_end|>": 257, "<|MASK|>": 258}
    added = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    files: dict[str, Any] = {
        "vocab.json": {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))},
        "added_tokens.json": special,
        "special_tokens_map.json": {"eos_token": "<|im_end|>", "mask_token": {**added, "content": "<|MASK|>"}},
        "tokenizer_config.json": {
            "added_tokens_decoder": {str(i): {**added, "content": name} for name, i in special.items()},
            "eos_token": "<|im_end|>", "mask_token": "<|MASK|>", "pad_token": "<|endoftext|>",
            "tokenizer_class": "Qwen2Tokenizer", "unk_token": None,
        },
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    if fast:
        load_tokenizer(tmp_path).save_pretrained(tmp_path)
        assert (tmp_path / "tokenizer.json").exists()
    facts = read_facts(tmp_path)
    assert (facts.mask_id, facts.size, set(facts.end_ids)) == (258, 259, {257})
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer("It's 12 × 4.<|MASK|>")["input_ids"]
    assert ids[-1] == 258
    assert tokenizer.decode(ids) == "It's 12 × 4.<|MASK|>"


@pytest.mark.parametrize(
    ("family", "tensors", "message"),
    [
        ("sdar", {"model.layers.1.self_attn.k_norm.weight": None}, "1 tensors missing, the first is .*1.self_attn.k_n"),
        ("sdar", {"model.layers.1.self_attn.k_proj.bias": torch.ones(2)}, "no place for, the first: .*k_proj.bias"),
        ("sdar", {"model.layers.0.self_attn.q_proj.weight": torch.ones(32, 32)},
         r"q_proj.weight has shape \[32, 32\], config.json needs \[64, 32\]"),
        ("sdar", {"lm_head.weight": None}, r"tie_word_embeddings false, but lm_head.weight \(the LM head\) is not"),
        ("sdar_moe", {"model.layers.0.mlp.experts.5.up_proj.weight": None}, "the first is .*experts.5.up_proj.weight"),
        ("llada2_moe", {"model.layers.1.attention.query_key_value.weight": None},
         "1 tensors missing, the first is model.layers.1.attention.query_key_value.weight"),
        ("llada2_moe", {"model.layers.1.attention.query_key_value.weight": torch.ones(64, 32)},
         r"query_key_value.weight has shape \[64, 32\], config.json needs \[128, 32\]"),
        ("llada2_moe", {"model.layers.1.mlp.gate.expert_bias": None}, "the first is model.layers.1.mlp.gate.expert"),
        ("llada2_moe", {"model.layers.1.mlp.shared_experts.up_proj.weight": torch.ones(2, 2)},
         r"shared_experts.up_proj.weight has shape \[2, 2\], config.json needs \[24, 32\]"),
        ("llada2_moe", {"model.layers.0.mlp.up_proj.weight": torch.ones(2, 2)}, r"config.json needs \[48, 32\]"),
        ("llada2_moe", {"model.layers.0.attention.dense.bias": torch.ones(2)}, "no place for, .*attention.dense.bias"),
        ("llada2_moe", {"model.word_embeddings.weight": None}, "the first is model.word_embeddings.weight"),
    ],
)  # fmt: skip
def test_tensors_that_are_missing_or_differ_are_named(
    checkpoints: dict[str, Path], tmp_path: Path, family: str, tensors: dict[str, Tensor | None], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        LLaDA.from_pretrained(changed(checkpoints[family], tmp_path, tensors), device="cpu")


def test_tensors_beside_no_shared_experts_are_unknown(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no place for, the first: model.layers.1.mlp.shared_experts.down_proj"):
        LLaDA.from_pretrained(changed(checkpoints["llada2_moe"], tmp_path, num_shared_experts=0), device="cpu")


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
    other.config.to_dict = lambda: without(raw, "mask_token_id", "eos_token_id")
    with pytest.raises(ValueError, match="key 'mask_token_id' is missing"):
        LLaDA.from_transformers(other)
    other.config._name_or_path = str(checkpoints["sdar"])  # where it was loaded from
    found = LLaDA.from_transformers(other)
    assert (found.mask_id, found.end_ids, found.vocab_size) == (59, (1, 2), 61)
    first, second = (decode(other, [[3, 4]], gen_length=8).sequences for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("raw", [SDAR_MOE, LLADA2 | IDS], ids=lambda raw: raw["model_type"])
def test_a_module_that_is_a_mixture_is_refused(raw: dict[str, Any]) -> None:
    other = reference(raw)
    other.config.to_dict = lambda: dict(raw)
    with pytest.raises(ValueError, match=r"is a mixture of experts.*LLaDA\.from_pretrained"):
        LLaDA.from_transformers(other)

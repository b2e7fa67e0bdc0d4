"""The part of a checkpoint's ``config.json`` that the engine reads, checked before a weight is touched."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

# lladamoe: copies of LLaDA-MoE that tell it from LLaDA
MODEL_TYPES = "llada", "lladamoe", "Dream", "llada2_moe", "sdar", "sdar_moe", "Fast_dLLM_Qwen"


class _Layout(NamedTuple):
    """How a family writes its config. fixed: what `layers.Block` computes, by key; a checkpoint that asks for anything
    else is refused, as running it anyway would give fluent, wrong text. names: its keys, where they are not LLaDA's.
    instead: what its code takes for keys that are missing. always: what all its models have. mixture: of experts.
    """

    fixed: dict[str, tuple[Any, ...]]
    names: Mapping[str, str]
    instead: Mapping[str, Any] = MappingProxyType({})
    always: Mapping[str, Any] = MappingProxyType({})
    mixture: bool = False


_LLADA_FIXED: dict[str, tuple[Any, ...]] = {
    "activation_type": ("silu", "swiglu"),
    "alibi": (False,),
    "attention_layer_norm": (False,),
    "block_group_size": (1,),
    "block_type": ("llama",),
    "bias_for_layer_norm": (False, None),
    "clip_qkv": (None,),
    "include_bias": (False,),
    "input_emb_norm": (False,),
    "layer_norm_type": ("rms",),
    "rope": (True,),
    "rope_full_precision": (True,),
    "scale_logits": (False,),
}
# LLaDA-MoE's code takes a softmax over the experts and leaves the shares of the chosen ones as they are, whatever
# moe_router_score_function and norm_topk_prob say.
_MIXTURE_FIXED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "clip_qkv": (None,),
    "hidden_act": ("silu",),
    "moe_router_enable_expert_bias": (False, None),
    "partial_rotary_factor": (1, None),
    "rope_scaling": (None,),
    "routed_scaling_factor": (1, None),
    "shared_expert_intermediate_size": (None,),
    "tie_word_embeddings": (False,),
}
# Dream's code gives queries, keys and values a bias, whatever attention_bias says. Models that share its model_type and
# are block-causal, with logits that are not shifted, have another architecture and a block_size.
_DREAM_FIXED: dict[str, tuple[Any, ...]] = {
    "architectures": (["DreamModel"], None),
    "block_size": (None,),
    "hidden_act": ("silu",),
    "num_experts": (None, 0),
    "rope_scaling": (None,),
    "use_mrope": (False, None),
    "use_sliding_window": (False, None),
}
# LLaDA2's code does what the first two say without looking at them.
_LLADA2_FIXED: dict[str, tuple[Any, ...]] = {
    "norm_topk_prob": (True, None),
    "score_function": ("sigmoid", None),
    "use_qk_norm": (True, None),
    "hidden_act": ("silu",),
    "norm_head": (False, None),
    "rope_scaling": (None,),
    "use_bias": (False, None),
    "use_qkv_bias": (False, None),
    "use_rmsnorm": (True, None),
    "use_sliding_window": (False, None),
}
_SDAR_FIXED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "decoder_sparse_step": (1, None),
    "hidden_act": ("silu",),
    "mlp_only_layers": ([], None),
    "rope_scaling": (None,),
    "use_sliding_window": (False, None),
}
# Fast-dLLM v2's code, made from Qwen2's, gives queries, keys and values a bias, as Dream's does.
_FAST_DLLM_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "rope_scaling": (None,),
    "use_sliding_window": (False, None),
}
_NAMES = {
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "mlp_hidden_size": "intermediate_size",
    "max_sequence_length": "max_position_embeddings",
    "weight_tying": "tie_word_embeddings",
}
_LLADA = _Layout(_LLADA_FIXED, {})
_MIXTURE = _Layout(_MIXTURE_FIXED, _NAMES | {"mlp_hidden_size": "expert_intermediate_size"}, mixture=True)
_DREAM = _Layout(_DREAM_FIXED, _NAMES, {"tie_word_embeddings": False}, {"include_qkv_bias": True, "shifted": True})
# block_size is no key of LLaDA2's: its code's generate has it as block_length
_LLADA2 = _Layout(
    _LLADA2_FIXED,
    _NAMES
    | {"mlp_hidden_size": "moe_intermediate_size", "dense_hidden_size": "intermediate_size"}
    | {"dense_layers": "first_k_dense_replace"},
    {"block_size": 32, "first_k_dense_replace": 0, "n_group": 8, "num_shared_experts": 0, "partial_rotary_factor": 0.5}
    | {"routed_scaling_factor": 2.5, "tie_word_embeddings": False, "topk_group": 4},
    {"qk_norm": True},
    mixture=True,
)
_SDAR = _Layout(_SDAR_FIXED, _NAMES, {"block_size": 4, "tie_word_embeddings": False}, {"qk_norm": True})
_SDAR_MOE = _SDAR._replace(
    names=_NAMES | {"mlp_hidden_size": "moe_intermediate_size"},
    instead={**_SDAR.instead, "norm_topk_prob": False},
    mixture=True,
)
_FAST_DLLM = _Layout(
    _FAST_DLLM_FIXED, _NAMES | {"block_size": "bd_size"}, {"bd_size": 32, **_DREAM.instead}, _DREAM.always
)
_LAYOUTS = {"Dream": _DREAM, "llada2_moe": _LLADA2, "sdar": _SDAR, "sdar_moe": _SDAR_MOE, "Fast_dLLM_Qwen": _FAST_DLLM}


class Routing(NamedTuple):
    """LLaDA2's way to a row's experts; see `layers.Router`. groups: of experts, one behind the other; kept: how many of
    them for a row; scale: what shares are multiplied by.
    """

    groups: int
    kept: int
    scale: float


class ModelFacts(Protocol):
    """What rules and filters may know of a `LLaDA`."""

    path: Path | None
    vocab_size: int
    end_ids: tuple[int, ...]

    @property
    def mask_id(self) -> int: ...

    @property
    def tokenizer(self) -> Any: ...


@dataclass(frozen=True)
class LLaDAConfig:
    """Sizes, ids and constants of a model: LLaDA-8B, LLaDA-1.5, iLLaDA, LLaDA-MoE, Dream-7B and its kin, LLaDA2, SDAR,
    Fast-dLLM v2.

    Attributes:
        mlp_hidden_size: of a layer's MLP, or of each expert.
        embedding_size: rows of the embedding and of the LM head; at least ``vocab_size``.
        eos_token_ids: end ids named by the config. `LLaDA.end_ids` adds the tokenizer's and generation config's.
        num_experts, num_experts_per_tok: of each layer, and how many of them a row is sent to; 0 without a mixture.
        norm_topk_prob: whether the shares of a row's experts are divided by their sum.
        routing: how a row finds them; None: by a softmax over all.
        shared_hidden_size: of the MLP beside the experts that all rows go through; 0 without one.
        dense_layers, dense_hidden_size: how many of the first layers have an MLP and no experts, and its size.
        head_dim: 0 becomes ``d_model // n_heads``, where that is whole.
        partial_rotary_factor: the part of each head, its first elements, that RoPE turns.
        qk_norm: whether each head's query and key are normed before RoPE.
        shifted: whether a row predicts the column behind it (Dream, arXiv 2508.15487, as the autoregressive model that
            it was made from) and not its own.
        block_size: columns of a block in block-causal attention: a row sees its own block and those before it. 0: rows
            see all columns.
    """

    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    mlp_hidden_size: int
    vocab_size: int
    embedding_size: int
    max_sequence_length: int
    mask_token_id: int
    eos_token_ids: tuple[int, ...]
    rms_norm_eps: float
    rope_theta: float
    weight_tying: bool
    include_qkv_bias: bool = False
    num_experts: int = 0
    num_experts_per_tok: int = 0
    qk_norm: bool = False
    shifted: bool = False
    block_size: int = 0
    head_dim: int = 0
    partial_rotary_factor: float = 1.0
    dense_layers: int = 0
    dense_hidden_size: int = 0
    shared_hidden_size: int = 0
    norm_topk_prob: bool = False
    routing: Routing | None = None

    def __post_init__(self) -> None:
        if not self.head_dim and self.n_heads and self.d_model % self.n_heads == 0:
            object.__setattr__(self, "head_dim", self.d_model // self.n_heads)

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def opens_blocks(self) -> bool:
        """Whether it is block-causal with rows that predict the column behind theirs (Fast-dLLM v2, arXiv 2509.26328):
        the row before a block then decides its first column, and blocks are decoded in parts.
        """
        return self.block_size > 0 and self.shifted

    @property
    def block_length(self) -> int:
        """What a block-causal model is decoded with where nothing is said: its own blocks, or parts of them, as long as
        the code of Fast-dLLM v2 has them.
        """
        return math.gcd(self.block_size, 8) if self.opens_blocks else self.block_size

    @property
    def fill_id(self) -> int:
        """The id that positions after the end of text hold."""
        return self.eos_token_ids[0]

    @classmethod
    def from_dict(cls, raw: dict[str, Any], source: str = "config.json") -> LLaDAConfig:
        """Read the original (OLMo-style) keys of a LLaDA ``config.json``, or those of another family.

        Raises:
            ValueError: another architecture, a missing key, or a setting that this transformer does not compute.
        """
        if raw.get("model_type") not in MODEL_TYPES:
            raise ValueError(
                f"{source}: model_type is {raw.get('model_type')!r}; this engine runs"
                f" {', '.join(map(repr, MODEL_TYPES))}"
            )
        layout = _LAYOUTS.get(raw["model_type"], _MIXTURE if raw.get("num_experts") else _LLADA)
        for key, allowed in layout.fixed.items():
            if key in raw and raw[key] not in allowed:
                raise ValueError(f"{source}: {key} is {raw[key]!r}; supported: {' or '.join(map(repr, allowed))}")
        rope = raw.get("rope_parameters")  # where transformers 5 writes them
        if layout.names and isinstance(rope, dict):
            partial = layout is _LLADA2 or rope.get("partial_rotary_factor", 1) == 1
            if rope.get("rope_type", "default") != "default" or not partial:
                raise ValueError(f"{source}: rope_parameters is {rope!r}; supported: rope_type 'default', all rotated")
            raw = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope} | raw
        raw = raw | {key: value for key, value in layout.instead.items() if raw.get(key) is None}

        def name(key: str) -> str:
            return layout.names.get(key, key)

        def need(key: str) -> Any:
            if raw.get(name(key)) is None:
                hint = " (without it no position can be masked)" if key == "mask_token_id" else ""
                raise ValueError(f"{source}: key {name(key)!r} is missing{hint}")
            return raw[name(key)]

        def count(key: str, instead: int | None = None) -> int:
            if instead is not None and not raw.get(name(key)):
                return instead
            return _whole(need(key), name(key), source)

        def real(key: str) -> float:
            value = need(key)
            if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
                raise ValueError(f"{source}: {key} is {value!r}; a finite number is needed")
            return float(value)

        def flag(key: str, value: Any) -> bool:
            if not isinstance(value, bool):
                raise ValueError(f"{source}: {name(key)} is {value!r}; true or false is needed")
            return value

        d_model, n_heads, n_layers = count("d_model"), count("n_heads"), count("n_layers")
        more = dict(layout.always)
        if layout.mixture:
            more |= {key: count(key) for key in ("num_experts", "num_experts_per_tok")}
        if layout is _LLADA:
            more["include_qkv_bias"] = flag("include_qkv_bias", raw.get("include_qkv_bias") or False)
        if layout is _MIXTURE:
            if need("moe_layer_freq") != [1] * n_layers:
                raise ValueError(f"{source}: moe_layer_freq is {raw['moe_layer_freq']!r}; supported: 1 for each layer")
            more["qk_norm"] = flag("qk_layernorm", raw.get("qk_layernorm") or False)
        if layout is _FAST_DLLM and raw.get("layer_types") not in (None, ["full_attention"] * n_layers):
            raise ValueError(f"{source}: layer_types is {raw['layer_types']!r}; supported: 'full_attention' for each")
        if layout is _SDAR_MOE:
            more["norm_topk_prob"] = flag("norm_topk_prob", need("norm_topk_prob"))
        if layout is _LLADA2:
            more["dense_layers"] = count("dense_layers")
            more["dense_hidden_size"] = count("dense_hidden_size") if more["dense_layers"] else 0
            more["shared_hidden_size"] = count("num_shared_experts") * count("mlp_hidden_size")
            more["partial_rotary_factor"] = real("partial_rotary_factor")
            more["routing"] = Routing(count("n_group"), count("topk_group"), real("routed_scaling_factor"))
            more["norm_topk_prob"] = more["num_experts_per_tok"] > 1
        if name("block_size") in layout.instead:
            more |= {"block_size": count("block_size"), "head_dim": count("head_dim", 0)}
            if more["block_size"] < 1:
                raise ValueError(f"{source}: {name('block_size')} is {more['block_size']}; it must be at least 1")
        vocab_size = count("vocab_size")
        config = cls(
            d_model=d_model,
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=count("n_kv_heads", 1 if raw.get("multi_query_attention") else n_heads),
            mlp_hidden_size=count("mlp_hidden_size")
            if layout.names or raw.get("mlp_hidden_size")
            else int(real("mlp_ratio") * d_model),
            vocab_size=vocab_size,
            embedding_size=count("embedding_size", vocab_size),
            max_sequence_length=count("max_sequence_length"),
            mask_token_id=count("mask_token_id"),
            eos_token_ids=id_list(need("eos_token_id"), "eos_token_id", source),
            rms_norm_eps=real("rms_norm_eps"),
            rope_theta=real("rope_theta"),
            weight_tying=flag("weight_tying", need("weight_tying")),
            **more,
        )
        config._check(source)
        return config

    def _check(self, source: str) -> None:
        sizes = "d_model n_layers n_heads n_kv_heads mlp_hidden_size vocab_size max_sequence_length"
        for name in sizes.split():
            if getattr(self, name) < 1:
                raise ValueError(f"{source}: {name} is {getattr(self, name)}; it must be at least 1")
        if not self.rope_theta > 0 or not self.rms_norm_eps >= 0:
            raise ValueError(
                f"{source}: rope_theta is {self.rope_theta}, rms_norm_eps {self.rms_norm_eps};"
                " above 0 and at least 0 are needed"
            )
        if self.head_dim < 1 or self.head_dim % 2:
            raise ValueError(
                f"{source}: head_dim is {self.head_dim or None}; it or d_model {self.d_model} over n_heads"
                f" {self.n_heads} must be a whole, even head size"
            )
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise ValueError(
                f"{source}: partial_rotary_factor is {self.partial_rotary_factor}; up to 1 and, of head_dim,"
                f" {self.head_dim}, an even part is needed"
            )
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"{source}: n_heads {self.n_heads} is no multiple of n_kv_heads {self.n_kv_heads}")
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"{source}: num_experts_per_tok is {self.num_experts_per_tok}; 1 to num_experts, {self.num_experts},"
                " is needed"
            )
        if self.routing is not None:
            (groups, kept, _), size = self.routing, self.num_experts // max(self.routing.groups, 1)
            fits = size >= 2 and size * groups == self.num_experts and self.num_experts_per_tok <= size * kept
            if not fits or not 1 <= kept <= groups:
                raise ValueError(
                    f"{source}: n_group is {groups}, topk_group {kept}; equal groups of at least 2 of num_experts,"
                    f" {self.num_experts}, are needed, and num_experts_per_tok, {self.num_experts_per_tok}, in those"
                    " kept"
                )
        if self.embedding_size < self.vocab_size:
            raise ValueError(f"{source}: embedding_size {self.embedding_size} < vocab_size {self.vocab_size}")
        if not self.eos_token_ids:
            raise ValueError(f"{source}: eos_token_id is empty; at least one end id is needed")
        for name, ids in (("mask_token_id", (self.mask_token_id,)), ("eos_token_id", self.eos_token_ids)):
            for i in ids:
                if not 0 <= i < self.embedding_size:
                    raise ValueError(f"{source}: {name} {i} is outside the {self.embedding_size} embedding rows")
        if self.mask_token_id in self.eos_token_ids:
            raise ValueError(f"{source}: mask_token_id {self.mask_token_id} is also an eos_token_id")


def _whole(value: Any, key: str, source: str) -> int:
    """JSON has one kind of number: 32.0 is 32."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        raise ValueError(f"{source}: {key} is {value!r}; a whole number is needed")
    return int(value)


def id_list(value: Any, key: str, source: str) -> tuple[int, ...]:
    """The ids under a key that may hold one or a list of them.

    Raises:
        ValueError: something else.
    """
    return tuple(_whole(i, key, source) for i in (value if isinstance(value, list | tuple) else [value]))


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file of a checkpoint (or beside it).

    Raises:
        FileNotFoundError: it is missing. ValueError: it is no JSON object; names the file.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} is missing; a Hugging Face checkpoint directory is needed") from None
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds a {type(value).__name__}; a JSON object is needed")
    return value

"""The part of a checkpoint's ``config.json`` that the engine reads, checked before a weight is touched."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

MODEL_TYPES = "llada", "lladamoe", "Dream"  # the second: copies of LLaDA-MoE that tell it from LLaDA


class _Layout(NamedTuple):
    """How a family writes its config. fixed: what `layers.Block` computes, by key; a checkpoint that asks for anything
    else is refused, as running it anyway would give fluent, wrong text. names: its keys, where they are not LLaDA's.
    """

    fixed: dict[str, tuple[Any, ...]]
    names: dict[str, str]


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
_MIXTURE = _Layout(_MIXTURE_FIXED, _NAMES | {"mlp_hidden_size": "expert_intermediate_size"})
_DREAM = _Layout(_DREAM_FIXED, _NAMES)


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
    """Sizes, ids and constants of a model: LLaDA-8B, LLaDA-1.5, iLLaDA, LLaDA-MoE, Dream-7B and its kin.

    Attributes:
        mlp_hidden_size: of a layer's MLP, or of each expert.
        embedding_size: rows of the embedding and of the LM head; at least ``vocab_size``.
        eos_token_ids: end ids named by the config. `LLaDA.end_ids` adds the tokenizer's and generation config's.
        num_experts, num_experts_per_tok: of each layer, and how many of them a row is sent to; 0 without a mixture.
        qk_norm: whether each head's query and key are normed before RoPE.
        shifted: whether a row predicts the column behind it (Dream, arXiv 2508.15487, as the autoregressive model that
            it was made from) and not its own.
        block_size: columns of a block in block-causal attention: a row sees its own block and those before it. 0: rows see
            all columns.
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

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def fill_id(self) -> int:
        """The id that positions after the end of text hold."""
        return self.eos_token_ids[0]

    @classmethod
    def from_dict(cls, raw: dict[str, Any], source: str = "config.json") -> LLaDAConfig:
        """Read the original (OLMo-style) keys of a LLaDA ``config.json``, or those of a LLaDA-MoE or a Dream.

        Raises:
            ValueError: another architecture, a missing key, or a setting that this transformer does not compute.
        """
        if raw.get("model_type") not in MODEL_TYPES:
            raise ValueError(
                f"{source}: model_type is {raw.get('model_type')!r}; this engine runs 'llada' and 'Dream' checkpoints"
            )
        dream = raw["model_type"] == "Dream"
        layout = _DREAM if dream else _MIXTURE if raw.get("num_experts") else _LLADA
        mixture = layout is _MIXTURE
        for key, allowed in layout.fixed.items():
            if key in raw and raw[key] not in allowed:
                raise ValueError(f"{source}: {key} is {raw[key]!r}; supported: {' or '.join(map(repr, allowed))}")
        rope = raw.get("rope_parameters")  # where transformers 5 writes them
        if layout.names and isinstance(rope, dict):
            if rope.get("rope_type", "default") != "default" or rope.get("partial_rotary_factor", 1) != 1:
                raise ValueError(f"{source}: rope_parameters is {rope!r}; supported: rope_type 'default', all rotated")
            raw = {"rope_theta": rope.get("rope_theta")} | raw
        if dream:  # what its code takes for it
            raw = {"tie_word_embeddings": False} | raw

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
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise ValueError(f"{source}: {key} is {value!r}; a number is needed")
            return float(value)

        def flag(key: str, value: Any) -> bool:
            if not isinstance(value, bool):
                raise ValueError(f"{source}: {name(key)} is {value!r}; true or false is needed")
            return value

        d_model, n_heads, n_layers = count("d_model"), count("n_heads"), count("n_layers")
        if mixture and need("moe_layer_freq") != [1] * n_layers:
            raise ValueError(f"{source}: moe_layer_freq is {raw['moe_layer_freq']!r}; supported: 1 for each layer")
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
            include_qkv_bias=dream or flag("include_qkv_bias", raw.get("include_qkv_bias") or False),
            num_experts=count("num_experts") if mixture else 0,
            num_experts_per_tok=count("num_experts_per_tok") if mixture else 0,
            qk_norm=mixture and flag("qk_layernorm", raw.get("qk_layernorm") or False),
            shifted=dream,
        )
        config._check(source)
        return config

    def _check(self, source: str) -> None:
        for name in ("d_model", "n_layers", "n_heads", "n_kv_heads", "mlp_hidden_size", "max_sequence_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{source}: {name} is {getattr(self, name)}; it must be at least 1")
        if not self.rope_theta > 0 or not self.rms_norm_eps >= 0:
            raise ValueError(
                f"{source}: rope_theta is {self.rope_theta}, rms_norm_eps {self.rms_norm_eps};"
                " above 0 and at least 0 are needed"
            )
        if self.d_model % self.n_heads or self.head_dim % 2:
            raise ValueError(
                f"{source}: d_model {self.d_model} over n_heads {self.n_heads} must be a whole, even head size"
            )
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"{source}: n_heads {self.n_heads} is no multiple of n_kv_heads {self.n_kv_heads}")
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"{source}: num_experts_per_tok is {self.num_experts_per_tok}; 1 to num_experts, {self.num_experts},"
                " is needed"
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

"""The model: layers, what its checkpoint says beside the weights, and ways to load one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dllm_engine import generation_config, weights
from dllm_engine.config import MODEL_TYPES, LLaDAConfig, id_list, read_json
from dllm_engine.layers import Block, Embedding, Joined, Kernels, Linear, RMSNorm, Router, plain
from dllm_engine.tokenizer import TokenizerFacts, load_tokenizer, read_facts

if TYPE_CHECKING:
    from dllm_engine.kv_cache import LayerCache


def _complete(raw: dict[str, Any], directory: Path) -> TokenizerFacts | None:
    """Give a config the ids that it lacks and the tokenizer knows (of LLaDA-MoE, LLaDA2 and Fast-dLLM v2 it alone knows
    the mask).

    Returns:
        The tokenizer's facts, where it was asked.
    """
    missing = [key for key in ("mask_token_id", "eos_token_id") if raw.get(key) is None]
    if not missing or raw.get("model_type") not in MODEL_TYPES:
        return None
    facts = read_facts(directory)
    known = {"mask_token_id": facts.mask_id, "eos_token_id": list(facts.end_ids) or None}
    raw |= {key: known[key] for key in missing}
    return facts


class LLaDA(nn.Module):
    """A masked diffusion language model: LLaDA and its family, Dream (`LLaDAConfig.shifted`), or a block-causal one:
    LLaDA2 and SDAR (`LLaDAConfig.block_size`), or both: Fast-dLLM v2.

    Attributes:
        config: sizes and ids from ``config.json``.
        vocab_size: ids that may be written; rows of the head beyond it are padding.
        mask_id, end_ids, fill_id: the mask token, every end-of-text token, the one that fills after the end.
        path: the checkpoint directory, or None for a model built in memory.
        generation_defaults: what ``generation_config.json`` there says about arguments of `decode`.
    """

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = Embedding(config.embedding_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.ln_f = RMSNorm(config.d_model, config.rms_norm_eps)
        if not config.weight_tying:
            self.ff_out = Linear(config.d_model, config.embedding_size, bias=False)
        self.path: Path | None = None
        self.generation_defaults: dict[str, Any] = {}
        self.vocab_size = config.vocab_size
        self.end_ids = config.eos_token_ids
        self._tokenizer: Any = None
        self._rope: tuple[Tensor, Tensor] | None = None
        self._rope_for: Any = None

    # -- construction -------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
    ) -> LLaDA:
        """Load a Hugging Face checkpoint: a directory, or a hub id when ``huggingface_hub`` can reach the hub.

        Args:
            path: directory with ``config.json`` and ``model.safetensors`` (or shards with an index), or a hub id.
            device: where the weights go; a GPU if there is one, else the CPU.
            dtype: ``"float32"``, ``"bfloat16"``, ``"float16"`` or the torch dtype; by default that of the checkpoint's
                embedding.

        Raises:
            FileNotFoundError: no such directory, or a file is missing in it.
            ValueError: an unsupported or incomplete config, or weights that do not fit it.
        """
        target, target_dtype = weights.device_of(device), weights.dtype_of(dtype)
        directory = weights.find(path)
        raw = read_json(directory / "config.json")
        facts = _complete(raw, directory)
        config = LLaDAConfig.from_dict(raw, str(directory / "config.json"))
        model = cls._empty(config)
        model._describe(directory, facts)
        weights.load_(model, config, directory, device=target, dtype=target_dtype)
        return model

    @classmethod
    def from_transformers(cls, module: nn.Module, vocab_size: int | None = None) -> LLaDA:
        """Wrap a loaded transformers ``LLaDAModelLM``, ``DreamModel``, ``SDARForCausalLM`` or
        ``Fast_dLLM_QwenForCausalLM``, whose tensors are shared, not copied.

        Only the module's ``config``, the names of its tensors and the JSON files that it was loaded with are read.
        ``vocab_size`` is ``len(tokenizer)``, by default that of a tokenizer among those files; without one every row of
        the head up to the config's ``vocab_size`` may be written.

        Raises:
            TypeError: not a module, or tensors of other dtypes than the engine computes in.
            ValueError: another model, a mixture of experts, tensors that are not all on one device, or a ``vocab_size``
                beyond the embedding.
        """
        if not isinstance(module, nn.Module):
            raise TypeError(f"model: {type(module).__name__} given; a LLaDA or transformers' module of one is needed")
        raw, given = getattr(module, "config", None), type(module).__name__
        if raw is None or not hasattr(raw, "to_dict"):
            raise ValueError(
                f"model: {given} has no transformers config; a LLaDAModelLM, DreamModel, SDARForCausalLM or"
                " Fast_dLLM_QwenForCausalLM is needed"
            )
        settings = raw.to_dict()
        if settings.get("num_experts"):
            raise ValueError(
                f"model: {given} is a mixture of experts, whose tensors lie one by one and cannot be shared; load its"
                " directory with LLaDA.from_pretrained"
            )
        directory = weights.loaded_from(raw)
        facts = None if directory is None else _complete(settings, directory)
        config = LLaDAConfig.from_dict(settings, f"{given}.config")
        model = cls._empty(config)
        weights.share_(model, config, module)
        model.check_weights()
        if directory is not None:
            model._describe(directory, facts)
        if vocab_size is not None:
            if not 0 < vocab_size <= config.embedding_size:
                raise ValueError(
                    f"vocab_size: {vocab_size} given; 1 to {config.embedding_size} (embedding rows) allowed"
                )
            model.vocab_size = vocab_size
        return model

    @classmethod
    def uninitialised(cls, config: LLaDAConfig, device: torch.device, dtype: torch.dtype) -> LLaDA:
        """A model whose weights lie as those of a checkpoint do, and are anything."""
        model = cls._empty(config)
        weights.allocate_(model, device, dtype)
        return model

    @classmethod
    def _empty(cls, config: LLaDAConfig) -> LLaDA:
        with torch.device("meta"):
            return cls(config)

    def _describe(self, directory: Path, facts: TokenizerFacts | None = None) -> None:
        """Vocabulary, end ids (config first, then what generation config and tokenizer add), defaults of `decode`."""
        self.path, rows = directory, self.config.embedding_size
        end_ids = list(self.config.eos_token_ids)
        generation = directory / generation_config.FILE
        if generation.exists():
            raw = read_json(generation)
            if raw.get("eos_token_id") is not None:
                end_ids += id_list(raw["eos_token_id"], "eos_token_id", str(generation))
            self.generation_defaults = generation_config.defaults(raw, str(generation))
        facts = facts or read_facts(directory)
        self._tokenizer = facts.loaded
        if facts.expands and self.config.shifted:
            raise ValueError(f"{directory}: a DreamOn, whose <|expand|> lengthens the canvas, which is not supported")
        end_ids += facts.end_ids
        for i in end_ids:
            if not 0 <= i < rows:
                raise ValueError(f"{directory}: end id {i} (generation config or tokenizer) is outside the {rows} rows")
            if i == self.mask_id:
                raise ValueError(f"{directory}: end id {i} (generation config or tokenizer) is the mask id")
        self.end_ids = tuple(dict.fromkeys(end_ids))
        if facts.size is not None:
            if facts.size > rows:
                raise ValueError(f"{directory}: the tokenizer has {facts.size} tokens, the embedding {rows} rows")
            self.vocab_size = facts.size

    # -- what the engine reads ----------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.wte.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.wte.weight.dtype

    @property
    def mask_id(self) -> int:
        return self.config.mask_token_id

    @property
    def fill_id(self) -> int:
        return self.config.fill_id

    @property
    def lm_head(self) -> Tensor:
        """Head weight [V, D]; the embedding itself where they are tied.

        Raises:
            ValueError: the head has been replaced or hooked, which those who multiply by its weight would not see.
        """
        if self.config.weight_tying:
            return self.wte.weight
        if not plain(self.ff_out):
            raise ValueError(
                f"model: its LM head, ff_out, is a {type(self.ff_out).__name__} or has hooks; the head is multiplied "
                "as it is, so merge an adapter and remove hooks"
            )
        return self.ff_out.weight

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer beside the weights (loaded on first use, from local files only).

        Raises:
            FileNotFoundError: the model has no directory, or there is no tokenizer in it.
        """
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.path)
        return self._tokenizer

    # -- computation --------------------------------------------------------------------------------------------

    def rope_tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [B, 1, S, R] in float32 for positions [B, S]; R is `LLaDAConfig.rotary_dim`."""
        config = self.config
        made_for = positions.device, config.rotary_dim, config.rope_theta, config.max_sequence_length
        if self._rope is None or self._rope_for != made_for:
            exponent = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32, device=positions.device)
            inverse = 1.0 / (config.rope_theta ** (exponent / config.rotary_dim))
            steps = torch.arange(config.max_sequence_length, dtype=torch.float32, device=positions.device)
            angle = torch.outer(steps, inverse).repeat(1, 2)
            self._rope, self._rope_for = (angle.cos(), angle.sin()), made_for
        cos, sin = self._rope
        return cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)

    def altered(self) -> bool:
        """Whether a module has been replaced (by an adapter) or hooked, so that it must be called as it is."""
        everywhere = nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks
        return bool(everywhere) or not all(map(plain, (self.wte, self.ln_f, *self.blocks.modules())))

    def check_weights(self) -> None:
        """Weights that no call could multiply raise TypeError (dtypes) or ValueError (devices). An adapter's own may be
        of other dtypes, as a `Router`'s are.
        """
        own = [p for module in self.modules() for p in module._parameters.values() if p is not None]
        devices, head = {p.device for p in own}, self.lm_head
        if len(devices) > 1 or self.device.type == "meta":
            raise ValueError(f"model: weights on {', '.join(sorted(map(str, devices)))}; all on one device are needed")
        if strange := {self.dtype, head.dtype} - {torch.float32, torch.bfloat16, torch.float16}:
            raise TypeError(f"model: weights of {strange.pop()} given; float32, bfloat16 or float16 is needed")
        others = (module for module in self.modules() if not isinstance(module, Router))
        dtypes = {p.dtype for module in others for p in module._parameters.values() if p is not None and p is not head}
        if len(dtypes) > 1 and not self.altered():
            raise TypeError(f"model: weights of {', '.join(sorted(map(str, dtypes)))} given; layers need one dtype")

    def joined_weights(self) -> list[Joined | None]:
        """`Block.joined` of every layer; None for each if the model is `altered`."""
        if self.altered():
            return [None] * len(self.blocks)
        return [block.joined() for block in self.blocks]  # type: ignore[operator]

    def hidden_states(
        self,
        tokens: Tensor,
        rope: tuple[Tensor, Tensor],
        seen: Tensor | tuple[Tensor, Tensor] | None = None,
        caches: list[LayerCache] | None = None,
        joined: list[Joined | None] | None = None,
        kernels: Kernels = Kernels.NONE,
    ) -> Tensor:
        """Final, normed hidden states of the given rows.

        Args:
            tokens: LongTensor [B, S].
            rope: `rope_tables` of their positions, counted from each sequence's first real token.
            seen: which keys: None, all; [B, 1, 1 or S, K], bool, or 0 and −inf in the model's dtype, K being S without
                caches, else the length that they show; or the first and the end of the columns seen, both [B], for
                the kernel of block attention.
            caches: one `LayerCache` a layer, bound to the columns that these rows occupy.
            joined: `joined_weights`, where no gradient is wanted.
            kernels: but for ``NONE`` by `Block.fused`. Needs bounds as ``seen``, ``joined`` weights of all layers, and
                ``caches`` whose first rows are those of the call, each with columns of its own.

        Returns:
            [B, S, D] in the model's dtype.
        """
        cos, sin = rope
        x = self.wte(tokens)
        if kernels:
            from dllm_engine.kernels.layer import add_norm

            delta = None
            for block, cache, weights in zip(self.blocks, caches or (), joined or (), strict=True):
                x, delta = block.fused(x, delta, rope, seen, cache, weights, kernels)  # type: ignore[operator]
            return add_norm(x, delta, self.ln_f.weight, self.ln_f.eps, early=kernels >= Kernels.EARLY)[1]
        for i, block in enumerate(self.blocks):
            x = block(x, cos, sin, seen, caches[i] if caches else None, joined[i] if joined else None)
        return self.ln_f(x)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits [B, L, V] of every position, for training and tests; decoding never makes them. Where rows predict the
        column behind theirs, they are shifted by one, and the first column has its own row's, as in Dream's code.

        Args:
            input_ids: LongTensor [B, L].
            attention_mask: [B, L], 0 on left padding; None if there is none.

        Raises:
            ValueError: more columns than the model has positions.
        """
        most = self.config.max_sequence_length
        if input_ids.shape[1] > most:
            raise ValueError(f"input_ids: {input_ids.shape[1]} columns given; max_sequence_length is {most}")
        real = (torch.ones_like(input_ids) if attention_mask is None else attention_mask).bool()
        positions = (real.long().cumsum(1) - 1).clamp_min(0)
        seen = None if attention_mask is None else real[:, None, None, :]
        if self.config.block_size:  # rows of padding see the first block
            blocks = positions // self.config.block_size
            seen = real[:, None, None, :] & (blocks[:, None, :, None] >= blocks[:, None, None, :])
        hidden = self.hidden_states(input_ids, self.rope_tables(positions), seen)
        if self.config.shifted:
            hidden = torch.cat((hidden[:, :1], hidden[:, :-1]), dim=1)
        return F.linear(hidden, self.lm_head)

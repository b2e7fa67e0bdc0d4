"""LLaDA's transformer on one page: pre-norm, RMSNorm and RoPE in float32, bidirectional attention, SwiGLU.

The module names are the checkpoint's own, so the name map is one prefix (`weights.PREFIX`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dllm_engine.config import LLaDAConfig

if TYPE_CHECKING:
    from dllm_engine.engine import Engine
    from dllm_engine.kv_cache import LayerCache


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32; cast back *before* the weight is applied, as LLaDA was trained."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate halves (NeoX style) in float32. x [B, H, S, Dh]; cos, sin [B, 1, S, Dh]."""
    x32 = x.float()
    left, right = x32.chunk(2, dim=-1)
    return (x32 * cos + torch.cat((-right, left), dim=-1) * sin).to(x.dtype)


class Linear(nn.Linear):
    """Not initialised on the meta device, where torch would import its compiler for it: 0.07 GB and a second."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Embedding(nn.Embedding):
    """See `Linear`."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Joined(NamedTuple):
    """Weights of a layer that are multiplied at once: qkv [D + 2 H_kv Dh, D], its bias, gate_up [2 F, D]."""

    qkv: Tensor
    bias: Tensor | None
    gate_up: Tensor


def one_behind_the_other(matrices: list[Tensor]) -> Tensor | None:
    """The matrix [Σ rows, D] that these are the rows of, in one storage and in this order; None if they are not.

    Found anew for every decode: nothing has to be kept in step when weights are moved, replaced or trained.
    """
    first, at = matrices[0], matrices[0].storage_offset()
    for matrix in matrices:
        together = matrix.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (together and matrix.is_contiguous() and matrix.dtype == first.dtype and matrix.storage_offset() == at):
            return None
        at += matrix.numel()
    rows = sum(len(matrix) for matrix in matrices)
    return first.detach().as_strided((rows, first.shape[1]), (first.shape[1], 1))


class Block(nn.Module):
    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        d, kv_size, bias = config.d_model, config.n_kv_heads * config.head_dim, config.include_qkv_bias
        self.head_dim, self.heads, self.kv_heads = config.head_dim, config.n_heads, config.n_kv_heads
        self.attn_norm = RMSNorm(d, config.rms_norm_eps)
        self.q_proj = Linear(d, d, bias=bias)
        self.k_proj = Linear(d, kv_size, bias=bias)
        self.v_proj = Linear(d, kv_size, bias=bias)
        self.attn_out = Linear(d, d, bias=False)
        self.ff_norm = RMSNorm(d, config.rms_norm_eps)
        self.ff_proj = Linear(d, config.mlp_hidden_size, bias=False)  # the gate
        self.up_proj = Linear(d, config.mlp_hidden_size, bias=False)
        self.ff_out = Linear(config.mlp_hidden_size, d, bias=False)

    def joined(self) -> Joined | None:
        """The matrices as they are used together, where `weights.load_pretrained` laid them one behind the other."""
        qkv = self.q_proj, self.k_proj, self.v_proj
        biases: list[Tensor] = [proj.bias for proj in qkv if proj.bias is not None]
        matrices = one_behind_the_other([proj.weight for proj in qkv])
        gate_up = one_behind_the_other([self.ff_proj.weight, self.up_proj.weight])
        if matrices is None or gate_up is None:
            return None
        return Joined(matrices, torch.cat(biases) if biases else None, gate_up)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        seen: Tensor | tuple[Tensor, Tensor] | None,
        cache: LayerCache | None,
        joined: Joined | None = None,
    ) -> Tensor:
        b, s, d = x.shape
        h = self.attn_norm(x)
        if joined is None:
            qkv = torch.cat((self.q_proj(h), self.k_proj(h), self.v_proj(h)), dim=-1)
        else:
            qkv = F.linear(h, joined.qkv, joined.bias)
        qk, v = qkv.view(b, s, -1, self.head_dim).transpose(1, 2).split((self.heads + self.kv_heads, self.kv_heads), 1)
        q, k = apply_rope(qk, cos, sin).split((self.heads, self.kv_heads), 1)
        if cache is not None:
            k, v = cache.write(k, v)  # keys are cached after RoPE: they are never rotated again
        if isinstance(seen, tuple):
            from dllm_engine.kernels.block_attention import block_attention

            h = block_attention(q, k, v, *seen)
        else:
            h = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=self.heads != self.kv_heads)
        x = x + self.attn_out(h.transpose(1, 2).reshape(b, s, d))
        h = self.ff_norm(x)
        if joined is None:
            gate, up = self.ff_proj(h), self.up_proj(h)
        else:
            gate, up = F.linear(h, joined.gate_up).chunk(2, dim=-1)
        return x + self.ff_out(F.silu(gate) * up)

    def fused(
        self,
        x: Tensor,
        delta: Tensor | None,
        rope: tuple[Tensor, Tensor],
        bounds: tuple[Tensor, Tensor],
        cache: LayerCache,
        joined: Joined,
    ) -> tuple[Tensor, Tensor]:
        """`forward` of ``x + delta`` in a quarter of the launches: a sum that is due is part of the norm that follows.

        Returns:
            The residual stream and what is still to be added to it.
        """
        from dllm_engine.kernels.block_attention import block_attention
        from dllm_engine.kernels.layer import add_norm, rope_write, silu_mul

        assert cache.columns is not None
        assert cache.seen is not None
        x, h = add_norm(x, delta, self.attn_norm.weight, self.attn_norm.eps)
        qkv = F.linear(h, joined.qkv, joined.bias)
        q = rope_write(qkv, *rope, cache.keys, cache.values, cache.columns, heads=self.heads)
        h = block_attention(q, *cache.seen, *bounds).transpose(1, 2).flatten(2)  # a view
        x, h = add_norm(x, self.attn_out(h), self.ff_norm.weight, self.ff_norm.eps)
        return x, self.ff_out(silu_mul(F.linear(h, joined.gate_up)))


class LLaDA(nn.Module):
    """A masked diffusion language model of the LLaDA family.

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
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.ln_f = RMSNorm(config.d_model, config.rms_norm_eps)
        if not config.weight_tying:
            self.ff_out = Linear(config.d_model, config.embedding_size, bias=False)
        self.path: Path | None = None
        self.generation_defaults: dict[str, Any] = {}
        self.vocab_size = config.vocab_size
        self.end_ids = config.eos_token_ids
        self._tokenizer: Any = None
        self._rope: tuple[Tensor, Tensor] | None = None
        self._engine: Engine | None = None  # see `engine.kept`

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave buffers behind."""
        return self.__dict__ | {"_engine": None}

    # -- construction -------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
    ) -> LLaDA:
        """Load a Hugging Face checkpoint: a directory, or a hub id when ``huggingface_hub`` can reach the hub.

        Args:
            path: directory with ``config.json`` and ``model.safetensors`` (or shards with an index), or a hub id.
            device: where the weights go; a GPU if there is one, else the CPU.
            dtype: ``"float32"``, ``"bfloat16"``, ``"float16"`` or the torch dtype; the checkpoint's own by default.

        Raises:
            FileNotFoundError: no such directory, or a file is missing in it.
            ValueError: an unsupported or incomplete config, or weights that do not fit it.
        """
        from dllm_engine.weights import load_pretrained

        return load_pretrained(path, device=device, dtype=dtype)

    @classmethod
    def from_transformers(cls, module: nn.Module, vocab_size: int | None = None) -> LLaDA:
        """Wrap a loaded transformers ``LLaDAModelLM``; tensors are shared, not copied.

        Only the module's ``config`` and the names of its tensors are read. ``vocab_size`` is ``len(tokenizer)``;
        without it every row of the head up to the config's ``vocab_size`` may be written.

        Raises:
            TypeError: not a module. ValueError: no LLaDA, or a ``vocab_size`` beyond the embedding.
        """
        from dllm_engine.weights import share_transformers

        return share_transformers(module, vocab_size)

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
        """Head weight [V, D]; the embedding itself where they are tied."""
        return self.wte.weight if self.config.weight_tying else self.ff_out.weight

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer beside the weights (loaded on first use, from local files only).

        Raises:
            FileNotFoundError: the model has no directory, or there is no tokenizer in it.
        """
        if self._tokenizer is None:
            from dllm_engine.tokenizer import load_tokenizer

            self._tokenizer = load_tokenizer(self.path)
        return self._tokenizer

    # -- computation --------------------------------------------------------------------------------------------

    def rope_tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [B, 1, S, Dh] in float32 for positions [B, S]."""
        if self._rope is None or self._rope[0].device != positions.device:
            config = self.config
            exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device)
            inverse = 1.0 / (config.rope_theta ** (exponent / config.head_dim))
            steps = torch.arange(config.max_sequence_length, dtype=torch.float32, device=positions.device)
            angle = torch.outer(steps, inverse).repeat(1, 2)
            self._rope = angle.cos(), angle.sin()
        cos, sin = self._rope
        return cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)

    def joined_weights(self) -> list[Joined | None]:
        """`Block.joined` of every layer."""
        return [block.joined() for block in self.blocks]  # type: ignore[operator]

    def hidden_states(
        self,
        tokens: Tensor,
        rope: tuple[Tensor, Tensor],
        seen: Tensor | tuple[Tensor, Tensor] | None = None,
        caches: list[LayerCache] | None = None,
        joined: list[Joined | None] | None = None,
        fused: bool = False,
    ) -> Tensor:
        """Final, normed hidden states of the given rows.

        Args:
            tokens: LongTensor [B, S].
            rope: `rope_tables` of their positions, counted from each sequence's first real token.
            seen: which keys: None, all; [B, 1, 1, K], bool, or 0 and −inf in the model's dtype, K being S without
                caches, else the length that they show; or the first and the end of the columns seen, both [B], for
                the kernel of block attention.
            caches: one `LayerCache` a layer, bound to the columns that these rows occupy.
            joined: `joined_weights`, where no gradient is wanted.
            fused: by `Block.fused`. Needs bounds as ``seen``, ``joined`` weights of all layers, and ``caches`` whose
                first rows are those of the call, each with columns of its own.

        Returns:
            [B, S, D] in the model's dtype.
        """
        cos, sin = rope
        x = self.wte(tokens)
        if fused:
            from dllm_engine.kernels.layer import add_norm

            delta = None
            for block, cache, weights in zip(self.blocks, caches or (), joined or (), strict=True):
                x, delta = block.fused(x, delta, rope, seen, cache, weights)  # type: ignore[operator]
            return add_norm(x, delta, self.ln_f.weight, self.ln_f.eps)[1]
        for i, block in enumerate(self.blocks):
            x = block(x, cos, sin, seen, caches[i] if caches else None, joined[i] if joined else None)
        return self.ln_f(x)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits [B, L, V] of every position, for training and tests; decoding never makes them.

        Args:
            input_ids: LongTensor [B, L].
            attention_mask: [B, L], 0 on left padding; None if there is none.
        """
        b, length = input_ids.shape
        if attention_mask is None:
            positions = torch.arange(length, device=input_ids.device).expand(b, length)
            hidden = self.hidden_states(input_ids, self.rope_tables(positions))
        else:
            real = attention_mask.bool()
            positions = (real.long().cumsum(1) - 1).clamp_min(0)
            hidden = self.hidden_states(input_ids, self.rope_tables(positions), real[:, None, None, :])
        return F.linear(hidden, self.lm_head)

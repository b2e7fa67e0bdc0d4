"""A layer of the transformer: pre-norm, RMSNorm and RoPE in float32, bidirectional attention, SwiGLU or experts.

The module names are those of LLaDA's checkpoints; `weights` has what others call them.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dllm_engine.config import LLaDAConfig, Routing

if TYPE_CHECKING:
    from dllm_engine.kernels.products import Parts
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
    """Rotate halves (NeoX style) of the first R elements in float32. x [B, H, S, Dh]; cos, sin [B, 1, S, R]."""
    if (size := cos.shape[-1]) < x.shape[-1]:
        return torch.cat((apply_rope(x[..., :size], cos, sin), x[..., size:]), dim=-1)
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


def plain(module: nn.Module) -> bool:
    """Whether to multiply by the module's weight is to call it: it is one of ours, and nobody hooked it."""
    ours = type(module) in (Linear, Embedding, RMSNorm, Router, Mixture, Block, nn.ModuleList)
    hooks = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return ours and not hooks


class Kernels(IntEnum):
    """How much of a layer of a block call is made by `dllm_engine.kernels`; each includes the one before."""

    NONE = 0
    BETWEEN = 1  # what lies between its products
    PRODUCTS = 2  # products of few rows too, and with more it is as if it were the one before
    EARLY = 3  # and each kernel is launched before the one ahead of it has ended


class Joined(NamedTuple):
    """Weights of a layer that are multiplied at once: qkv [(H + 2 H_kv) Dh, D], its bias, gate_up [2 F, D] (None of
    a mixture).
    """

    qkv: Tensor
    bias: Tensor | None
    gate_up: Tensor | None


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


def _uniform(*shape: int) -> nn.Parameter:
    """As in `Linear`."""
    parameter = nn.Parameter(torch.empty(shape))
    if not parameter.is_meta:
        nn.init.uniform_(parameter, -(shape[-1] ** -0.5), shape[-1] ** -0.5)
    return parameter


class Router(nn.Module):
    """LLaDA2's, in float32 whatever the model is in: a row's experts are those with the highest sigmoid plus bias,
    within the groups whose two best add up to most.

    Attributes:
        weight: [E, D]. expert_bias: [E], by which training evened out how often experts are chosen.
    """

    def __init__(self, config: LLaDAConfig, routing: Routing) -> None:
        super().__init__()
        self.chosen, self.normed, self.routing = config.num_experts_per_tok, config.norm_topk_prob, routing
        self.weight = _uniform(config.num_experts, config.d_model)
        self.expert_bias = nn.Parameter(torch.zeros(config.num_experts))

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Shares, float32 [N, k], and whose they are, [N, k]. rows: [N, D]."""
        scores = F.linear(rows.float(), self.weight.float()).sigmoid()
        groups = (scores + self.expert_bias).unflatten(1, (self.routing.groups, -1))
        kept = groups.topk(2).values.sum(-1).topk(self.routing.kept).indices
        away = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter_(1, kept, False)
        experts = groups.masked_fill(away[..., None], -torch.inf).flatten(1).topk(self.chosen).indices
        shares = scores.gather(1, experts)  # the bias only chooses
        if self.normed:
            shares = shares / (shares.sum(-1, keepdim=True) + 1e-20)
        return shares * self.routing.scale, experts


class Mixture(nn.Module):
    """A gated MLP of many experts: each row goes through the k that a router likes most, and their outputs are added
    up, each times its share. In LLaDA-MoE (arXiv 2509.24389) that is its share of a softmax over all experts.

    Attributes:
        gate: the router [E, D].
        gate_up: [E, 2 F, D], an expert's gate before its up-projection. down: [E, D, F].
        shared_gate_up, shared_down: the same of an MLP for all rows, without E; None if there is none.
    """

    FEW_ROWS = 256  # estimated in benchmarks/NOTES.md, not measured

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        experts, d, f = config.num_experts, config.d_model, config.mlp_hidden_size
        self.chosen, self.normed, routing = config.num_experts_per_tok, config.norm_topk_prob, config.routing
        self.gate = Linear(d, experts, bias=False) if routing is None else Router(config, routing)
        self.routed = routing is not None
        self.gate_up, self.down = _uniform(experts, 2 * f, d), _uniform(experts, d, f)
        shared = config.shared_hidden_size
        self.shared_gate_up = _uniform(2 * shared, d) if shared else None
        self.shared_down = _uniform(d, shared) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] to the same."""
        rows = x.flatten(0, 1)
        if self.routed:
            shares, experts = self.gate(rows)
        else:
            shares, experts = self.gate(rows).softmax(-1, dtype=torch.float32).topk(self.chosen)
            shares = shares / shares.sum(-1, keepdim=True) if self.normed else shares
        shares = shares.to(x.dtype)
        if not rows.is_cuda:
            way = self._one_by_one
        elif len(rows) > self.FEW_ROWS and x.dtype == torch.bfloat16 and hasattr(F, "grouped_mm"):  # torch 2.10
            way = self._grouped
        else:  # a block's rows read nearly every expert anyway
            way = self._all
        out = way(rows, shares, experts).view_as(x)
        if self.shared_gate_up is None or self.shared_down is None:
            return out
        gate, up = F.linear(x, self.shared_gate_up).chunk(2, dim=-1)
        return out + F.linear(F.silu(gate) * up, self.shared_down)

    def _one_by_one(self, rows: Tensor, shares: Tensor, experts: Tensor) -> Tensor:
        """Each expert over the rows that chose it, which the host must know."""
        order = experts.flatten().argsort(stable=True)
        counts = experts.flatten().bincount(minlength=len(self.down)).tolist()  # host: on CPUs only
        row, share = order // self.chosen, shares.flatten()[order, None]
        out = torch.zeros_like(rows)
        for expert, (at, of) in enumerate(zip(row.split(counts), share.split(counts), strict=True)):
            if len(at):
                gate, up = F.linear(rows[at], self.gate_up[expert]).chunk(2, dim=-1)
                out.index_add_(0, at, F.linear(F.silu(gate) * up, self.down[expert]) * of)
        return out

    def _grouped(self, rows: Tensor, shares: Tensor, experts: Tensor) -> Tensor:
        """The same without the host; on GPUs torch does it in bfloat16."""
        chosen = experts.flatten()
        order = chosen.argsort(stable=True)
        ends = (chosen[:, None] == torch.arange(len(self.down), device=rows.device)).sum(0).cumsum(0).to(torch.int32)
        both = F.grouped_mm(rows[order // self.chosen], self.gate_up.transpose(1, 2), offs=ends)
        gate, up = both.chunk(2, dim=-1)
        each = F.grouped_mm(F.silu(gate) * up, self.down.transpose(1, 2), offs=ends)
        # by row again, where the order of a sum is always the same
        return (each[order.argsort()].unflatten(0, experts.shape) * shares[..., None]).sum(1)

    def _all(self, rows: Tensor, shares: Tensor, experts: Tensor) -> Tensor:
        """All experts over all rows; those that a row did not choose have no share."""
        share = torch.zeros(len(rows), len(self.down), dtype=rows.dtype, device=rows.device)
        share = share.scatter_(1, experts, shares).T[..., None]
        gate, up = F.linear(rows, self.gate_up.flatten(0, 1)).unflatten(1, (len(self.down), -1)).chunk(2, dim=-1)
        each = torch.bmm((F.silu(gate) * up).transpose(0, 1), self.down.transpose(1, 2))
        return (each * share).masked_fill_(share == 0, 0).sum(0)  # 0 times what overflowed is no 0


class Block(nn.Module):
    """A layer: attention over all keys that are seen, then a gated MLP or a mixture of them, each with RMSNorm before
    and a sum behind.
    """

    def __init__(self, config: LLaDAConfig, layer: int) -> None:
        super().__init__()
        d, bias = config.d_model, config.include_qkv_bias
        size, kv_size = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.head_dim, self.heads, self.kv_heads = config.head_dim, config.n_heads, config.n_kv_heads
        self.attn_norm = RMSNorm(d, config.rms_norm_eps)
        self.q_proj = Linear(d, size, bias=bias)
        self.k_proj = Linear(d, kv_size, bias=bias)
        self.v_proj = Linear(d, kv_size, bias=bias)
        self.attn_out = Linear(size, d, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.ff_norm = RMSNorm(d, config.rms_norm_eps)
        self.qk_norm, self.mixed = config.qk_norm, config.num_experts > 0 and layer >= config.dense_layers
        if self.mixed:
            self.experts = Mixture(config)
        else:
            hidden = config.dense_hidden_size if layer < config.dense_layers else config.mlp_hidden_size
            self.ff_proj = Linear(d, hidden, bias=False)  # the gate
            self.up_proj = Linear(d, hidden, bias=False)
            self.ff_out = Linear(hidden, d, bias=False)

    def joined(self) -> Joined | None:
        """The matrices as they are used together, where `weights.load_` laid them one behind the other."""
        qkv = self.q_proj, self.k_proj, self.v_proj
        biases: list[Tensor] = [proj.bias for proj in qkv if proj.bias is not None]
        matrices = one_behind_the_other([proj.weight for proj in qkv])
        gate_up = None if self.mixed else one_behind_the_other([self.ff_proj.weight, self.up_proj.weight])
        if matrices is None or (gate_up is None and not self.mixed):
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
        """The residual stream [B, S, D] behind the layer.

        Args:
            x: [B, S, D] before it.
            cos, sin: of `LLaDA.rope_tables`, for the columns computed.
            seen: what is added to scores, broadcastable to [B, 1, S, K]; or each sequence's first key and the end
                of its keys, int32 [B] each, for the attention kernel; None: all keys are seen.
            cache: where keys and values are written and read; None: those of ``x`` alone are attended to.
            joined: weights to multiply in place of the modules'.
        """
        b, s, _ = x.shape
        h = self.attn_norm(x)
        if joined is None:
            qkv = torch.cat((self.q_proj(h), self.k_proj(h), self.v_proj(h)), dim=-1)
        else:
            qkv = F.linear(h, joined.qkv, joined.bias)
        qk, v = qkv.view(b, s, -1, self.head_dim).transpose(1, 2).split((self.heads + self.kv_heads, self.kv_heads), 1)
        if self.qk_norm:
            q, k = qk.split((self.heads, self.kv_heads), 1)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), 1)
        q, k = apply_rope(qk, cos, sin).split((self.heads, self.kv_heads), 1)
        if cache is not None:
            k, v = cache.write(k, v)  # keys are cached after RoPE: they are never rotated again
        if isinstance(seen, tuple):
            from dllm_engine.kernels.block_attention import block_attention

            h = block_attention(q, k, v, *seen)
        else:
            h = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=self.heads != self.kv_heads)
        x = x + self.attn_out(h.transpose(1, 2).flatten(2))
        h = self.ff_norm(x)
        if self.mixed:
            return x + self.experts(h)
        if joined is None or joined.gate_up is None:
            gate, up = self.ff_proj(h), self.up_proj(h)
        else:
            gate, up = F.linear(h, joined.gate_up).chunk(2, dim=-1)
        return x + self.ff_out(F.silu(gate) * up)

    def fused(
        self,
        x: Tensor,
        delta: Tensor | Parts | None,
        rope: tuple[Tensor, Tensor],
        bounds: tuple[Tensor, Tensor],
        cache: LayerCache,
        joined: Joined,
        kernels: Kernels = Kernels.BETWEEN,
    ) -> tuple[Tensor, Tensor | Parts]:
        """`forward` of ``x + delta`` in a quarter of the launches: a sum that is due is part of the norm that follows.
        Not of a mixture, nor with norms of queries and keys.

        Returns:
            The residual stream and what is still to be added to it.
        """
        from dllm_engine.kernels import products
        from dllm_engine.kernels.block_attention import block_attention
        from dllm_engine.kernels.layer import add_norm, rope_write, silu_mul

        assert cache.columns is not None
        assert cache.seen is not None
        assert joined.gate_up is not None
        own = kernels >= Kernels.PRODUCTS and products.fits(x)
        early = own and kernels >= Kernels.EARLY

        def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | Parts:
            return products.linear(x, weight, early=early) if own and bias is None else F.linear(x, weight, bias)

        x, h = add_norm(x, delta, self.attn_norm.weight, self.attn_norm.eps, early=early)
        qkv = linear(h, joined.qkv, joined.bias)
        q = rope_write(qkv, *rope, cache.keys, cache.values, cache.columns, heads=self.heads, early=early)
        h = block_attention(q, *cache.seen, *bounds, early=early).transpose(1, 2).flatten(2)  # a view
        delta = linear(h, self.attn_out.weight)
        x, h = add_norm(x, delta, self.ff_norm.weight, self.ff_norm.eps, early=early)
        if own:
            h = products.gated_linear(h, joined.gate_up, early=early)
        else:
            h = silu_mul(F.linear(h, joined.gate_up), early=early)
        return x, linear(h, self.ff_out.weight)

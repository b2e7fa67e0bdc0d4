"""Models with random weights of stated shapes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dllm_engine import LLaDA, LLaDAConfig


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, whose mask and end token are the last two words.

    Attributes:
        mlp: of each expert, if there are any.
        kv_heads: 0 stands for as many as heads.
        dream: whether rows predict the column behind theirs, and queries, keys and values have a bias.
    """

    d_model: int
    n_layers: int
    n_heads: int
    mlp: int
    vocab: int
    experts: int = 0
    chosen: int = 0
    kv_heads: int = 0
    dream: bool = False

    @property
    def kv_size(self) -> int:
        """Features of all keys of a row."""
        return self.d_model * (self.kv_heads or self.n_heads) // self.n_heads

    def parameters(self) -> int:
        """Of the matrices: blocks, embedding and head."""
        return self.read_parameters() + self.vocab * self.d_model

    def read_parameters(self) -> int:
        """Those that a call of many rows reads: blocks, all experts among them, and head."""
        return self._of_a_call(self.experts)

    def used_parameters(self) -> int:
        """Those that a row is multiplied by."""
        return self._of_a_call(self.chosen)

    def _of_a_call(self, experts: int) -> int:
        mlp = self.experts * self.d_model + 3 * self.d_model * self.mlp * max(experts, 1)
        return self.n_layers * (2 * self.d_model * (self.d_model + self.kv_size) + mlp) + self.vocab * self.d_model

    def config(self, max_length: int) -> LLaDAConfig:
        """With LLaDA-8B's constants, for canvases up to ``max_length``; with experts, queries and keys are normed."""
        return LLaDAConfig(
            d_model=self.d_model, n_layers=self.n_layers, n_heads=self.n_heads,
            n_kv_heads=self.kv_heads or self.n_heads, include_qkv_bias=self.dream, shifted=self.dream,
            mlp_hidden_size=self.mlp, vocab_size=self.vocab, embedding_size=self.vocab, max_sequence_length=max_length,
            mask_token_id=self.vocab - 1, eos_token_ids=(self.vocab - 2,), rms_norm_eps=1e-5, rope_theta=5e5,
            weight_tying=False, num_experts=self.experts, num_experts_per_tok=self.chosen, qk_norm=self.experts > 0,
        )  # fmt: skip


SHAPES = {
    "8b": Shape(d_model=4096, n_layers=32, n_heads=32, mlp=12288, vocab=126464),  # LLaDA-8B
    "moe": Shape(d_model=2048, n_layers=16, n_heads=16, mlp=1024, vocab=157184, experts=64, chosen=8),  # LLaDA-MoE
    "dream": Shape(  # Dream-7B
        d_model=3584, n_layers=28, n_heads=28, kv_heads=4, mlp=18944, vocab=152064, dream=True
    ),
    "vocab": Shape(d_model=512, n_layers=8, n_heads=8, mlp=1376, vocab=126464),  # its vocabulary, a small body
    "small": Shape(d_model=256, n_layers=4, n_heads=4, mlp=688, vocab=8192),
    "tiny": Shape(d_model=32, n_layers=2, n_heads=2, mlp=48, vocab=64),
}


@torch.no_grad()
def random_model(
    shape: Shape, *, device: torch.device, dtype: torch.dtype, max_length: int, peak: float = 1.0
) -> LLaDA:
    """Normal weights that keep the scale of what passes through them; logits have the standard deviation ``peak``."""
    model = LLaDA.uninitialised(shape.config(max_length), device, dtype)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        elif name == "wte.weight":
            parameter.normal_(generator=generator)
        else:
            scale = peak if name == "ff_out.weight" else 1.0
            parameter.normal_(std=scale * parameter.shape[-1] ** -0.5, generator=generator)
    return model

"""Where the demo model's weights start: a sketch of what large models learn early and two CPU cores would not reach.

From a random start the model copies by position within minutes, but in 20 M tokens it never learned to look a name up
(sort and shuffle stayed under 1 %). A lookup needs one layer to tell every token its neighbours and a later one to
compare them (an induction head, arXiv 2209.11895); each half is useless alone, so training finds neither for long. From
this start 400 steps look up 96 % of the names, without it 25 %. All weights are trained.

1. Embeddings: names and numbers hold their rank as cosines, so that alphabet and number line need not be guessed.
2. First layer: each head looks at one fixed distance (RoPE turns the constant in the last dimension into a position).
3. Middle layers: keys equal queries, so that tokens look at those with the same neighbours, or the same word; what they
   find goes to where the LM head reads.
"""

from __future__ import annotations

import math

import torch
from demo_tokenizer import vocabulary
from torch import Tensor

from dllm_engine import LLaDA, LLaDAConfig
from dllm_engine.tasks.names import FIRST, LAST

WAVES = 16  # dimensions of the rank
COPIED = 32  # dimensions that lookups carry: a head's width
OWN = 64  # dimensions of a token's own embedding; the last of them is a constant. Then one group a neighbour:
GROUP = 16
DISTANCES = (-1, 1, -3, 3)  # of the first layer's heads: the other name of a person, the same name of the next one
SHARP = 6  # rotating pairs that make a fixed distance sharp
NOISE = 0.3  # of the usual random start


def new_model(config: LLaDAConfig) -> LLaDA:
    """A model ready to be trained; draws from torch's global generator."""
    model = LLaDA(config)
    if config.d_model != OWN + GROUP * len(DISTANCES) or config.head_dim != COPIED or config.n_layers < 3:
        raise ValueError("config: the demo model has d_model 128, head size 32 and at least three layers")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2:
                scale = p.shape[1] ** -0.5
                if name.endswith(("attn_out.weight", "ff_out.weight")):
                    scale /= math.sqrt(2 * config.n_layers)
                p.normal_(std=scale)
        _embed(model)
        _look_at_distances(model)
        for layer in (1, 2):
            _look_up(model, layer)
    return model


def _embed(model: LLaDA) -> None:
    ids = {word: i for i, word in enumerate(vocabulary())}
    wte, head = model.wte.weight, model.lm_head
    wte.zero_()
    wte[:, :OWN].normal_(std=math.sqrt(2))
    for words in (FIRST, LAST, [str(i) for i in range(100)]):
        places = torch.tensor([ids["▁" + word] for word in words])
        rank = (torch.arange(len(words)) + 0.5) / len(words)
        wte[places, :WAVES] = 2 * torch.cos(math.pi * rank[:, None] * torch.arange(1, WAVES + 1))
    head.normal_(std=0.02)
    head[:, : OWN - 1] += 0.15 * wte[:, : OWN - 1]
    wte[:, OWN - 1] = 2.0


def _heads(model: LLaDA, layer: int, head: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Views of a head's query, key, value [Dh, D] and output [D, Dh] weights."""
    size = model.config.head_dim
    part = slice(head * size, (head + 1) * size)
    q, k, v, out = (
        model.get_parameter(f"blocks.{layer}.{name}.weight") for name in ("q_proj", "k_proj", "v_proj", "attn_out")
    )
    return q[part], k[part], v[part], out[:, part]


def _look_at_distances(model: LLaDA) -> None:
    size = model.config.head_dim
    pairs = torch.arange(0, size, 2).float() / size
    turn = model.config.rope_theta**-pairs
    for head, distance in enumerate(DISTANCES):
        q, k, v, out = _heads(model, 0, head)
        q.mul_(NOISE)
        k.mul_(NOISE)
        sharp = (torch.arange(size // 2) < SHARP).float() * 2.9
        # q · R(Δ) k with k = R(−distance) q is greatest at Δ = distance
        q[:, OWN - 1] = torch.cat((sharp, torch.zeros_like(sharp)))
        k[:, OWN - 1] = torch.cat((sharp * torch.cos(-distance * turn), sharp * torch.sin(-distance * turn)))
        v.zero_()
        v[:, :COPIED] = torch.eye(size)
        out.zero_()
        group = slice(OWN + GROUP * head, OWN + GROUP * (head + 1))
        out[group] = torch.randn(GROUP, size) * size**-0.5 * 1.4


def _look_up(model: LLaDA, layer: int) -> None:
    size = model.config.head_dim
    half = size // 2
    slow = [*range(half // 2, half), *range(half + half // 2, size)]  # pairs that hardly turn over a canvas
    for head, compared in enumerate((slice(OWN, OWN + GROUP), slice(OWN + GROUP, OWN + 2 * GROUP), slice(0, OWN - 1))):
        q, k, v, out = _heads(model, layer, head)
        same = torch.zeros(size, model.config.d_model)
        width = compared.stop - compared.start
        same[slow, compared] = torch.randn(len(slow), width) * width**-0.5 * 1.6
        for weight in (q, k):
            weight.mul_(NOISE).add_(same)
        v.mul_(NOISE)[:, :COPIED] += torch.eye(size)
        out.mul_(NOISE)[:COPIED] += torch.eye(size)

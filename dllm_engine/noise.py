"""Counter-based random numbers: the same draw for a (seed, position, step, id) in any batch, order or backend.

Philox 4x32-10 (Salmon et al., SC 2011) in int64 arithmetic, so that eager torch gives the words that a kernel gives.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85

LARGEST = 1e30  # temperature or guidance: their products with noise and hidden states stay finite in float32
TOKEN_STREAM, SCORE_STREAM = 0, 1  # fourth counter word: noise on tokens, noise on positions


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four 32-bit words (int64 tensors, 0 to 2^32 − 1) from four counter words and two key words, broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 wraps modulo 2^64, so both halves of the product are right although it may look negative
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = k0 + _W0 & _MASK, k1 + _W1 & _MASK
    return c0, c1, c2, c3


def _key_words(noise_keys: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    seed, position, step = noise_keys.unbind(-1)
    return seed & _MASK, seed >> 32 & _MASK, position & _MASK, step & _MASK


def _uniform(word: Tensor) -> Tensor:
    """Float32 in (0, 1): exact near 0, where the Gumbel tail that decides is; capped one ulp below 1."""
    return ((word.double() + 0.5) * 2.0**-32).float().clamp_max(1.0 - 2.0**-24)


def gumbel(noise_keys: Tensor, first_id: int, count: int) -> Tensor:
    """Standard Gumbel noise for vocabulary ids ``first_id`` to ``first_id + count − 1``.

    Args:
        noise_keys: int64 [R, 3]: sequence seed, position counted from the start of the generation, sequence's step.

    Returns:
        float32 [R, count]. One Philox call serves four neighbouring ids.
    """
    k0, k1, position, step = (w[:, None] for w in _key_words(noise_keys))
    ids = torch.arange(first_id, first_id + count, device=noise_keys.device)
    quads = torch.arange(first_id // 4, (first_id + count - 1) // 4 + 1, device=noise_keys.device)[None]
    stream = torch.full_like(quads, TOKEN_STREAM)
    words = torch.stack(philox((quads, position, step, stream), (k0, k1)), dim=-1).flatten(1)
    u = _uniform(words[:, ids - quads[0, 0] * 4])
    return -torch.log(-torch.log1p(-u))


def uniform_scores(noise_keys: Tensor) -> Tensor:
    """One float32 in (0, 1) per key. noise_keys int64 [..., 3] -> [...]."""
    k0, k1, position, step = _key_words(noise_keys)
    zero = torch.zeros_like(position)
    return _uniform(philox((zero, position, step, zero + SCORE_STREAM), (k0, k1))[0])

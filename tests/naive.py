"""LLaDA's generate() spelled out on Python lists and float64, one sequence at a time: shares no code with the engine.

Only the model's forward pass is the engine's own. Random numbers come from a second Philox, on Python integers.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox 4x32-10, after Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011)."""
    c, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def uniform(seed: int, position: int, step: int, counter0: int, stream: int, word: int) -> float:
    words = philox([counter0, position, step, stream], [seed % 2**32, seed >> 32])
    return min((words[word] + 0.5) / 2**32, 1 - 2**-24)


def log_sum_exp(x: np.ndarray) -> float:
    top = float(x.max())
    return top + math.log(float(np.exp(x - top).sum()))


def logits_of(model: Any, tokens: list[int], prompt_length: int, cfg_scale: float) -> np.ndarray:
    batch = [tokens] if cfg_scale == 0 else [tokens, [model.mask_id] * prompt_length + tokens[prompt_length:]]
    with torch.inference_mode():
        out = model(torch.tensor(batch)).double().numpy()
    return out[0] if cfg_scale == 0 else out[1] + (cfg_scale + 1) * (out[0] - out[1])


def generate(
    model: Any,
    prompt: list[int],
    *,
    steps: int,
    gen_length: int,
    block_length: int,
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    remasking: str = "low_confidence",
    logits_eos_inf: bool = False,
    confidence_eos_eot_inf: bool = False,
    seed: int = 0,
) -> list[int]:
    p = len(prompt)
    tokens = prompt + [model.mask_id] * gen_length
    open_ = set(range(p, p + gen_length))
    blocks = gen_length // block_length
    per_block = steps // blocks
    step = 0
    for block in range(blocks):
        rows = range(p + block * block_length, p + (block + 1) * block_length)
        for i in range(per_block):
            quota = block_length // per_block + (1 if i < block_length % per_block else 0)
            logits = logits_of(model, tokens, p, cfg_scale)
            found = []
            for row in rows:
                if row not in open_:
                    continue
                x = logits[row].copy()
                if logits_eos_inf:
                    x[model.fill_id] = -np.inf
                allowed = x.copy()
                allowed[model.mask_id] = -np.inf
                allowed[model.vocab_size :] = -np.inf
                if temperature > 0:
                    noise = [
                        -math.log(-math.log1p(-uniform(seed, row - p, step, v // 4, 0, v % 4))) for v in range(len(x))
                    ]
                    token = int(np.argmax(allowed + temperature * np.array(noise)))
                else:
                    token = int(np.argmax(allowed))
                if confidence_eos_eot_inf:
                    x[list(model.end_ids)] = -np.inf
                confidence = float(np.exp(x[token] - log_sum_exp(x)))
                rank = confidence if remasking == "low_confidence" else uniform(seed, row - p, step, 0, 1, 0)
                found.append((-rank, row, token))
            for _, row, token in sorted(found)[:quota]:
                tokens[row] = token
                open_.discard(row)
            step += 1
    assert not open_
    return tokens

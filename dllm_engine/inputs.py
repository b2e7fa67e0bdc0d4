"""Checks of prompts and lengths against the model, before the first forward pass. Every message names its argument."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dllm_engine.checks import check_count, check_counts
from dllm_engine.model import LLaDA

_INTS = torch.int64, torch.int32


def check_prompt(model: LLaDA, input_ids: Any, attention_mask: Any) -> tuple[Tensor, Tensor]:
    """Left-padded prompt int64 [B, P] and padding int64 [B], both on the model's device.

    Raises:
        TypeError, ValueError: see the messages.
    """
    if isinstance(input_ids, Mapping):
        raise TypeError(f"input_ids: a {type(input_ids).__name__} given; its own 'input_ids' are needed")
    if isinstance(input_ids, np.ndarray) and input_ids.dtype.kind in "iu":
        input_ids = torch.from_numpy(input_ids.astype(np.int64))
    if isinstance(input_ids, Tensor):
        ids = input_ids
        if ids.layout is not torch.strided or ids.is_nested or ids.is_meta:
            raise TypeError(
                f"input_ids: a {ids.layout} tensor on {ids.device} given; a dense one with values is needed"
            )
        if ids.ndim != 2:
            raise ValueError(f"input_ids: shape {list(ids.shape)} given; [B, P] is needed")
        if ids.dtype not in _INTS:
            raise TypeError(f"input_ids: dtype {ids.dtype} given; torch.int64 is needed")
        if 0 in ids.shape:
            raise ValueError(f"input_ids: shape {list(ids.shape)} given; neither batch nor prompt may be empty")
        ids = ids.to(model.device, torch.int64)
        padding = _padding(attention_mask, ids)
    else:
        if attention_mask is not None:
            raise ValueError("attention_mask: goes with a tensor; lists of ids are padded inside")
        ids, padding = _pad(input_ids, model.fill_id, model.device)
    check_ids(model, (int(ids.min()), int(ids.max())), "input_ids")  # host: input checks, once per decode
    return ids, padding


def check_one(model: LLaDA, prompt: Any, index: int, longest: int) -> list[int]:
    """Ids of one prompt of many, a list of ints or an integer tensor [P]; ``longest``: tokens that it may have.

    Raises:
        TypeError, ValueError: naming ``index``.
    """
    if isinstance(prompt, Tensor) and (prompt.ndim != 1 or prompt.dtype not in _INTS):
        raise ValueError(
            f"prompts: prompt {index} has shape {list(prompt.shape)} and {prompt.dtype}; int64 [P] is needed"
        )
    if not _is_list(prompt):
        raise TypeError(f"prompts: prompt {index} is a {type(prompt).__name__}; a list of ints is needed")
    ids = _ids("prompts", prompt, index)
    if len(ids) > longest:
        raise ValueError(
            f"prompts: prompt {index} has {len(ids)} tokens; {longest} fit the engine's max_length beside gen_length"
        )
    check_ids(model, ids, f"prompts: prompt {index}")
    return ids


def check_ids(model: LLaDA, ids: Sequence[int], what: str) -> None:
    """An id that the model does not have raises ValueError; ``what`` begins its message."""
    rows = model.config.embedding_size
    if stray := [token for token in (min(ids), max(ids)) if not 0 <= token < rows]:
        raise ValueError(f"{what}: id {stray[0]} given; the model has ids 0 to {rows - 1}")


def _padding(mask: Any, ids: Tensor) -> Tensor:
    if isinstance(mask, np.ndarray) and mask.dtype.kind in "biuf":
        mask = torch.as_tensor(mask)
    if mask is None:
        return torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        given = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask: {given} given; a tensor of input_ids' shape {list(ids.shape)} is needed")
    mask = mask.to(ids.device)
    if not ((mask == 0) | (mask == 1)).all():  # host: input checks, once per decode
        raise ValueError("attention_mask: values other than 0 and 1 given")
    mask = mask.bool()
    if (mask[:, :-1] & ~mask[:, 1:]).any():  # host: the same
        raise ValueError("attention_mask: a 0 follows a 1; only left padding is allowed")
    if not mask[:, -1].all():  # host: the same
        raise ValueError("attention_mask: a prompt without any token; every row needs at least one 1")
    return (~mask).sum(1)


def _pad(prompts: Any, fill_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    wanted = "a LongTensor [B, P] or a list of lists of ints is needed"
    if not isinstance(prompts, Sequence) or isinstance(prompts, str | bytes):
        raise TypeError(f"input_ids: {type(prompts).__name__} given; {wanted}")
    if stray := [type(prompt).__name__ for prompt in prompts if not _is_list(prompt)]:
        hint = " (of what a tokenizer gives, its 'input_ids')" if "Encoding" in stray[0] or stray[0] == "dict" else ""
        raise TypeError(f"input_ids: a list of {stray[0]} given; {wanted}{hint}")
    if not prompts:
        raise ValueError("input_ids: an empty batch given")
    prompts = [_ids("input_ids", prompt, i) for i, prompt in enumerate(prompts)]
    width = max(map(len, prompts))
    padding = [width - len(p) for p in prompts]
    ids = [[fill_id] * pad + p for pad, p in zip(padding, prompts, strict=True)]
    try:
        return torch.tensor(ids, device=device), torch.tensor(padding, device=device)
    except (OverflowError, RuntimeError, ValueError) as error:
        raise ValueError(f"input_ids: an id does not fit 64 bits ({error})") from None


def _is_list(prompt: Any) -> bool:
    if isinstance(prompt, Tensor | np.ndarray):
        return prompt.ndim == 1
    return isinstance(prompt, Sequence) and not isinstance(prompt, str | bytes)


def _ids(name: str, prompt: Any, index: int) -> list[int]:
    """Of one prompt, whose integers may be numpy's."""
    # host: a prompt before its first call
    ids = prompt.tolist() if isinstance(prompt, Tensor | np.ndarray) else list(prompt)
    if not ids:
        raise ValueError(f"{name}: prompt {index} is empty")
    if not all(isinstance(token, Integral) and not isinstance(token, bool) for token in ids):
        raise TypeError(f"{name}: prompt {index} holds something other than ints; encode text with model.tokenizer")
    return [int(token) for token in ids]


def check_room(model: LLaDA, prompts: Sequence[Sequence[int]], gen_length: int) -> None:
    """A prompt that is too long beside ``gen_length`` raises ValueError, which names it."""
    room = model.config.max_sequence_length - gen_length
    for i, prompt in enumerate(prompts):
        if len(prompt) > room > 0:
            raise ValueError(f"prompt {i}: {len(prompt)} tokens given; the model has room for {room} beside gen_length")


def check_steps(name: str, steps: int | None, *, gen_length: int, block_length: int) -> None:
    """Steps that cannot be shared out over the blocks raise TypeError or ValueError; ``name`` begins its message."""
    if steps is None:
        return
    check_count(name, steps)
    blocks = gen_length // block_length
    if min(steps, gen_length) % blocks:
        raise ValueError(
            f"{name}: {steps} given; the {blocks} blocks"
            f" (gen_length {gen_length} / block_length {block_length}) must divide it"
        )


def check_lengths(model: LLaDA, longest_prompt: int, *, gen_length: int, block_length: int, steps: int | None) -> None:
    """Lengths that do not fit each other or the model raise ValueError."""
    check_counts(gen_length=gen_length, block_length=block_length)
    if gen_length % block_length:
        raise ValueError(f"block_length: {block_length} given; it must divide gen_length {gen_length}")
    check_steps("steps", steps, gen_length=gen_length, block_length=block_length)
    alignment, limit = alignment_of(model, block_length), model.config.max_sequence_length
    if model.config.block_size and alignment % block_length:
        raise ValueError(f"block_length: {block_length} given; it must divide the model's block size {alignment}")
    if longest_prompt + gen_length > limit - limit % alignment:
        whole = f", {limit - limit % alignment} of them in whole blocks" if limit % alignment else ""
        raise ValueError(
            f"gen_length: a prompt of {longest_prompt} tokens + {gen_length}"
            f" exceeds the model's max_sequence_length {limit}{whole}"
        )


def alignment_of(model: LLaDA, block_length: int) -> int:
    """Columns of a block of attention, as `DecodeState` has them: as long as those decoded, unless these are parts."""
    if not model.config.block_size:
        return 1
    return model.config.block_size if model.config.opens_blocks else block_length

"""Many prompts through few rows: a prompt is admitted whenever a row is free, and leaves when it is finished."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dllm_engine import inputs
from dllm_engine.buffers import Buffers
from dllm_engine.loop import Loop
from dllm_engine.model import LLaDA
from dllm_engine.options import Options
from dllm_engine.outputs import Generated
from dllm_engine.state import DecodeState
from dllm_engine.streaming import BlockStream


def generate(
    model: LLaDA,
    prompts: Iterable[Sequence[int] | Tensor],
    options: Options,
    buffers: Buffers,
    *,
    rows: int,
    longest: int,
    seed_of: Callable[[int], int],
    streamer: Callable[[int, Tensor], Any] | None,
) -> Iterator[Generated]:
    """`Engine.generate_many` on checked arguments.

    Args:
        longest: tokens that a prompt may have.
        seed_of: prompt's index -> its seed; raises ValueError if it has none.
    """
    # Prompts end at one column and are padded on the left. Lengths of their own would free those columns, but then the
    # blocks of different prompts begin at different columns and every read and write is a gather. A call leaves out the
    # padding that all its sequences share, so a lone short prompt costs what it costs alone.
    state = DecodeState(
        torch.full((rows, longest), model.fill_id, device=model.device),
        torch.zeros(rows, dtype=torch.int64, device=model.device),
        gen_length=options.gen_length,
        block_length=options.block_length,
        steps=options.steps,
        seeds=[0] * rows,  # `admit` sets them
        mask_id=model.mask_id,
        fill_id=model.fill_id,
        end_ids=model.end_ids,
        buffers=buffers,
    )
    state.left.zero_()  # no row has work yet
    loop = Loop(model, state, options, buffers)
    owners, seeds = [-1] * rows, [0] * rows  # of the prompt in each row
    stream = BlockStream(streamer, state, owners) if streamer is not None else None
    padding, source, failure = loop.forward.padding, _checked(model, prompts, longest, seed_of), None
    free: list[int] | None = list(range(rows))[::-1]  # None: no prompt is left

    def describe(row: int, column: int) -> str:
        return f"prompt {owners[row]} at position {column - padding[row]}"

    while True:
        while free:
            try:
                owners[free[-1]], ids, seed = next(source)
            except StopIteration:
                free = None
            except Exception as error:  # the prompts before it are finished first
                free, failure = None, error
            else:
                row = free.pop()
                seeds[row] = seed
                loop.admit(row, ids, seed)
        joined = loop.step()
        if not joined:
            break
        if stream is not None:
            stream.step(joined, loop.where)
        for row in joined:
            if loop.where[row][-1] == 0:
                if free is not None:
                    free.append(row)
                sequence = state.tokens[row, padding[row] :].to("cpu", copy=True)  # host: it is finished
                length = state.prompt_length - padding[row]
                yield _generated(model, sequence, owners[row], length, loop.taken[row], seeds[row])
        loop.check(joined, describe)
    if failure is not None:
        raise failure


def _checked(
    model: LLaDA, prompts: Iterable[Sequence[int] | Tensor], longest: int, seed_of: Callable[[int], int]
) -> Iterator[tuple[int, list[int], int]]:
    for index, prompt in enumerate(prompts):
        yield index, inputs.check_one(model, prompt, index, longest), seed_of(index)


def _generated(model: LLaDA, sequence: Tensor, index: int, prompt_length: int, passes: int, seed: int) -> Generated:
    ids = sequence[prompt_length:].tolist()
    tokens = next((i for i, token in enumerate(ids) if token in model.end_ids), len(ids))
    return Generated(index, sequence, prompt_length, passes, tokens, seed)

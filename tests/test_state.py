"""The state of a decode on memory that another has used."""

from __future__ import annotations

import torch

from dllm_engine.buffers import Buffers
from dllm_engine.state import DecodeState


def begun(buffers: Buffers, batch: int) -> DecodeState:
    return DecodeState(
        torch.full((batch, 3), 50), torch.zeros(batch, dtype=torch.int64), gen_length=8, block_length=4, steps=None,
        seeds=[2] * batch, mask_id=99, fill_id=1, end_ids=(1, 7), buffers=buffers,
    )  # fmt: skip


def test_nothing_is_left_of_the_decode_before() -> None:
    buffers, fields = Buffers(torch.device("cpu")), ("tokens", "undecided", "predicted", "progress", "seeds", "padding")
    fresh = begun(Buffers(torch.device("cpu")), 2)
    used = begun(buffers, 4).with_idle
    for name in fields:
        getattr(used, name).fill_(5)
    again = begun(buffers, 2)
    for name in fields:
        assert torch.equal(getattr(again, name), getattr(fresh, name)), name
    idle = {name: getattr(again.with_idle, name)[2] for name in fields}
    assert idle["tokens"].tolist() == [1] * 11
    assert not idle["undecided"].any()
    assert idle["progress"].tolist() == [3, 3, 0, 11, 0, 0]  # it ends where it begins
    assert (int(idle["seeds"]), int(idle["padding"])) == (0, 0)
    assert again.with_idle.end_ids.tolist() == [1, 7]


def test_a_prompt_that_is_admitted_begins_as_new() -> None:
    state = begun(Buffers(torch.device("cpu")), 2)
    state.predicted.fill_(5)
    state.undecided.fill_(False)
    state.admit(1, [60], 9, 4)
    assert state.tokens[1].tolist() == [1, 1, 60, *[99] * 4, *[1] * 4]
    assert state.undecided[1].nonzero()[:, 0].tolist() == [3, 4, 5, 6]
    assert state.predicted[1].tolist() == [-1] * 11
    assert state.progress[1].tolist() == [3, 7, 0, 11, 0, 4]
    assert (int(state.padding[1]), int(state.seeds[1])) == (2, 9)
    assert state.predicted[0].tolist() == [5] * 11
    state.release(1)
    assert not state.undecided[1].any()
    assert state.progress[1].tolist() == [3, 3, 0, 11, 0, 0]

"""What the block-causal families are tested against, against models of transformers and answers told by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from block_causal import RAW_LLADA2, RAW_SDAR, Written, logits_of, published, reference


def check(raw: dict[str, Any], block_length: int, length: int) -> None:
    model = reference(raw, seed=length)
    ids = torch.randint(0, raw["vocab_size"], (1, length), generator=torch.Generator().manual_seed(length))
    expected = logits_of(model, ids, block_length)[0].numpy()
    found = Written(published(model, raw), raw).logits(ids[0].tolist(), block_length)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("block_length", "length"), [(4, 19), (32, 40), (5, 5)])
@pytest.mark.parametrize("tied", [False, True])
def test_sdar_is_qwen3(block_length: int, length: int, tied: bool) -> None:
    check(RAW_SDAR | {"tie_word_embeddings": tied}, block_length, length)


@pytest.mark.parametrize(("block_length", "length"), [(4, 19), (32, 40), (5, 5)])
@pytest.mark.parametrize("changes", [{}, {"num_experts": 16, "num_experts_per_tok": 5, "first_k_dense_replace": 2}])
def test_llada2_is_glm(block_length: int, length: int, changes: dict[str, Any]) -> None:
    check(RAW_LLADA2 | changes, block_length, length)


class Told(Written):
    """Column c wants token ``wanted[c]``, the surer the higher ``sure[c]``; the mask and ids without text more."""

    def __init__(self, wanted: list[int], sure: list[float]) -> None:
        super().__init__({}, RAW_SDAR)
        self.wanted, self.sure = wanted, sure
        self.seen: list[list[int]] = []

    def logits(self, ids: Sequence[int], block_length: int) -> np.ndarray:
        self.seen.append([*ids])
        made = np.zeros((len(ids), 64))
        for row, token, sure in zip(made, self.wanted, self.sure, strict=False):
            row[[token, self.mask, 63]] = sure, sure + 0.5, sure + 1
        return made


def test_one_a_step_the_surest_first_and_the_lowest_of_equals() -> None:
    told = Told([9, 9, 10, 11, 12, 13, 14, 15], [9, 9, 2, 3, 1, 5, 5, 4])
    assert told.decode([7, 8], 5, 4, 2.0) == [10, 11, 12, 13, 14]
    m = 60
    assert told.seen == [
        [7, 8, m, m], [7, 8, m, 11],
        [7, 8, 10, 11, m, m, m, m], [7, 8, 10, 11, m, 13, m, m], [7, 8, 10, 11, m, 13, 14, m],
        [7, 8, 10, 11, m, 13, 14, 15],
    ]  # fmt: skip


def test_all_above_the_threshold_and_no_fewer_than_the_quota() -> None:
    wanted, sure = [10, 11, 12, 13], [1.0, 9.0, 2.0, 9.0]
    for threshold, quota, steps in [(0.1, 1, 3), (0.1, 3, 2), (0.01, 1, 1), (2.0, 2, 2), (2.0, 4, 1)]:
        told = Told(wanted, sure)
        assert told.decode([], 4, 4, threshold, quota) == wanted
        assert len(told.seen) == steps, (threshold, quota)


def test_an_end_fills_what_is_behind_it_and_waits_for_what_is_before_it() -> None:
    told = Told([9, 10, 3, 12, 13, 14, 15, 16], [0, 1, 5, 2, 6, 5, 4, 3])
    assert told.decode([3], 6, 4, 2.0, end_ids=(4, 3)) == [10, 3, 4, 4, 4, 4]
    assert told.seen == [[3, 60, 60, 60], [3, 60, 3]]


def test_the_first_of_two_ends_rules() -> None:
    told = Told([10, 4, 12, 3], [1, 2, 3, 4])
    assert told.decode([], 4, 4, 2.0, end_ids=(3, 4)) == [10, 4, 3, 3]
    assert told.seen == [[60] * 4, [60, 60, 60, 3], [60, 60, 12, 3], [60, 4]]

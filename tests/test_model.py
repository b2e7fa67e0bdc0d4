"""The transformer's parts: the formulas in the dtypes of weights, and which matrices lie one behind the other."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model

from dllm_engine.layers import RMSNorm, one_behind_the_other


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_norm_is_float32_and_rounded_before_the_weight(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(50, 64, generator=generator) * 3).to(dtype)
    norm = RMSNorm(64, 1e-5)
    norm.weight.data = torch.randn(64, generator=generator).to(dtype)
    exact = x.double() / (x.double().square().mean(1, keepdim=True) + 1e-5).sqrt()
    expected = (norm.weight.double() * exact.to(dtype).double()).to(dtype)
    assert float((norm(x) == expected).float().mean()) > 0.99  # but for what float32 puts on the other side of a tie


def test_more_columns_than_positions() -> None:
    model = tiny_model(max_sequence_length=8)
    assert model(torch.zeros(1, 8, dtype=torch.int64)).shape == (1, 8, 64)
    with pytest.raises(ValueError, match="input_ids: 9 columns given; max_sequence_length is 8"):
        model(torch.zeros(1, 9, dtype=torch.int64))


def test_which_matrices_lie_one_behind_the_other() -> None:
    whole, other = torch.arange(32.0).view(8, 4), torch.zeros(8, 4)
    first, second = whole[:4], whole[4:]
    joined = one_behind_the_other([first, second])
    assert joined is not None
    assert joined.data_ptr() == whole.data_ptr()
    assert torch.equal(joined, whole)
    for apart in (
        [second, first],  # another order
        [whole[:3], second],  # a row is left out
        [first, other[4:]],  # at the right place of another storage
        [first, second.t()],  # its elements are in another order
        [first, whole.view(torch.int32)[4:]],  # the bits of other numbers
    ):
        assert one_behind_the_other(apart) is None

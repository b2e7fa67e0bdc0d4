"""One model call: what guidance combines, and in which precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import tiny_model

from dllm_engine import decode, ops


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_guidance_combines_hidden_states_in_float32(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    model, prompt, seen = tiny_model().to(dtype), [4, 5, 6], []
    step = ops.decode_step_

    def watched(hidden: torch.Tensor, *given: Any, **options: Any) -> Any:
        seen.append(hidden)
        return step(hidden, *given, **options)

    monkeypatch.setattr(ops, "decode_step_", watched)
    settings: dict[str, Any] = {"gen_length": 4, "block_length": 4, "policy": "topk", "cache": "none"}
    decode(model, [prompt], cfg_scale=0.7, end_of_text="off", **settings)
    tokens = torch.tensor([[*prompt, *[model.mask_id] * 4], [model.mask_id] * 7])
    with torch.inference_mode():
        both = model.hidden_states(tokens, model.rope_tables(torch.arange(7)[None]))[:, 3:].float()
    assert {hidden.dtype for hidden in seen} == {torch.float32}
    torch.testing.assert_close(seen[0], (both[1] + 1.7 * (both[0] - both[1]))[None], rtol=1e-6, atol=1e-6)

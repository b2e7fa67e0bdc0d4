from __future__ import annotations

import torch


def block_attention_available(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    return "stub for now"

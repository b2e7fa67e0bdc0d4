from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dllm_engine import LLaDA, LLaDAConfig
from dllm_engine.demo import DEMO_MODEL

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden_model() -> LLaDA:
    """The goldens' random checkpoint, float32 on the CPU; tests must not change it."""
    return LLaDA.from_pretrained(GOLDEN / "checkpoint", device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def demo_model() -> LLaDA:
    return LLaDA.from_pretrained(DEMO_MODEL, device="cpu", dtype="float32")


def tiny_config(**changes: Any) -> dict[str, Any]:
    """``config.json`` of a small model, with the goldens' keys."""
    raw = json.loads((GOLDEN / "checkpoint" / "config.json").read_text(encoding="utf-8"))
    sizes = {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "mlp_hidden_size": 48}
    ids = {"vocab_size": 60, "embedding_size": 64, "mask_token_id": 59, "eos_token_id": 1}
    return raw | sizes | ids | changes


def ending_model(seed: int = 5, **changes: Any) -> LLaDA:
    """A `tiny_model` with an end id that comes up now and then."""
    model = tiny_model(seed, **changes)
    model.lm_head[1] = model.lm_head[40] * 1.3
    return model


def tiny_model(seed: int = 0, scale: float = 1.0, **changes: Any) -> LLaDA:
    """A random model in memory whose predictions are peaked enough that rounding decides nothing."""
    model = LLaDA(LLaDAConfig.from_dict(tiny_config(**changes)))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        with torch.no_grad():
            if parameter.ndim == 2:
                parameter.normal_(std=scale * 1.6 * parameter.shape[1] ** -0.5, generator=generator)
    return model.eval().requires_grad_(False)

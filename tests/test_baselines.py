"""The benchmarks' baselines give the tokens of the originals, in as many calls."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import tiny_model

from dllm_engine import LLaDA

ROOT = Path(__file__).resolve().parent.parent
CASES = json.loads((ROOT / "tests" / "golden" / "cases.json").read_text(encoding="utf-8"))
LOOPS = [c for c in CASES if "filter_tau" not in c and "cfg_scale" not in c]


@pytest.fixture(scope="module")
def baselines() -> ModuleType:
    spec = importlib.util.spec_from_file_location("baselines", ROOT / "benchmarks" / "baselines.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("case", LOOPS, ids=lambda case: case["name"])
def test_tokens_and_calls_of_the_originals(baselines: ModuleType, golden_model: LLaDA, case: dict[str, Any]) -> None:
    settings = {key: case[key] for key in ("steps", "gen_length", "block_length")}
    prompt = torch.tensor(case["prompt"])
    if case["reference"] == "LLaDA generate":
        out = baselines.llada_generate(golden_model, prompt, **settings)
        assert out.passes == case["steps"]
    else:
        settings |= {"threshold": case.get("threshold"), "cache": case["cache"]}
        out = baselines.fast_dllm_generate(golden_model, prompt, **settings)
        assert out.passes == case["forward_passes"]
    assert out.sequences.tolist() == case["sequences"]


def test_softmax_in_the_logits_own_type(baselines: ModuleType, golden_model: LLaDA) -> None:
    case = LOOPS[2]
    settings = {key: case[key] for key in ("steps", "gen_length", "block_length")}
    out = baselines.llada_generate(golden_model, torch.tensor(case["prompt"]), **settings, softmax_dtype=None)
    assert out.sequences.tolist() == case["sequences"]


def test_unknown_cache(baselines: ModuleType, golden_model: LLaDA) -> None:
    with pytest.raises(ValueError, match="cache: 'both' given; known: none, prefix, dual"):
        baselines.fast_dllm_generate(
            golden_model, torch.tensor([[3]]), steps=8, gen_length=8, block_length=8, cache="both"
        )


@pytest.mark.parametrize(("kind", "how"), [({"shifted": True}, "predict the col"), ({"block_size": 4}, "see no far")])
def test_models_that_the_loop_does_not_fit(baselines: ModuleType, kind: dict[str, Any], how: str) -> None:
    with pytest.raises(ValueError, match=f"model: its rows {how}"):
        baselines.fast_dllm_generate(
            tiny_model(**kind), torch.tensor([[3]]), steps=8, gen_length=8, block_length=4, cache="dual"
        )

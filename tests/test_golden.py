"""Token for token against the reference implementations (LLaDA's and Fast-dLLM's loops, the published filter)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import dllm_engine as dllm
from dllm_engine import LearnedFilter, LLaDA
from dllm_engine.policies import Learn2PD, Policy, Threshold

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "cases.json").read_text(encoding="utf-8"))


def test_logits(golden_model: LLaDA) -> None:
    stored = load_file(GOLDEN / "logits.safetensors")
    with torch.inference_mode():
        logits = golden_model(stored["logits.input_ids"])
    torch.testing.assert_close(logits, stored["logits.logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_decode(golden_model: LLaDA, case: dict[str, Any]) -> None:
    policy: str | Policy = "topk"
    steps = case["steps"]
    if "threshold" in case:
        policy, steps = Threshold(case["threshold"]), None
    if "filter_tau" in case:
        learned = LearnedFilter.from_pretrained(GOLDEN / "filter.safetensors", force=True)
        policy, steps = Learn2PD(learned, case["filter_tau"]), None
    out = dllm.decode(
        golden_model,
        torch.tensor(case["prompt"]),
        gen_length=case["gen_length"],
        block_length=case["block_length"],
        steps=steps,
        policy=policy,
        cache=case.get("cache", "none"),
        cfg_scale=case.get("cfg_scale", 0.0),
        end_of_text="off",
    )
    assert out.sequences.tolist() == case["sequences"]
    if case["forward_passes"] is not None:
        assert out.forward_passes <= case["forward_passes"]
    if policy == "topk":
        assert out.sequence_passes.tolist() == [case["steps"]] * len(case["prompt"])


@pytest.mark.parametrize(
    "case", [c for c in CASES if c["reference"] == "LLaDA generate"], ids=lambda case: case["name"]
)
def test_generate(golden_model: LLaDA, case: dict[str, Any]) -> None:
    settings = {k: case[k] for k in ("steps", "gen_length", "block_length", "cfg_scale") if k in case}
    out = dllm.generate(golden_model, torch.tensor(case["prompt"]), **settings)
    assert out.tolist() == case["sequences"]

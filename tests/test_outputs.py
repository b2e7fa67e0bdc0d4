"""What decode() returns, beside the real ModelOutput."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import ending_model

from dllm_engine import DecodeOutput, decode

KEYS = ["sequences", "tokens_per_forward", "forward_passes", "sequence_passes", "generated_tokens", "settings"]


@pytest.fixture(scope="module")
def out() -> DecodeOutput:
    return decode(ending_model(), [[4, 5], [6]], gen_length=16, block_length=8)


def test_it_is_used_like_a_model_output(out: DecodeOutput) -> None:
    """Every use of a ModelOutput with the same fields gives the same."""
    utils = pytest.importorskip("transformers.utils")

    @dataclass
    class Theirs(utils.ModelOutput):  # type: ignore[misc, name-defined]
        sequences: Any = None
        tokens_per_forward: Any = None
        forward_passes: Any = None
        sequence_passes: Any = None
        generated_tokens: Any = None
        settings: Any = None

    theirs = Theirs(*out.to_tuple())
    assert list(out) == list(theirs) == list(out.keys()) == list(theirs.keys()) == KEYS
    assert tuple(out) == tuple(theirs)
    assert len(out) == len(theirs) == 6
    for i, key in enumerate(KEYS):
        assert out[key] is out[i] is getattr(out, key) is theirs[key] is theirs[i] is out.get(key)
        assert key in out
    assert all(a is b for a, b in zip(out.to_tuple(), theirs.to_tuple(), strict=True))
    assert all(a is b for a, b in zip(out[:2], theirs[:2], strict=True))
    assert out[-1] is theirs[-1] is out.settings
    assert [name for name, _ in out.items()] == [name for name, _ in theirs.items()]
    for missing in ("logits", 6):
        for one in (out, theirs):
            with pytest.raises((KeyError, IndexError)):
                one[missing]
    with pytest.raises(AttributeError):
        out.logits  # type: ignore[attr-defined]  # noqa: B018
    assert dict(**out).keys() == dict(**theirs).keys()


def test_pipelines_move_its_tensors(out: DecodeOutput) -> None:
    """A pipeline whose forward returns it: `_ensure_tensor_on_device` looks into ModelOutputs and dicts only."""
    transformers = pytest.importorskip("transformers")
    pipeline = transformers.Pipeline.__new__(transformers.FeatureExtractionPipeline)
    moved = pipeline._ensure_tensor_on_device(out, torch.device("meta"))
    assert moved["sequences"].device.type == moved["tokens_per_forward"].device.type == "meta"
    assert moved["forward_passes"] == out.forward_passes


def test_tokens_per_forward(out: DecodeOutput) -> None:
    assert out.tokens_per_forward.tolist() == pytest.approx((out.generated_tokens / out.sequence_passes).tolist())


def test_it_is_read_only_and_can_be_copied(out: DecodeOutput) -> None:
    for change in (
        lambda: out.__setitem__("sequences", 1),
        lambda: setattr(out, "sequences", 1),
        lambda: delattr(out, "sequences"),
        lambda: out.pop("sequences"),
        lambda: out.update(sequences=1),
        lambda: out.setdefault("logits", 1),
        lambda: out.clear(),
        lambda: out.__delitem__("sequences"),
        lambda: out.__ior__({"sequences": 1}),
    ):
        with pytest.raises(TypeError, match="read-only"):
            change()
    for same in (copy.copy(out), copy.deepcopy(out), pickle.loads(pickle.dumps(out))):
        assert type(same) is DecodeOutput
        assert list(same) == KEYS
        assert torch.equal(same.sequences, out.sequences)
        assert torch.equal(same.tokens_per_forward, out.tokens_per_forward)

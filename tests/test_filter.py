"""The filter's file, its checks, and the rule."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ending_model, tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from test_decode_step import random_filter
from test_weights import save
from torch import Tensor

from dllm_engine import LearnedFilter, LLaDA, decode, features, policies
from dllm_engine.filter import model_ids
from dllm_engine.policies import Learn2PD, as_rule
from dllm_engine.policy_text import PolicyText
from dllm_engine.state import BlockState
from dllm_engine.stats import RowStats

PUBLISHED = Path(__file__).parent / "golden" / "filter.safetensors"


def made(model: LLaDA, block_length: int = 8, **options: object) -> LearnedFilter:
    torch.manual_seed(0)
    return LearnedFilter(block_length, ids=model_ids(model), **options)  # type: ignore[arg-type]


def test_forward_is_the_published_mlp_and_pads_with_zero() -> None:
    learned = LearnedFilter.from_pretrained(PUBLISHED, force=True)
    w = {name: tensor.double().numpy() for name, tensor in load_file(PUBLISHED).items()}
    c = np.linspace(0, 1, 20)
    padded = np.concatenate((c, np.zeros(12)))
    hidden = np.maximum(w["linear1.weight"] @ padded + w["linear1.bias"], 0)
    expected = (w["linear2.weight"] @ hidden + w["linear2.bias"])[:20]
    got = learned(torch.tensor(c, dtype=torch.float32)[None])[0]
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("target", ["directory", "file.safetensors"])
def test_round_trip(tmp_path: Path, target: str) -> None:
    model = tiny_model()
    first = made(model, threshold=0.8, confidence_of_decided="one", cache="dual")
    first.save_pretrained(tmp_path / target)
    second = LearnedFilter.from_pretrained(tmp_path / target)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert (Learn2PD(first).reads_decided, Learn2PD(made(model)).reads_decided) == (False, True)
    assert not Learn2PD(made(model, kind="position")).reads_decided
    for name in ("block_length", "threshold", "confidence_of_decided", "cache", "ids"):
        assert getattr(first, name) == getattr(second, name)
    assert Learn2PD(second).threshold == 0.8
    assert Learn2PD(second, 0.5).threshold == 0.5
    assert Learn2PD(str(tmp_path / target)).threshold == 0.8


def test_files_are_float32_and_a_threshold_may_be_zero(tmp_path: Path) -> None:
    made(tiny_model(), threshold=0.0).bfloat16().save_pretrained(tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "filter.safetensors").values()} == {torch.float32}
    assert Learn2PD(str(tmp_path)).threshold == 0.0


def test_a_filter_over_other_features_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tiny_model(), kind="position").save_pretrained(tmp_path)
    monkeypatch.setattr(features, "NAMES", ("other", *features.NAMES[1:]))
    with pytest.raises(ValueError, match="was trained on other features than this version computes"):
        LearnedFilter.from_pretrained(tmp_path)


def test_a_filter_of_another_model_is_taken_by_force(tmp_path: Path) -> None:
    other = made(tiny_model())
    other.ids["mask_id"] = 7
    other.save_pretrained(tmp_path)
    forced, plain = (Learn2PD(LearnedFilter.from_pretrained(tmp_path, force=force)) for force in (True, False))
    decode(tiny_model(), [[3]], gen_length=8, block_length=8, policy=forced)
    with pytest.raises(ValueError, match="trained for a model with mask_id 7"):
        decode(tiny_model(), [[3]], gen_length=8, block_length=8, policy=plain)


def test_the_published_pth(tmp_path: Path) -> None:
    torch.save(load_file(PUBLISHED), tmp_path / "filter.pth")
    learned = LearnedFilter.from_pretrained(tmp_path / "filter.pth", force=True)
    assert torch.equal(learned.linear2.bias, load_file(PUBLISHED)["linear2.bias"])
    assert Learn2PD(learned).threshold == 0.96
    with pytest.raises(ValueError, match="does not say which model .*force=True"):
        LearnedFilter.from_pretrained(tmp_path / "filter.pth")


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("{", "metadata 'dllm_engine' is '{'; a JSON object"),
        ("[1]", r"metadata 'dllm_engine' is '\[1\]'; a JSON object"),
        ('{"ids": [1]}', "ids: list given; a dict"),
        ('{"threshold": "hi"}', "threshold: 'hi' given; 0 to 1"),
        ('{"threshold": NaN}', "threshold: nan given; 0 to 1"),
        ('{"kind": "token"}', "is of kind 'token'"),
    ],
)
def test_files_that_say_something_odd(tmp_path: Path, told: str, message: str) -> None:
    file = tmp_path / "filter.safetensors"
    save_file(load_file(PUBLISHED), file, metadata={"dllm_engine": told})
    with pytest.raises(ValueError, match=f"^filter: {file}.* {message}"):
        LearnedFilter.from_pretrained(file)


def test_tensors_that_are_no_filter(tmp_path: Path) -> None:
    tensors, file = load_file(PUBLISHED), tmp_path / "filter.safetensors"
    for name, tensor, message in (
        ("linear1.bias", torch.tensor(1.0), r"linear1.weight has shape \[32, 32\], \[1, 1\] is needed"),
        ("linear2.bias", tensors["linear2.bias"].int(), "linear2.bias holds values that are not finite floats"),
    ):
        save_file(tensors | {name: tensor}, file)
        with pytest.raises(ValueError, match=message):
            LearnedFilter.from_pretrained(file, force=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_length": 0}, "block_length: 0 given"),
        ({"kind": "position", "hidden": -3}, "hidden: -3 given"),
        ({"threshold": 1.5}, "threshold: 1.5 given; 0 to 1 allowed"),
        ({"threshold": True}, "threshold: True given"),
    ],
)
def test_bad_filters_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        LearnedFilter(**options)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> object:
            return (open, (str(marker), "w"))

    torch.save({"linear1.weight": Evil()}, tmp_path / "filter.pth")
    with pytest.raises(ValueError, match=r"filter\.pth is no file of tensors by torch\.save \(UnpicklingError\)$"):
        LearnedFilter.from_pretrained(tmp_path / "filter.pth", force=True)
    assert not marker.exists()


def test_damaged_published_files(tmp_path: Path) -> None:
    for name, content in (("empty.pth", b""), ("bad.pt", b"garbage")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"filter: .*{name} is no file of tensors"):
            LearnedFilter.from_pretrained(tmp_path / name, force=True)
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"list\.pth holds a list; a dict of tensors is needed"):
        LearnedFilter.from_pretrained(tmp_path / "list.pth", force=True)


def test_saved_where_no_directory_is_with_a_threshold_of_numpy(tmp_path: Path) -> None:
    learned = LearnedFilter(8, threshold=np.float32(0.5))  # type: ignore[arg-type]
    for target in (tmp_path / "new" / "one.safetensors", tmp_path / "other" / "directory"):
        learned.save_pretrained(target)
        assert LearnedFilter.from_pretrained(target).threshold == 0.5


def test_file_errors(tmp_path: Path) -> None:
    tensors = load_file(PUBLISHED)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        LearnedFilter.from_pretrained(tmp_path)
    file = tmp_path / "filter.safetensors"
    file.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        LearnedFilter.from_pretrained(file, force=True)
    save_file({k: v for k, v in tensors.items() if k != "linear2.bias"}, file)
    with pytest.raises(ValueError, match=r"has no linear2.bias; a two-layer"):
        LearnedFilter.from_pretrained(file, force=True)
    save_file(tensors | {"linear1.weight": torch.zeros(32, 31)}, file)
    with pytest.raises(ValueError, match=r"linear1.weight has shape \[32, 31\], \[32, 32\] is needed"):
        LearnedFilter.from_pretrained(file, force=True)
    save_file(tensors | {"linear2.bias": torch.full((32,), torch.nan)}, file)
    with pytest.raises(ValueError, match="linear2.bias holds values that are not finite"):
        LearnedFilter.from_pretrained(file, force=True)
    save_file(tensors, file, metadata={"dllm_engine": json.dumps({"block_length": 16})})
    with pytest.raises(ValueError, match="says block_length 16, its tensors 32"):
        LearnedFilter.from_pretrained(file)
    with pytest.raises(ValueError, match="confidence_of_decided: 'two' given"):
        LearnedFilter(8, confidence_of_decided="two")


def test_decode_checks_the_filter_first() -> None:
    model = tiny_model()
    learned = made(model)
    with pytest.raises(ValueError, match="block_length: 16 given; this filter takes blocks up to 8"):
        decode(model, [[3]], gen_length=16, block_length=16, policy=Learn2PD(learned))
    other = made(model)
    other.ids["mask_id"] = 7
    with pytest.raises(ValueError, match="trained for a model with mask_id 7, this one has 59"):
        decode(model, [[3]], gen_length=8, block_length=8, policy=Learn2PD(other))
    other.forced = True
    decode(model, [[3]], gen_length=8, block_length=8, policy=Learn2PD(other))
    with pytest.warns(UserWarning, match="trained on cache 'none' traces, decoding with 'dual'"):
        decode(model, [[3]], gen_length=8, block_length=8, policy=Learn2PD(made(model, cache="none")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for cache in ("dual", None):  # as here, or unknown
            decode(model, [[3]], gen_length=8, block_length=8, policy=Learn2PD(made(model, cache=cache)))
    with pytest.raises(ValueError, match="threshold: 1.5 given"):
        Learn2PD(learned, 1.5)


def test_auto_takes_the_filter_that_the_model_ships(tmp_path: Path) -> None:
    directory = save(tiny_model(), tiny_config(), tmp_path / "m")
    model = LLaDA.from_pretrained(directory, device="cpu")
    made(model, threshold=0.7).save_pretrained(directory)
    assert isinstance(decode(model, [[3]], gen_length=8, block_length=8).settings["policy"], Learn2PD)
    decode(model, [[3]], gen_length=8, block_length=8, policy="learn2pd")
    made(model, threshold=0.6).save_pretrained(directory)  # trained anew while the model is loaded
    os.utime(directory / "filter.safetensors", ns=(1, 1))
    policy = decode(model, [[3]], gen_length=8, block_length=8).settings["policy"]
    assert policy.threshold == 0.6
    with pytest.warns(UserWarning, match="the model's own filter does not fit, using Threshold"):
        out = decode(model, [[3]], gen_length=16, block_length=16)
    assert repr(out.settings["policy"]) == "Threshold(threshold=0.9)"


@pytest.mark.parametrize(("convention", "expected"), [("model", [0.5, 0.5, 0.5, 0.0]), ("one", [0.5, 1.0, 0.5, 0.0])])
def test_what_decided_and_ended_positions_feed_the_filter(convention: str, expected: list[float]) -> None:
    """A filter whose first output is its input at k, asked with thresholds just below and above what k should be."""
    from test_reference import make_state, make_stats

    state = make_state(batch=1)
    state.undecided[0, 3] = False
    state.active_end[0] = 5
    block = state.block(torch.tensor([0]), 4)
    stats = make_stats([[5, 6, 7, 8]])  # log-odds 0: confidence 0.5
    for k, value in enumerate(expected):
        learned = LearnedFilter(4, confidence_of_decided=convention)
        with torch.no_grad():
            learned.linear1.weight.copy_(torch.eye(4))
            learned.linear1.bias.zero_()
            learned.linear2.weight.copy_(torch.eye(4)[[k, 1, 2, 3]])
            learned.linear2.bias.copy_(torch.tensor([-value, 0, 0, 0]))
        above, below = (Learn2PD(learned, 0.5 + shift).select(stats, block)[0, 0] for shift in (1e-6, -1e-6))
        assert (above.item(), below.item()) == (False, True)


@pytest.mark.parametrize("kind", ["block", "position"])
def test_kernels_take_filters_of_up_to_128_units(kind: str) -> None:
    for units in (128, 129):
        policy = Learn2PD(LearnedFilter(units, kind=kind, hidden=units))
        assert (as_rule(policy, 32, torch.device("cpu")) is None) == (units > 128)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("kind", ["block", "position"])
def test_even_odds_are_not_above_one_half(kind: str, backend: str) -> None:
    learned = LearnedFilter(8, kind=kind)
    with torch.no_grad():
        for parameter in learned.parameters():
            parameter.zero_()
    for threshold, passes in ((0.5, 8), (0.499, 1)):
        policy = Learn2PD(learned, threshold)
        settings: dict[str, Any] = {"gen_length": 8, "block_length": 8, "end_of_text": "off", "backend": backend}
        assert decode(tiny_model(), [[3]], policy=policy, **settings).forward_passes == passes


class Unfused(Learn2PD):
    """The same decisions by its own `select`, so that no kernel takes them."""

    asked = selected = 0

    def select(self, stats: RowStats, state: BlockState) -> Tensor:
        chosen = super().select(stats, state)
        self.asked += int(state.undecided.sum())
        self.selected += int(chosen.sum())
        return chosen


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("cache", ["none", "dual"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_kernel_and_select_give_the_same_decode(backend: str, cache: str, temperature: float) -> None:
    model = ending_model()  # texts end now and then
    torch.manual_seed(3)
    learned = random_filter(24)
    fused, unfused = Learn2PD(learned, 0.5), Unfused(learned, 0.5)
    rule = as_rule(fused, 8, torch.device("cpu"))
    assert rule is not None
    assert rule.position
    assert as_rule(unfused, 8, torch.device("cpu")) is None
    prompts = [[7, 3, 22, 41, 18, 30], [12], [5, 5, 58]]
    by_kernel, by_select = (
        decode(
            model, prompts, gen_length=48, block_length=16, policy=policy, cache=cache, temperature=temperature, seed=3,
            backend=backend,
        )
        for policy in (fused, unfused)
    )  # fmt: skip
    assert torch.equal(by_kernel.sequences, by_select.sequences)
    assert torch.equal(by_kernel.sequence_passes, by_select.sequence_passes)
    assert 0 < unfused.selected < unfused.asked
    assert by_kernel.forward_passes < 48


def test_a_home_directory_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    LearnedFilter().save_pretrained("~/a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert LearnedFilter.from_pretrained("~/a").block_length == 32
    assert PolicyText.parse("learn2pd=~/a@0.5") == PolicyText("learn2pd", 0.5, str(tmp_path / "a"))


def test_auto_without_a_readable_filter_is_a_threshold(tmp_path: Path) -> None:
    model = tiny_model()
    model.path = tmp_path
    (tmp_path / "filter.safetensors").mkdir()
    with pytest.warns(UserWarning, match="the model's own filter does not fit, using Threshold"):
        assert isinstance(policies.resolve("auto", model, block_length=8, cache="dual"), policies.Threshold)

"""Learn2PD filters (arXiv 2509.25188), the published kind and ours: which predictions are final? And their file."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dllm_engine import features
from dllm_engine.checks import check_counts, is_number
from dllm_engine.config import ModelFacts

FILTER_FILE = "filter.safetensors"
DEFAULT_THRESHOLD = 0.96  # the published operating point
KINDS = ("block", "position")
HIDDEN = 48  # units of a "position" filter: 817 parameters
_TENSORS = ("linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias")
_CONVENTIONS = ("model", "one")


class LearnedFilter(nn.Module):
    """Two layers with a ReLU between that give the logit of "this prediction is final", float32.

    ``"block"`` is the published filter (arXiv 2509.25188): the confidences of a block's positions in, a logit for each
    out, block_length → block_length → block_length. ``"position"`` is ours: the same small net at every position, over
    `features.NAMES`; it takes blocks of any length.

    Args:
        block_length: positions it was trained on; a shorter block of the published kind is padded with 0.0.
        kind: ``"block"`` or ``"position"``.
        hidden: units of a ``"position"`` filter.
        confidence_of_decided: what decided positions feed a ``"block"`` filter: the ``"model"``'s confidence (as
            published) or ``"one"``. A ``"position"`` filter counts them as certain.
        threshold: operating point stored with the filter, or None.
        ends_wait: whether end ids waited in its training traces, see `policies.Policy`.
        ids: mask id, end ids and vocabulary size of the model it was trained on; empty if unknown.
        cache: cache mode of its training traces, or None.
        about: further facts stored in the file, JSON values: training data, validation figures.
        forced: whether `check` lets pass that it was trained for a model with other ids.
    """

    def __init__(
        self,
        block_length: int = 32,
        *,
        kind: str = "block",
        hidden: int = HIDDEN,
        confidence_of_decided: str = "model",
        threshold: float | None = None,
        ends_wait: bool = False,
        ids: dict[str, Any] | None = None,
        cache: str | None = None,
        about: dict[str, Any] | None = None,
        forced: bool = False,
    ) -> None:
        super().__init__()
        for name, value, allowed in (
            ("kind", kind, KINDS),
            ("confidence_of_decided", confidence_of_decided, _CONVENTIONS),
        ):
            if value not in allowed:
                raise ValueError(f"{name}: {value!r} given; {' or '.join(allowed)} allowed")
        check_counts(block_length=block_length, hidden=hidden)
        if threshold is not None and not (is_number(threshold) and 0 <= threshold <= 1):
            raise ValueError(f"threshold: {threshold!r} given; 0 to 1 allowed")
        for name, facts in (("ids", ids), ("about", about)):
            if not isinstance(facts, dict | None):
                raise TypeError(f"{name}: {type(facts).__name__} given; a dict is needed")
        width, middle, out = (block_length,) * 3 if kind == "block" else (features.COUNT, hidden, 1)
        self.linear1 = nn.Linear(width, middle, dtype=torch.float32)
        self.linear2 = nn.Linear(middle, out, dtype=torch.float32)
        self.kind, self.block_length = kind, block_length
        self.threshold = None if threshold is None else float(threshold)
        self.ends_wait = ends_wait
        self.confidence_of_decided = confidence_of_decided
        self.ids, self.cache, self.about, self.forced = dict(ids or {}), cache, dict(about or {}), forced

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, S] from confidences float32 [B, S], S at most ``block_length``, or features [B, S, F]."""
        if self.kind == "position":
            return self.linear2(F.relu(self.linear1(x)))[..., 0]
        width = x.shape[-1]
        return self.linear2(F.relu(self.linear1(F.pad(x, (0, self.block_length - width)))))[..., :width]

    def packed(self) -> Tensor:
        """float32 [parameters]: the tensors one after the other, as `rules.Rule` takes them."""
        return torch.cat([self.get_parameter(name).detach().float().flatten() for name in _TENSORS])

    def check(self, model: ModelFacts, *, block_length: int, cache: str) -> None:
        """Compare with the model and settings of a decode.

        Raises:
            ValueError: other ids, vocabulary or a longer block than it was trained on (ids and vocabulary are let pass
                by ``force=True``).
        Warns:
            UserWarning: another cache mode than that of its training traces.
        """
        if self.kind == "block" and block_length > self.block_length:
            raise ValueError(f"block_length: {block_length} given; this filter takes blocks up to {self.block_length}")
        current = model_ids(model)
        for key, value in self.ids.items():
            if not self.forced and key in current and current[key] != value:
                raise ValueError(f"filter: trained for a model with {key} {value}, this one has {current[key]}")
        if self.cache is not None and self.cache != cache:
            warnings.warn(
                f"the filter was trained on cache {self.cache!r} traces, decoding with {cache!r}", stacklevel=2
            )

    def save_pretrained(self, path: str | Path) -> None:
        """Write ``filter.safetensors`` into a directory, or to a ``.safetensors`` file; directories are made."""
        from safetensors.torch import save_file

        target = Path(path).expanduser()
        if target.suffix != ".safetensors":
            target = target / FILTER_FILE
        target.parent.mkdir(parents=True, exist_ok=True)
        about = {
            "format": "dllm-engine filter 2",
            "kind": self.kind,
            "features": list(features.NAMES) if self.kind == "position" else ["confidence"],
            "block_length": self.block_length,
            "confidence_of_decided": self.confidence_of_decided,
            "threshold": self.threshold,
            "ends_wait": self.ends_wait,
            "ids": self.ids,
            "cache": self.cache,
            "about": self.about,
        }
        tensors = {name: t.detach().float().cpu().contiguous() for name, t in self.state_dict().items()}
        save_file(tensors, target, metadata={"dllm_engine": json.dumps(about, sort_keys=True)})

    @classmethod
    def from_pretrained(cls, path: str | Path, *, force: bool = False) -> LearnedFilter:
        """Read a filter from a directory, a ``.safetensors`` file, or the published ``.pth``.

        Args:
            force: accept a file without this project's metadata (the published ones), or one made for other ids.

        Raises:
            FileNotFoundError: nothing there. ValueError: not a filter, or no metadata and not ``force``.
        """
        file = Path(path).expanduser()
        if file.is_dir():
            file = file / FILTER_FILE
        if not file.exists():
            raise FileNotFoundError(f"filter: {file} does not exist")
        tensors, about = _read(file)
        if about is None and not force:
            raise ValueError(
                f"filter: {file} does not say which model and block length it is for;"
                " LearnedFilter.from_pretrained(file, force=True) takes it all the same"
            )
        about = about or {}
        kind = about.get("kind", "block")
        size = _size(tensors, file, kind)
        if kind == "position" and about.get("features") != list(features.NAMES):
            raise ValueError(f"filter: {file} was trained on other features than this version computes; train it again")
        if kind == "block" and about.get("block_length", size) != size:
            raise ValueError(f"filter: {file} says block_length {about['block_length']}, its tensors {size}")
        try:
            made = cls(
                size if kind == "block" else about.get("block_length", 0),
                kind=kind,
                hidden=size,
                confidence_of_decided=about.get("confidence_of_decided", "model"),
                threshold=about.get("threshold"),
                ends_wait=about.get("ends_wait", False),
                ids=about.get("ids"),
                cache=about.get("cache"),
                about=about.get("about"),
                forced=force,
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"filter: {file}: {error}") from None
        made.load_state_dict({name: tensors[name].float() for name in _TENSORS})
        return made.eval().requires_grad_(False)


def model_ids(model: ModelFacts) -> dict[str, Any]:
    """What a filter remembers of its model."""
    return {"mask_id": model.mask_id, "end_ids": list(model.end_ids), "vocab_size": model.vocab_size}


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    if file.suffix in (".pth", ".pt"):
        try:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged bytes end in anything, and torch's advice is to trust them
            raise ValueError(f"filter: {file} is no file of tensors by torch.save ({type(error).__name__})") from None
        if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            raise ValueError(f"filter: {file} holds a {type(tensors).__name__}; a dict of tensors is needed")
        return dict(tensors), None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            metadata = (opened.metadata() or {}).get("dllm_engine")
            stored = list(opened.keys())
            tensors = {name: opened.get_tensor(name) for name in stored}
    except SafetensorError as error:
        raise ValueError(f"filter: {file} is not a safetensors file ({error})") from None
    if not metadata:
        return tensors, None
    try:
        about = json.loads(metadata)
    except json.JSONDecodeError:
        about = metadata
    if not isinstance(about, dict):
        raise ValueError(f"filter: {file}: metadata 'dllm_engine' is {metadata[:40]!r}; a JSON object is needed")
    return tensors, about


def _size(tensors: dict[str, Tensor], file: Path, kind: str) -> int:
    """Units of the hidden layer; every tensor fits the kind and is finite."""
    missing = [name for name in _TENSORS if name not in tensors]
    if missing:
        raise ValueError(f"filter: {file} has no {missing[0]}; a two-layer Learn2PD filter is needed")
    if kind not in KINDS:
        raise ValueError(f"filter: {file} is of kind {kind!r}; known: {', '.join(KINDS)}")
    size = len(tensors["linear1.bias"].flatten())
    width, out = (size, size) if kind == "block" else (features.COUNT, 1)
    for name, shape in zip(_TENSORS, ([size, width], [size], [out, size], [out]), strict=True):
        if list(tensors[name].shape) != shape:
            raise ValueError(f"filter: {file}: {name} has shape {list(tensors[name].shape)}, {shape} is needed")
        if not tensors[name].is_floating_point() or not tensors[name].isfinite().all():
            raise ValueError(f"filter: {file}: {name} holds values that are not finite floats")
    return size

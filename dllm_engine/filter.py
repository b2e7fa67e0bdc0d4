"""The Learn2PD filter: a two-layer MLP over a block's confidences (arXiv 2509.25188), and its file."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from dllm_engine.model import LLaDA

FILTER_FILE = "filter.safetensors"
DEFAULT_THRESHOLD = 0.96  # the published operating point
_TENSORS = ("linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias")
_CONVENTIONS = ("model", "one")


class LearnedFilter(nn.Module):
    """block_length → block_length → ReLU → block_length, float32 logits of "this prediction is final".

    Args:
        block_length: positions it was trained on; shorter blocks are padded with 0.0, as published.
        confidence_of_decided: what decided positions feed it: the ``"model"``'s confidence (as published) or ``"one"``.
        threshold: operating point stored with the filter, or None.
        ids: mask id, end ids and vocabulary size of the model it was trained on; empty if unknown.
        cache: cache mode of its training traces, or None.
    """

    def __init__(
        self,
        block_length: int = 32,
        *,
        confidence_of_decided: str = "model",
        threshold: float | None = None,
        ids: dict[str, Any] | None = None,
        cache: str | None = None,
        forced: bool = False,
    ) -> None:
        super().__init__()
        if confidence_of_decided not in _CONVENTIONS:
            raise ValueError(
                f"confidence_of_decided: {confidence_of_decided!r} given; {' or '.join(_CONVENTIONS)} allowed"
            )
        self.linear1 = nn.Linear(block_length, block_length)
        self.linear2 = nn.Linear(block_length, block_length)
        self.block_length, self.confidence_of_decided, self.threshold = block_length, confidence_of_decided, threshold
        self.ids, self.cache, self.forced = dict(ids or {}), cache, forced

    def forward(self, confidence: Tensor) -> Tensor:
        """Logits [B, S] from confidences float32 [B, S], S at most ``block_length``."""
        width = confidence.shape[-1]
        x = F.pad(confidence, (0, self.block_length - width))
        return self.linear2(F.relu(self.linear1(x)))[..., :width]

    def packed(self) -> Tensor:
        """float32 [2 F² + 2 F]: the tensors one after the other, as `rules.Rule` takes them."""
        return torch.cat([self.get_parameter(name).detach().float().flatten() for name in _TENSORS])

    def check(self, model: Any, *, block_length: int, cache: str) -> None:
        """Compare with the model and settings of a decode.

        Raises:
            ValueError: other ids, vocabulary or a longer block than it was trained on (ids and vocabulary are let pass
                by ``force=True``).
        Warns:
            UserWarning: another cache mode than that of its training traces.
        """
        if block_length > self.block_length:
            raise ValueError(f"block_length: {block_length} given; this filter takes blocks up to {self.block_length}")
        current = model_ids(model)
        for key, value in self.ids.items():
            if not self.forced and key in current and current[key] != value:
                raise ValueError(f"filter: trained for a model with {key} {value}, this one has {current[key]}")
        if self.cache is not None and self.cache != cache:
            warnings.warn(
                f"the filter was trained on cache {self.cache!r} traces, decoding with {cache!r}", stacklevel=5
            )
        self.to(model.device)

    def save_pretrained(self, path: str | Path) -> None:
        """Write ``filter.safetensors`` into a directory (made if needed), or to a ``.safetensors`` file."""
        from safetensors.torch import save_file

        target = Path(path)
        if target.suffix != ".safetensors":
            target.mkdir(parents=True, exist_ok=True)
            target = target / FILTER_FILE
        about = {
            "format": "dllm-engine filter 1",
            "block_length": self.block_length,
            "confidence_of_decided": self.confidence_of_decided,
            "threshold": self.threshold,
            "ids": self.ids,
            "cache": self.cache,
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
        file = Path(path)
        if file.is_dir():
            file = file / FILTER_FILE
        if not file.exists():
            raise FileNotFoundError(f"filter: {file} does not exist")
        tensors, about = _read(file)
        if about is None and not force:
            raise ValueError(
                f"filter: {file} does not say which model and block length it is for; force=True to use it"
            )
        about = about or {}
        size = _size(tensors, file)
        if about.get("block_length", size) != size:
            raise ValueError(f"filter: {file} says block_length {about['block_length']}, its tensors {size}")
        made = cls(
            size,
            confidence_of_decided=about.get("confidence_of_decided", "model"),
            threshold=about.get("threshold"),
            ids=about.get("ids"),
            cache=about.get("cache"),
            forced=force,
        )
        made.load_state_dict({name: tensors[name].float() for name in _TENSORS})
        return made.eval().requires_grad_(False)


def model_ids(model: LLaDA) -> dict[str, Any]:
    """What a filter remembers of its model."""
    return {"mask_id": model.mask_id, "end_ids": list(model.end_ids), "vocab_size": model.vocab_size}


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    if file.suffix in (".pth", ".pt"):
        return dict(torch.load(file, map_location="cpu", weights_only=True)), None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            metadata = (opened.metadata() or {}).get("dllm_engine")
            stored = list(opened.keys())
            return {name: opened.get_tensor(name) for name in stored}, metadata and json.loads(metadata)
    except SafetensorError as error:
        raise ValueError(f"filter: {file} is not a safetensors file ({error})") from None


def _size(tensors: dict[str, Tensor], file: Path) -> int:
    missing = [name for name in _TENSORS if name not in tensors]
    if missing:
        raise ValueError(f"filter: {file} has no {missing[0]}; a two-layer Learn2PD filter is needed")
    size = tensors["linear1.bias"].shape[0]
    for name in _TENSORS:
        shape = [size, size] if name.endswith("weight") else [size]
        if list(tensors[name].shape) != shape:
            raise ValueError(f"filter: {file}: {name} has shape {list(tensors[name].shape)}, {shape} is needed")
        if not tensors[name].isfinite().all():
            raise ValueError(f"filter: {file}: {name} holds values that are not finite")
    return size

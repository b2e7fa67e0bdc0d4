"""The rows that ``dllm-engine eval --output`` keeps, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dllm_engine._version import __version__
from dllm_engine.evaluate import Row, Setting
from dllm_engine.model import LLaDA
from dllm_engine.options import resolve_backend
from dllm_engine.tasks import Sample
from dllm_engine.tokenizer import has_template


class KeptRows:
    """A file of JSON lines for each setting; without a directory nothing is kept.

    A file's name has a hash of all that decides its rows, timings included: another model, question, setting, batch
    size, machine or backend starts another file.

    Attributes:
        rows: of each setting, those of whole batches that an earlier run left.
    """

    def __init__(
        self,
        directory: Path | None,
        model: LLaDA,
        samples: Sequence[Sample],
        labels: Mapping[Setting, str],
        *,
        batch_size: int,
        chat: bool | None,
    ) -> None:
        self.rows: dict[Setting, list[Row]] = {}
        self._files: dict[Setting, Path] = {}
        if directory is None:
            return
        directory.mkdir(parents=True, exist_ok=True)
        # weights, the model's own filter among them, and what makes ids of prompts and texts of answers
        beside = model.path.iterdir() if model.path else ()
        files = sorted(file for file in beside if file.suffix in (".safetensors", ".json", ".jinja"))
        about = {
            "dllm_engine": __version__,
            "model": str(model.path and model.path.resolve()),
            "files": [_stamp(file) for file in files],
            "machine": [str(model.device), str(model.dtype), torch.get_num_threads()],
            "backend": resolve_backend("auto", model, 0.0),
            "batch_size": batch_size,
            "chat": has_template(model.tokenizer) if chat is None else chat,
            "samples": [asdict(sample) for sample in samples],
        }
        for setting, label in labels.items():
            self._files[setting] = directory / _name(setting, label, about)
            self.rows[setting] = _read(self._files[setting], batch_size, len(samples))

    def add(self, setting: Setting, rows: Sequence[Row]) -> None:
        """Append a batch, in one write."""
        if setting in self._files:
            with self._files[setting].open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows))


def _name(setting: Setting, label: str, about: dict[str, Any]) -> str:
    file = setting.policy.file
    filters = [] if file is None else sorted(Path(file).glob("*.safetensors")) or [Path(file)]  # a directory or a file
    own = {"setting": asdict(setting), "filter": [_stamp(path) for path in filters]}
    digest = hashlib.sha256(json.dumps(about | own, sort_keys=True).encode()).hexdigest()
    slug = re.sub(r"[^\w.=@]+", "-", f"{label}-{setting.cache}-{setting.end_of_text}")[-80:].strip("-")
    return f"{slug}-{digest[:10]}.jsonl"


def _stamp(file: Path) -> list[Any]:
    return [file.name, file.stat().st_size, file.stat().st_mtime_ns]


def _read(file: Path, batch_size: int, total: int) -> list[Row]:
    """Rows of the whole batches in the file; what a killed run left behind them is cut off."""
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []  # bytes: the cut may be within a character
    rows: list[Row] = []
    for line in lines:
        try:
            row = Row(**json.loads(line.decode()))
        except (ValueError, TypeError):
            break
        if row.index != len(rows):
            break
        rows.append(row)
    rows = rows if len(rows) == total else rows[: len(rows) // batch_size * batch_size]
    if file.exists():
        file.write_bytes(b"".join(line + b"\n" for line in lines[: len(rows)]))
    return rows

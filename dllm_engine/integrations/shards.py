"""Answers to a file of prompts as a directory of JSONL files, each written at once: an interrupted run goes on."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

from dllm_engine import checks, jsonl
from dllm_engine.config import read_json
from dllm_engine.samples import COLUMNS, check_columns, read_prompts

SETTINGS_FILE = "settings.json"


class Shards:
    """``output/part-00000000.jsonl``, …: rows of ``prompts`` with `COLUMNS`, named by their first row.

    Attributes:
        rows: of the input.
    """

    def __init__(
        self, prompts: str | Path, output: str | Path, *, rows_per_task: int, seed: int | None, settings: dict[str, Any]
    ) -> None:
        """Reads the input and what there is of the output.

        Args:
            seed: None draws one, or takes that of the output.
            settings: all else that the results depend on, as JSON.

        Raises:
            FileNotFoundError: no ``prompts``.
            ValueError: a bad row in it, or ``output`` holds results of other settings or rows.
        """
        self._prompts, self._output, self._size = Path(prompts), Path(output), rows_per_task
        self.rows = read_prompts(prompts)
        check_columns(self.rows, str(prompts))
        self._settings = self._settle(seed, {"rows_per_task": rows_per_task} | settings)
        firsts = range(0, len(self.rows), rows_per_task)
        if more := {*self._output.glob("part-*.jsonl")} - {*map(self._file, firsts)}:
            raise ValueError(f"output: {min(more)} holds answers to more rows than the {len(self.rows)} of {prompts}")
        self._missing = [first for first in firsts if not self._is_done(first)]
        self._output.mkdir(parents=True, exist_ok=True)  # what is no directory must not show after the decoding
        self._arrived: dict[int, dict[int, dict[str, Any]]] = defaultdict(dict)

    @property
    def seed(self) -> int:
        """Of the first row; the others' follow."""
        return int(self._settings["seed"])

    def missing(self) -> list[range]:
        """Row numbers of the files that are not there yet."""
        return [range(first, first + len(self._part(first))) for first in self._missing]

    def add(self, index: int, columns: dict[str, Any]) -> None:
        """The `COLUMNS` of a row; the last one of a file writes it."""
        first = index - index % self._size
        part, arrived = self._part(first), self._arrived[first]
        arrived[index - first] = columns
        if len(arrived) < len(part):
            return
        if not (settings := self._output / SETTINGS_FILE).exists():  # not before there is something that it describes
            _write(settings, json.dumps(self._settings, indent=1) + "\n")
        lines = (json.dumps(row | arrived[i], ensure_ascii=False) + "\n" for i, row in enumerate(part))
        _write(self._file(first), "".join(lines))
        del self._arrived[first]

    def _file(self, first: int) -> Path:
        return self._output / f"part-{first:08}.jsonl"

    def _part(self, first: int) -> list[dict[str, Any]]:
        return self.rows[first : first + self._size]

    def _is_done(self, first: int) -> bool:
        """Whether the file is there; it holds fewer rows than now belong to it after the input has grown."""
        file, part = self._file(first), self._part(first)
        if not file.exists():
            return False
        held = [row for _, row in jsonl.read(file)]
        asked = [{name: row[name] for name in row if name not in COLUMNS} for row in held]
        if asked != part[: len(asked)]:
            raise ValueError(
                f"output: {file} holds answers to other rows than {self._prompts}, rows {first} to"
                f" {first + len(part) - 1}; give each input file a directory of its own"
            )
        return len(held) == len(part)

    def _settle(self, seed: int | None, settings: dict[str, Any]) -> dict[str, Any]:
        """The settings with their seed, compared with those of the directory if it has some."""
        file = self._output / SETTINGS_FILE
        if not file.exists():
            if any(self._output.glob("part-*.jsonl")):
                raise ValueError(
                    f"output: {self._output} holds part-*.jsonl, but no {SETTINGS_FILE} that tells how made"
                )
            return {"seed": checks.check_seeds(seed, 1)[0]} | settings
        held = read_json(file)
        if not isinstance(held.get("seed"), int):
            raise ValueError(f"{file}: no seed in it; it tells how the files beside it were made")
        given = {"seed": held["seed"] if seed is None else seed} | settings
        for name in held | given:
            if held.get(name) != given.get(name):
                raise ValueError(
                    f"{name}: {given.get(name)!r} given; {self._output} was begun with {held.get(name)!r}."
                    " Give that, or another output directory"
                )
        return given


def _write(file: Path, text: str) -> None:
    new = file.with_suffix(".new")
    with open(new, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())  # or a power cut may leave the name without the text
    new.replace(file)

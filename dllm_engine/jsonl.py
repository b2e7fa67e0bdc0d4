"""JSON lines."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any


def read(file: str | Path, limit: int | None = None) -> list[tuple[str, dict[str, Any]]]:
    """The first ``limit`` objects of a file ("-": of stdin), each with where it stands: "name, line 7".

    Raises:
        FileNotFoundError: no such file.
        ValueError: a directory, a closed stdin, no row, or one that is no object; says where.
    """
    name = "stdin" if file == "-" else str(file)
    if Path(file).is_dir():
        raise ValueError(f"{name}: a directory given; a file of JSON lines is needed")
    if file == "-" and sys.stdin is None:
        raise ValueError("stdin: closed; rows are needed")
    stop = None if limit is None else min(limit, sys.maxsize)
    with contextlib.nullcontext(sys.stdin) if file == "-" else open(file, encoding="utf-8") as lines:
        rows = list(islice(_objects(lines, name), stop))
    if not rows:
        raise ValueError(f"{name}: no row in it")
    return rows


def _objects(lines: Iterable[str], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        for number, line in enumerate(lines, 1):
            text = line.removeprefix("\ufeff") if number == 1 else line  # a byte-order mark
            where = f"{name}, line {number}"
            if not text.strip():
                continue
            try:
                row = json.loads(text, parse_float=_finite, parse_constant=_finite)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: not JSON ({error})") from None
            if "\\u" in text and not _encodes(row):
                raise ValueError(f"{where}: half of a surrogate pair, which no file can hold")
            if not isinstance(row, dict):
                raise ValueError(f"{where}: a {type(row).__name__} given; an object is needed")
            yield where, row
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 ({error})") from None


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} given; a finite number is needed")  # JSON could not say it in an answer
    return number


def _encodes(row: Any) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True

"""JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any


def _encodes(row: Any) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def numbered(lines: Iterable[str], name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """JSON objects of the lines that are not empty, with their line numbers.

    Raises:
        ValueError: another line; says where.
    """
    try:
        for number, line in enumerate(lines, 1):
            text = line.removeprefix("\ufeff") if number == 1 else line  # a byte-order mark
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{name}, line {number}: not JSON ({error})") from None
            if "\\u" in text and not _encodes(row):
                raise ValueError(f"{name}, line {number}: half of a surrogate pair, which no file can hold")
            if not isinstance(row, dict):
                raise ValueError(f"{name}, line {number}: a {type(row).__name__} given; an object is needed")
            yield number, row
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 ({error})") from None

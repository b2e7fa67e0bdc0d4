"""Questions from files: rows of prompts, plain rows with an answer, and ParallelBench's published files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm_engine import jsonl, published, tasks
from dllm_engine.tokenizer import is_chat

if TYPE_CHECKING:
    from dllm_engine.model import LLaDA

EXACT = "exact match"  # the task of plain rows; a chat stands in the sample's about["messages"]
COLUMNS = ("text", "generated_tokens", "forward_passes", "tokens_per_forward", "seed")  # what decoding adds to a row


def is_right(sample: tasks.Sample, text: str) -> bool:
    """By the task's own scorer; of an `EXACT` sample the stripped text must be the stripped answer."""
    if "metric" in sample.about:
        return published.score(sample, text)
    return text.strip() == sample.answer.strip() if sample.task == EXACT else tasks.score(sample, text)


def longest_answer(model: LLaDA, samples: Sequence[tasks.Sample]) -> int:
    """Tokens of the longest answer, without its end token."""
    return max(len(model.tokenizer(sample.answer, add_special_tokens=False)["input_ids"]) for sample in samples)


def canvas_for(model: LLaDA, samples: Sequence[tasks.Sample], block_length: int = 32) -> int:
    """Smallest multiple of the block length that fits the longest answer and its end token."""
    return block_length * (longest_answer(model, samples) // block_length + 1)


def read_prompts(file: str | Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Rows ``{"prompt": str}`` or ``{"messages": [{"role", "content"}, …]}``, each with whatever else it holds; the
    first ``limit`` of the file ("-": of stdin).

    Raises:
        FileNotFoundError: no such file. ValueError: no row, or another one; says where.
    """
    return [_with_prompt(row, where) for where, row in jsonl.read(file, limit)]


def check_columns(rows: Iterable[dict[str, Any]], name: str) -> None:
    """A row of ``name`` that holds one of `COLUMNS` raises ValueError."""
    for i, row in enumerate(rows):
        if taken := [column for column in COLUMNS if column in row]:
            raise ValueError(f"{name}, row {i}: has a field {taken[0]!r} already, which decoding adds; rename it")


def read_samples(file: Path, limit: int | None = None) -> list[tasks.Sample]:
    """Samples of plain rows (a prompt and an "answer") or of a published file ("input" instead), the first ``limit``.

    Raises:
        FileNotFoundError: no such file. ValueError: names file and line of what cannot be read.
    """
    samples = []
    for where, row in jsonl.read(file, limit):
        is_published = "input" in row and not {"prompt", "messages"} & row.keys()
        samples.append(_published(row, file, where) if is_published else _plain(row, where))
    return samples


def read_parallelbench(file: Path, limit: int | None = None) -> list[tasks.Sample]:
    """Samples of a published file.

    Raises:
        FileNotFoundError: no such file. ValueError: names file and line of what cannot be read.
    """
    tasks.task_of_file(file)
    return [_published(row, file, where) for where, row in jsonl.read(file, limit)]


def _published(row: dict[str, Any], file: Path, where: str) -> tasks.Sample:
    try:
        return tasks.from_parallelbench(row, tasks.task_of_file(file))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _plain(row: dict[str, Any], where: str) -> tasks.Sample:
    row = _with_prompt(row, where)
    if not isinstance(row.get("answer"), str):
        found = f'"answer" is {row["answer"]!r}' if "answer" in row else 'no "answer"'
        raise ValueError(f"{where}: {found}: a text that the model's must equal is needed")
    messages = row.get("messages")
    about = {"messages": messages} if messages else {}
    return tasks.Sample(EXACT, messages[-1]["content"] if messages else row["prompt"], row["answer"], about)


def _with_prompt(row: dict[str, Any], where: str) -> dict[str, Any]:
    if "messages" in row:
        valid = is_chat(row["messages"])
    else:
        valid = isinstance(row.get("prompt"), str)
    if not valid:
        raise ValueError(f'{where}: {{"prompt": str}} or {{"messages": [{{"role", "content"}}, …]}} is needed')
    return row

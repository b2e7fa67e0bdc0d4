"""A JSONL file of prompts decoded on Ray into a directory, resumable."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm_engine import checks, weights
from dllm_engine.integrations.ray import INDEX, absolute, checked, decode_dataset, import_ray
from dllm_engine.integrations.shards import Shards
from dllm_engine.options import DEFAULTS
from dllm_engine.policy_text import PolicyText
from dllm_engine.samples import COLUMNS


@dataclass(frozen=True)
class Report:
    """What `decode_file` did: ``decoded`` of ``rows`` rows, their tokens and passes, all its seconds."""

    rows: int
    decoded: int = 0
    generated_tokens: int = 0
    forward_passes: int = 0
    seconds: float = 0.0


def decode_file(
    prompts: str | Path,
    output: str | Path,
    *,
    model: str | Path | None = None,
    workers: int = 1,
    batch_size: int = 8,
    rows_per_task: int = 64,
    seed: int | None = None,
    chat: bool | None = None,
    device: str | None = None,
    dtype: str | None = None,
    cpus_per_worker: float = 1,
    gpus_per_worker: float | None = None,
    address: str | None = None,
    progress: bool = False,
    **options: Any,
) -> Report:
    """Decode a JSONL file into ``output/part-*.jsonl``, which follow each other in the order of the input.

    Rows are ``{"prompt": str}`` or ``{"messages": […]}`` with any other fields, which are kept; `COLUMNS` are added.
    A file of ``rows_per_task`` rows appears at once when all of them are decoded. The same call again decodes what is
    missing; the driver, the only process that touches ``output``, may be killed at any time.

    Args:
        seed: None draws one, and a later run in the same directory takes that of the first.
        address: of the Ray cluster; None is the running one, else a local one. Unused if Ray is connected already.
        progress: draw a bar.
        others: as for `decode_dataset`; policies and caches as text. A later run may change ``workers``,
            ``batch_size`` and what a worker gets, nothing else.

    Raises:
        FileNotFoundError: no such file. ImportError, TypeError: as for `decode_dataset`.
        ValueError: also for a bad row of the file, and if ``output`` holds results of other settings, other rows or
            another checkpoint or filter (of a directory, by its files).
        RuntimeError: what failed in a worker: the model does not load, a row is too long.
    """
    ray = import_ray()
    from tqdm import tqdm

    began = time.perf_counter()
    checks.check_counts(workers=workers, batch_size=batch_size, rows_per_task=rows_per_task)
    options |= checked(options)  # a filter's file by its whole path, as the model's
    model = absolute(model)
    how: dict[str, Any] = {"chat": chat, "device": device, "dtype": dtype, **options}
    directory = None if model is None else weights.local(model)
    files = None if directory is None else weights.digest(directory)
    held = {"model": model, "model_files": files, "rows_per_task": rows_per_task, **dict.fromkeys(DEFAULTS), **how}
    if isinstance(options.get("policy"), str) and (own := PolicyText.parse(options["policy"]).file) is not None:
        held["filter_files"] = weights.digest(Path(own))
    if unwritable := [name for name, value in held.items() if not isinstance(value, str | int | float | None)]:
        raise TypeError(f"{unwritable[0]}: {held[unwritable[0]]!r} given; text is needed, a later run compares it")
    shards = Shards(prompts, output, rows_per_task=rows_per_task, seed=seed, settings=held)
    missing, total = shards.missing(), len(shards.rows)
    if not missing:
        return Report(total)
    if not ray.is_initialized():
        ray.init(address=address, logging_level="warning", log_to_driver=False)
    ds = ray.data.from_arrow([_table(shards.rows, part) for part in missing])
    ds.context.enable_progress_bars = False
    ds = decode_dataset(
        ds,
        model=model,
        workers=workers,
        batch_size=batch_size,
        rows_per_task=rows_per_task,
        seed=shards.seed,
        cpus_per_worker=cpus_per_worker,
        gpus_per_worker=gpus_per_worker,
        **how,
    )
    tokens, passes, todo = 0, 0, sum(map(len, missing))
    bar = tqdm(total=total, initial=total - todo, disable=None if progress else True, unit="row")
    with bar, _plainly(ray):
        for row in ds.iter_rows():
            shards.add(row[INDEX], {name: row[name] for name in COLUMNS})
            tokens, passes = tokens + row["generated_tokens"], passes + row["forward_passes"]
            bar.update()
    return Report(total, todo, tokens, passes, time.perf_counter() - began)


def _table(rows: Sequence[dict[str, Any]], part: range) -> Any:
    """Messages as text: Arrow has no type for all that a chat template may look at."""
    import pyarrow

    schema = pyarrow.schema({INDEX: pyarrow.int64(), "prompt": pyarrow.string(), "messages": pyarrow.string()})
    messages = [json.dumps(rows[i]["messages"]) if "messages" in rows[i] else None for i in part]
    prompts = [None if message else rows[i]["prompt"] for i, message in zip(part, messages, strict=True)]
    return pyarrow.table({INDEX: list(part), "prompt": prompts, "messages": messages}, schema)


@contextmanager
def _plainly(ray: Any) -> Iterator[None]:
    """A worker's error as a RuntimeError in its own words; Ray logs pages of stacks, and its plan."""
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except ray.exceptions.RayError as error:
        own = str(error).partition("\nThe above exception was the direct cause")[0]  # the rest is Ray's
        causes = re.findall(r"^[\w.]*(?:Error|Exception): .*", own, re.MULTILINE)
        raise RuntimeError(f"a worker failed: {causes[-1] if causes else error}") from error
    finally:
        logger.setLevel(level)

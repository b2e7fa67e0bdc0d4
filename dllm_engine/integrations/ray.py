"""Batch decoding with Ray Data: a pool of actors, each with one model and its engine, on one machine or many."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dllm_engine import built_in, checks, inputs, weights
from dllm_engine.engine import Engine
from dllm_engine.options import DEFAULTS, default
from dllm_engine.policy_text import PolicyText
from dllm_engine.refresh import Cache
from dllm_engine.samples import COLUMNS
from dllm_engine.tokenizer import answer_text, encode_prompt

INDEX = "index"


def decode_dataset(
    ds: Any,
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
    **options: Any,
) -> Any:
    """The Ray dataset with five more columns: ``text``, ``generated_tokens``, ``forward_passes`` (ints),
    ``tokens_per_forward`` (float) and ``seed`` (int). Lazy, as Ray datasets are; the order of rows is Ray's.

    A row's seed is ``seed`` plus its ``index``, so its text depends neither on workers and batches nor on retries of
    work that was lost with a machine.

    Args:
        ds: has a column ``prompt`` (texts) or ``messages`` (lists of {"role", "content"}, or their JSON text) or both,
            and ``index`` (distinct ints ≥ 0).
        model: directory that every machine sees, or hub id; None is the built-in model.
        workers: actors, each with a model of its own. batch_size: prompts at once in one.
        rows_per_task: rows that an actor takes at a time, and loses if it dies.
        seed: None draws one.
        chat: put prompts through the chat template; by default where the model has one. Messages always are.
        device, dtype: as for `LLaDA.from_pretrained`; for the built-in model float32.
        cpus_per_worker: also its threads. What reads ``ds`` needs a CPU that no worker holds, or Ray waits for ever.
        gpus_per_worker: by default 1 where the cluster has GPUs and ``device`` is not "cpu".
        options: those of `Engine.generate_many`: ``gen_length``, ``policy`` (an object, or text as the command line
            takes it), ``cache``, …; what is left out is as for `decode`.

    Raises:
        ImportError: no Ray. TypeError, ValueError: a bad argument, or columns that are missing or in the way.
        Errors of rows (too long, no prompt) and of loading the model are raised where the dataset is executed.
    """
    ray = import_ray()
    checks.check_counts(workers=workers, batch_size=batch_size, rows_per_task=rows_per_task)
    options = checked(options)
    columns = ds.columns() or []
    if not {"prompt", "messages"} & {*columns}:
        raise ValueError(f'ds: columns {columns} given; "prompt" or "messages" is needed')
    if taken := [name for name in COLUMNS if name in columns]:
        raise ValueError(f"ds: has a column {taken[0]!r} already, which decoding adds; rename it")
    if INDEX not in columns:  # Ray does not number rows: their order is not its own to keep
        raise ValueError(
            f"ds: columns {columns} given; {INDEX!r} is needed, for the seeds: a number of each row, as in"
            " ray.data.from_items([{'index': i, **row} for i, row in enumerate(rows)])"
        )
    if gpus_per_worker is None:
        gpus_per_worker = float(device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0)
    return ds.map_batches(
        _Worker,
        fn_constructor_kwargs={
            "model": absolute(model),
            "batch_size": batch_size,
            "seed": checks.check_seeds(seed, 1)[0],
            "chat": chat,
            "device": device,
            "dtype": dtype,
            "options": options,
        },
        batch_size=rows_per_task,
        batch_format="pyarrow",
        # an actor has its next task at hand, and not the ones that others could do meanwhile
        compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=2),
        num_cpus=cpus_per_worker,
        num_gpus=gpus_per_worker,
        udf_modifying_row_count=False,
    )


class _Worker:
    """What an actor holds; called with a table of rows, gives it back with `COLUMNS`."""

    def __init__(
        self,
        model: str | Path | None,
        batch_size: int,
        seed: int,
        chat: bool | None,
        device: str | None,
        dtype: str | None,
        options: dict[str, Any],
    ) -> None:
        self._model = built_in.load(model, device, dtype)
        options = {"gen_length": default(self._model, "gen_length")} | options
        self._options, self._batch_size, self._seed, self._chat = options, batch_size, seed, chat
        self._engine: Engine | None = None

    def __call__(self, table: Any) -> Any:
        import pyarrow

        rows = table.to_pylist()
        for row in rows:
            if not isinstance(row[INDEX], int) or row[INDEX] < 0:
                raise ValueError(f"{INDEX}: {row[INDEX]!r} given; a number of each row, an int ≥ 0, is needed")
        gen_length = self._options["gen_length"]
        longest = self._model.config.max_sequence_length - gen_length
        prompts = [inputs.check_one(self._model, self._encode(row), row[INDEX], longest) for row in rows]
        length = max(map(len, prompts)) + gen_length
        if self._engine is None or self._engine.max_length < length:
            if self._engine is not None:
                self._engine.close()  # before its successor takes memory
            self._engine = Engine(self._model, max_batch=self._batch_size, max_length=length)
        added: list[tuple[Any, ...]] = [()] * len(rows)
        seeds = [self._seed + row[INDEX] for row in rows]
        for one in self._engine.generate_many(prompts, seed=seeds, **self._options):
            text = answer_text(self._model, one.generated.tolist())
            rate = round(one.tokens_per_forward, 3)
            added[one.index] = (text, one.generated_tokens, one.passes, rate, one.seed)
        types = (pyarrow.string(), pyarrow.int64(), pyarrow.int64(), pyarrow.float64(), pyarrow.int64())
        for name, type_, values in zip(COLUMNS, types, zip(*added, strict=True), strict=True):
            table = table.append_column(name, pyarrow.array(values, type_))
        return table

    def _encode(self, row: dict[str, Any]) -> list[int]:
        prompt, messages = row.get("prompt"), row.get("messages")
        try:
            if messages:
                prompt = json.loads(messages) if isinstance(messages, str) else messages
                if not isinstance(prompt, list):
                    raise ValueError(f"messages: {prompt!r} given; a list is needed")
            elif not isinstance(prompt, str):
                raise ValueError(f'prompt: {prompt!r} given, and no "messages"; a text is needed')
            return encode_prompt(self._model.tokenizer, prompt, chat=self._chat)
        except ValueError as error:
            raise ValueError(f"row {row[INDEX]}: {error}") from None


def absolute(model: str | Path | None) -> str | None:
    """A directory's full path, for a worker may run elsewhere; else a hub id.

    Raises:
        ValueError, FileNotFoundError: neither.
    """
    if model is None:
        return None
    directory = weights.local(model, "model")
    return str(model) if directory is None else str(directory.resolve())


def checked(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a decode that were given, as far as they can be checked without the model; None is left out."""
    if unknown := [name for name in options if name not in DEFAULTS]:
        raise TypeError(f"options: {unknown[0]!r} given; known: {', '.join(DEFAULTS)}")
    given = {name: value for name, value in options.items() if value is not None}
    every = DEFAULTS | given
    checks.check_options(**{name: every[name] for name in ("end_of_text", "temperature", "cfg_scale")})
    Cache.of(every["cache"])
    if isinstance(every["policy"], str):
        text = PolicyText.parse(every["policy"])
        if "gen_length" in given:  # else the model may have its own
            text.steps(given["gen_length"], given.get("steps"), block_length=given.get("block_length"))
        if text.file is not None:  # the worker runs elsewhere
            threshold = "" if text.value is None else f"@{text.value}"
            given["policy"] = f"learn2pd={Path(text.file).resolve()}{threshold}"
    return given


def import_ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError(f'batch decoding on Ray needs Ray Data ({error}): pip install "dllm-engine[ray]"') from None
    return ray

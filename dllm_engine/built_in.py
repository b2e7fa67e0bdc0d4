"""The model in the package."""

from __future__ import annotations

from pathlib import Path

from dllm_engine import tasks
from dllm_engine.config import read_json
from dllm_engine.model import LLaDA

DEMO_MODEL = Path(__file__).parent / "demo_model"


def load(model: str | Path | None = None, device: str | None = None, dtype: str | None = None) -> LLaDA:
    """`LLaDA.from_pretrained`; without ``model`` the built-in one, then in float32 where no dtype is given: many CPUs
    emulate bfloat16.
    """
    if model is None:
        return LLaDA.from_pretrained(DEMO_MODEL, device=device, dtype=dtype or "float32")
    return LLaDA.from_pretrained(model, device=device, dtype=dtype)


def trained_tasks(model: LLaDA) -> list[str]:
    """Tasks of which a model trained here answered at least half, from the ``accuracy.json`` beside it.

    Raises:
        ValueError: there is no such file, so the model does not know the template of `tasks`, or it cannot be read.
    """
    file = model.path / "accuracy.json" if model.path else None
    if file is None or not file.exists():
        raise ValueError(
            f"model: {model.path} has no accuracy.json that tells which of our tasks it learned; a model trained by"
            " benchmarks/train_demo.py has one"
        )
    accuracy = read_json(file).get("accuracy")
    if not isinstance(accuracy, dict):
        raise ValueError(f'{file}: no "accuracy": the share of right answers by task is needed')
    return [task for task in tasks.names() if accuracy.get(task, 0.0) >= 0.5]

"""A directory of answers: what is in it, what it was made with, what is missing."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dllm_engine import LearnedFilter, policies, tasks
from dllm_engine.built_in import DEMO_MODEL
from dllm_engine.integrations import ray_file
from dllm_engine.integrations.ray_file import decode_file
from dllm_engine.integrations.shards import COLUMNS, Shards


def some_rows(count: int) -> list[dict[str, Any]]:
    """Prompts and messages in turn, with other fields that must survive."""
    rng, rows = random.Random(7), []
    for i in range(count):
        text = tasks.generate("reverse", rng).prompt
        content = {"messages": [{"role": "user", "content": text}]} if i % 3 == 2 else {"prompt": text}
        rows.append({"id": f"row {i}", **content, "more": {"nested": [i, None, "é"]}})
    return rows


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def read(output: Path) -> list[dict[str, Any]]:
    """What ``cat part-*.jsonl`` shows."""
    return [json.loads(line) for file in sorted(output.glob("part-*.jsonl")) for line in open(file, encoding="utf-8")]


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The settings that a later run would compare, of each call of `decode_file`, which ends there."""
    found: list[dict[str, Any]] = []

    def shards(*where: Any, settings: dict[str, Any], **how: Any) -> Any:
        found.append(settings)
        raise InterruptedError

    monkeypatch.setattr(ray_file, "import_ray", lambda: None)
    monkeypatch.setattr(ray_file, "Shards", shards)
    return found


def test_a_filters_file_is_the_same_from_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: list[dict[str, Any]]
) -> None:
    """What a later run compares is its whole path."""
    LearnedFilter().save_pretrained(tmp_path / "net.safetensors")
    monkeypatch.chdir(tmp_path)
    for text in ("learn2pd=net.safetensors@0.9", f"learn2pd={tmp_path}/net.safetensors@0.9", "topk=4"):
        with pytest.raises(InterruptedError):
            decode_file("rows.jsonl", "out", policy=text)
    assert [settings["policy"] for settings in held] == [f"learn2pd={tmp_path}/net.safetensors@0.9"] * 2 + ["topk=4"]


def test_another_filter_in_the_same_place_is_noticed(tmp_path: Path, held: list[dict[str, Any]]) -> None:
    def look(policy: str) -> str | None:
        with pytest.raises(InterruptedError):
            decode_file("rows.jsonl", "out", policy=policy)
        return held[-1].get("filter_files")

    net = LearnedFilter()
    net.save_pretrained(tmp_path / "filter.safetensors")
    before = look(f"learn2pd={tmp_path}/filter.safetensors@0.9"), look(f"learn2pd={tmp_path}")
    assert look(f"learn2pd={tmp_path}/filter.safetensors@0.8") == before[0]
    with torch.no_grad():
        next(net.parameters()).add_(1)
    net.save_pretrained(tmp_path / "filter.safetensors")
    after = look(f"learn2pd={tmp_path}/filter.safetensors@0.9"), look(f"learn2pd={tmp_path}")
    assert not {*before} & {*after}
    assert look("learn2pd") is look("topk=4") is None


def test_another_checkpoint_in_the_same_place_is_noticed(tmp_path: Path, held: list[dict[str, Any]]) -> None:
    def look(model: str | Path | None) -> str | None:
        with pytest.raises(InterruptedError):
            decode_file("rows.jsonl", "out", model=model)
        return held[-1]["model_files"]

    one, other = tmp_path / "one", tmp_path / "other"
    for place in (one, other):
        shutil.copytree(DEMO_MODEL, place)
    assert look(one) == look(other)
    (other / "notes.md").write_text("not read")
    assert look(one) == look(other)
    weights = bytearray((other / "model.safetensors").read_bytes())
    middle = len(weights) // 2
    weights[middle:] = bytes(byte ^ 1 for byte in weights[middle:])
    (other / "model.safetensors").write_bytes(weights)
    assert look(one) != look(other)
    (one / "generation_config.json").write_text('{"temperature": 0.5}')
    assert look(one) not in [settings["model_files"] for settings in held[:-1]]
    assert look(None) is look("owner/name") is None


def test_shards_hold_the_rows_in_order_and_know_what_is_missing(tmp_path: Path) -> None:
    rows = some_rows(10)
    file, output = write(tmp_path / "rows.jsonl", rows), tmp_path / "out"

    def shards(seed: int | None = None, **changes: Any) -> Shards:
        return Shards(file, output, rows_per_task=4, seed=seed, settings={"gen_length": 32} | changes)

    def added(index: int) -> dict[str, Any]:
        return dict.fromkeys(COLUMNS, index)

    first = shards(seed=9)
    assert first.missing() == [range(4), range(4, 8), range(8, 10)]
    for index in (9, 5, 4, 8, 7, 0):
        first.add(index, added(index))
    assert [file.name for file in sorted(output.iterdir())] == ["part-00000008.jsonl", "settings.json"]
    first.add(6, added(6))
    again = shards()
    assert (again.missing(), again.seed) == ([range(4)], 9)
    for index in range(4):
        again.add(index, added(index))
    assert shards().missing() == []
    assert read(output) == [row | added(i) for i, row in enumerate(rows)]

    write(file, [*rows, *some_rows(3)])  # a file that has grown: its last part is done again
    assert shards().missing() == [range(8, 12), range(12, 13)]
    for changes, message in (
        ({"seed": 8}, f"seed: 8 given; {output} was begun with 9"),
        ({"gen_length": 64}, f"gen_length: 64 given; {output} was begun with 32"),
        ({"cache": "none"}, f"cache: 'none' given; {output} was begun with None"),
    ):
        with pytest.raises(ValueError, match=message):
            shards(**changes)
    write(file, [*rows[:5], {**rows[5], "id": "another"}, *rows[6:]])
    with pytest.raises(ValueError, match=r"part-00000004.jsonl holds answers to other rows than .*, rows 4 to 7"):
        shards()
    write(file, [rows[0], rows[1] | {"text": "?"}])
    with pytest.raises(ValueError, match="row 1: has a field 'text' already, which decoding adds"):
        shards()
    write(file, rows[:8])
    with pytest.raises(ValueError, match="part-00000008.jsonl holds answers to more rows than the 8 of"):
        shards()
    write(file, rows)
    for text, message in (("{}", "no seed in it"), ("[]", "holds a list"), ('{"seed"', "is not valid JSON")):
        (output / "settings.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=rf"settings\.json:? {message}"):
            shards()
    (output / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"holds part-\*.jsonl, but no settings.json"):
        shards()


def test_a_part_is_complete_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, output = some_rows(4), tmp_path / "out"
    shards = Shards(write(tmp_path / "rows.jsonl", rows), output, rows_per_task=2, seed=0, settings={})
    for index in range(3):
        shards.add(index, dict.fromkeys(COLUMNS, 0))
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        shards.add(3, dict.fromkeys(COLUMNS, 0))
    assert read(output) == [row | dict.fromkeys(COLUMNS, 0) for row in rows[:2]]


def test_an_output_that_is_no_directory_is_told_before_the_work(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", some_rows(2))
    (tmp_path / "out").write_text("")
    with pytest.raises(FileExistsError, match="out"):
        Shards(file, tmp_path / "out", rows_per_task=4, seed=0, settings={})


def test_the_function_says_what_a_file_of_settings_cannot_hold(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", some_rows(2))
    with pytest.raises(TypeError, match="policy: .* given; text is needed"):
        decode_file(file, tmp_path / "out", policy=policies.Threshold(0.8))
    with pytest.raises(TypeError, match="options: 'gen_lenght' given; known: gen_length, "):
        decode_file(file, tmp_path / "out", gen_lenght=32)

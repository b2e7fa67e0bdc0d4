"""Published benchmarks with their own prompts, for real checkpoints: ParallelBench's lists and puzzles, and GSM8K.

The demo model has its own template (`tasks.from_parallelbench`); here a question is the chat that the benchmark
publishes, its worked example included, and a scorer reads the answer out of whatever the model says around it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from dllm_engine import jsonl
from dllm_engine.tasks import Sample, grids, lists

BENCHMARKS = ("parallelbench", "gsm8k")
GSM8K_LENGTH = 256  # tokens of a canvas: the working is the model's own, so the gold answer does not tell
_GSM8K_PROMPT = '{question}\nThink step by step and end with "The answer is" and the number.'
_CONFIG = "task_config.yaml"


def score(sample: Sample, text: str) -> bool:
    """Whether ``text`` answers a sample of this module, by the scorer that ``about["metric"]`` names."""
    return _SCORERS[sample.about["metric"]](text, sample.about)


def read(benchmark: str, paths: Sequence[Path], limit: int | None = None) -> tuple[list[Sample], list[str]]:
    """Samples of a benchmark, the first ``limit`` of each file, and what was left out and why, a line each.

    Args:
        benchmark: a name of `BENCHMARKS`.
        paths: of ParallelBench, directories (searched for task_config.yaml) or JSON lines beside such a file; of GSM8K,
            files of JSON lines.

    Raises:
        ValueError: unknown benchmark, nothing to ask, or a malformed row, with file and line.
        FileNotFoundError: a path that does not exist.
    """
    if benchmark not in BENCHMARKS:
        raise ValueError(f"--benchmark: {benchmark!r} given; known: {', '.join(BENCHMARKS)}")
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or directory")
    samples: list[Sample] = []
    left_out: list[str] = []
    if benchmark == "gsm8k":
        for path in paths:
            samples += [_gsm8k(row, where) for where, row in jsonl.read(path, limit)]
        return samples, left_out
    for task, config, file in _tasks(paths, left_out):
        samples += [_parallelbench(task, config, row, where) for where, row in jsonl.read(file, limit)]
    if not samples:
        raise ValueError(f"{', '.join(map(str, paths))}: no task that can be scored here: {'; '.join(left_out)}")
    return samples, left_out


# -- ParallelBench: prompts -------------------------------------------------------------------------------------------


def _tasks(paths: Sequence[Path], left_out: list[str]) -> Iterator[tuple[str, dict[str, Any], Path]]:
    """Name, configuration and file of the tasks that can be scored; tells of the others."""
    for path in paths:
        found = sorted(path.rglob(_CONFIG)) if path.is_dir() else [path.parent / _CONFIG]
        if not found or not found[0].exists():
            raise ValueError(f"{path}: no {_CONFIG} there; ParallelBench's prompts are in it")
        for file in found:
            entries = _config(file)
            known = {file.parent / (name.rpartition("/")[2] + ".jsonl"): name for name in entries}
            files = sorted(file.parent.glob("*.jsonl")) if path.is_dir() else [path]
            left_out += [f"{rows.name}: {file} has no prompt for it" for rows in files if rows not in known]
            for rows, name in known.items():
                metric = str(entries[name].get("metric"))
                if not path.is_dir() and rows != path:
                    continue
                if metric not in _SCORERS or metric == "gsm8k":
                    left_out.append(f"{name}: its scorer {metric!r} is not here (it needs more than the answer's text)")
                elif not rows.exists():
                    left_out.append(f"{name}: {rows.name} is not there")
                else:
                    yield name, entries[name], rows


def _config(file: Path) -> dict[str, dict[str, Any]]:
    import yaml  # comes with transformers and huggingface_hub

    try:
        read = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not YAML ({error})") from None
    entries = read.items() if isinstance(read, dict) else ()
    if not entries or not all(isinstance(v, dict) and isinstance(v.get("prompt"), str) for _, v in entries):
        raise ValueError(f'{file}: tasks with a "prompt" and a "metric" are needed')
    return {str(name): entry for name, entry in entries}


def _parallelbench(task: str, config: dict[str, Any], row: dict[str, Any], where: str) -> Sample:
    """The published chat: each worked example as a turn of user and assistant, then the question."""

    def asked(given: dict[str, Any]) -> dict[str, str]:
        # the published prompts hold line breaks as backslash and n where YAML quotes them singly
        return {"role": "user", "content": config["prompt"].format(**given).replace("\\n", "\n")}

    try:
        messages = []
        for example in row["input"].get("icl_examples") or ():
            messages += [asked(example["input"]), {"role": "assistant", "content": _example(example["answer"])}]
        messages.append(asked(row["input"]))
        about = {"metric": config["metric"], **_gold(config["metric"], row["answer"]), "messages": messages}
        return Sample(task, messages[-1]["content"], _example(row["answer"]), about)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{where}: not a published row of {task} ({type(error).__name__}: {error})") from None


def _gold(metric: str, answer: Any) -> dict[str, Any]:
    """What the scorer needs, checked."""
    if metric == "sudoku_score":
        if grids.rows(answer) is None:
            raise ValueError(f"answer: {answer!r} is no solved 4x4 grid")
        return {"solution": answer}
    if metric == "latin_square_score":
        symbols = [str(symbol) for symbol in answer["symbols"]]
        if not symbols or answer.get("first_row") is not None:
            raise ValueError("symbols are needed, a given first row is not known here")
        return {"symbols": symbols}
    if metric == "list_match_score":
        items = json.loads(answer)
        if not lists.are_names(items):
            raise ValueError(f"answer: {answer!r} is no list of texts")
        return {"items": items}
    word = answer.get("word")
    needs_word = metric in ("list_random_insert_score", "list_random_replace_score")
    if not lists.are_names(answer["input"]) or needs_word != isinstance(word, str) or answer.get("n_words", 1) != 1:
        raise ValueError(f"answer: a list of texts{' and one word' * needs_word} are needed")
    return {"items": answer["input"], "word": word}


def _example(answer: Any) -> str:
    """A right answer as the benchmark writes it; only its length matters where it is not an example of the prompt."""
    if isinstance(answer, str):
        return answer
    if isinstance(answer.get("example"), str):
        return str(answer["example"])
    symbols = [str(symbol) for symbol in answer["symbols"]]
    return "\n".join(",".join(symbols[i:] + symbols[:i]) for i in range(len(symbols)))


# -- ParallelBench: strict scorers ------------------------------------------------------------------------------------


def parse_list(text: str) -> list[str] | None:
    """The last bracketed list of ``text``, each item in double quotes, a comma and a space between; None without one.

    Text and Markdown around the list do no harm, an item without quotes does.
    """
    inside = re.fullmatch(r'("[^"]*"(?:, "[^"]*")*)\].*', text.rpartition("[")[2], re.DOTALL) if "[" in text else None
    return re.findall(r'"([^"]*)"', inside[1]) if inside else None


def _list_scorer(task: str | None) -> Callable[[str, dict[str, Any]], bool]:
    def right(text: str, about: dict[str, Any]) -> bool:
        given = parse_list(text)
        if given is None or task is None:
            return given == about["items"]
        return lists.is_answer(task, given, about)

    return right


def _sudoku(text: str, about: dict[str, Any]) -> bool:
    rows = grids.rows(text)
    return rows is not None and rows == grids.rows(about["solution"])


def _latin(text: str, about: dict[str, Any]) -> bool:
    """The first lines that hold each symbol once, as many as symbols, must have each once in every column too."""
    symbols = sorted(about["symbols"])
    lines = [[cell.strip() for cell in line.split(",")] for line in text.split("\n")]
    rows = [cells for cells in lines if sorted(cells) == symbols][: len(symbols)]
    return len(rows) == len(symbols) and all(sorted(column) == symbols for column in zip(*rows, strict=True))


# -- GSM8K ------------------------------------------------------------------------------------------------------------

_NUMBER = r"(?:(?<![\w)])-)?\$?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|(?<!\w)\.\d+)"
# what makes a number the first of several that are still to be computed, units between them or not
_MORE = rf"[)\s]*(?:[a-zA-Z%]+\s*)?(?:[-−+*/×÷^]|(?<![a-zA-Z])x|\\(?:times|cdot|div))[(\s]*{_NUMBER}"


def final_number(text: str) -> Decimal | None:
    """The number that the last "the answer is" (or GSM8K's "####") states, else the last one; None without a number.

    Stated is the first number of the sentence or line, or what its last "=" gives where that is one number: "the answer
    is 10 - 3 = 7" is 7, "18 = 9 * 2" is 18.
    """
    text = re.sub(r"(?<=\d)(?:\{,\}|\\,)(?=\d{3}(?!\d))", ",", text)  # LaTeX between thousands
    _, *stated = re.split(r"the answer is|####", text, flags=re.IGNORECASE)
    sentences = re.split(r"[.!?](?=\s|$)|\n", stated[-1]) if stated else []
    number = next(filter(None, map(_stated, sentences)), None) or (re.findall(_NUMBER, text) or [None])[-1]
    return None if number is None else Decimal(re.sub(r"[,$]", "", number))


def _stated(sentence: str) -> str | None:
    """The number that is alone on its side of "=", the last of several; else the first of the last side."""
    sides = [re.search(f"({_NUMBER})({_MORE})?", side) for side in reversed(sentence.split("="))]
    alone = [side[1] for side in sides if side and not side[2]]
    return alone[0] if alone else sides[0] and sides[0][1]


def _gsm8k(row: dict[str, Any], where: str) -> Sample:
    question, answer = row.get("question"), row.get("answer")
    gold = final_number(answer.rpartition("####")[2]) if isinstance(answer, str) and "####" in answer else None
    if not isinstance(question, str) or gold is None:
        raise ValueError(f'{where}: {{"question": str, "answer": "… #### NUMBER"}} is needed')
    prompt = _GSM8K_PROMPT.format(question=question)
    about = {"metric": "gsm8k", "number": str(gold), "messages": [{"role": "user", "content": prompt}]}
    return Sample("gsm8k", prompt, str(gold), about)


_SCORERS: dict[str, Callable[[str, dict[str, Any]], bool]] = {
    "list_match_score": _list_scorer(None),
    "list_shuffle_score": _list_scorer("shuffle"),
    "list_random_insert_score": _list_scorer("insert_random"),
    "list_random_remove_score": _list_scorer("remove_random"),
    "list_random_replace_score": _list_scorer("replace_random"),
    "sudoku_score": _sudoku,
    "latin_square_score": _latin,
    "gsm8k": lambda text, about: final_number(text) == Decimal(about["number"]),
}

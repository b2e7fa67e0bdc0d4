"""Traces to train a filter on: a model's own decodes, replayed, with what was already right at each step.

Learn2PD (arXiv 2509.25188): decode a prompt one token per step to get the answer; decode it again committing just the
predictions that already equal it (`policies.Oracle`); record what each step saw and which predictions were final.
Both decodes are `decode()` itself, so a filter is trained on the numbers that it will meet.

The published traces visit the oracle's states only. A filter commits less than the oracle, and then meets states that
it never saw: of what one trained so committed on the demo model under 0.9 confidence, 1 % was wrong at the first step,
46 % at the second. So a prompt is replayed several times, more and more cautiously: right predictions under some
confidence are held back.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dllm_engine.checks import check_counts
from dllm_engine.config import read_json
from dllm_engine.decode import decode
from dllm_engine.model import LLaDA
from dllm_engine.policies import Oracle
from dllm_engine.state import BlockState
from dllm_engine.stats import RowStats

INDEX_FILE = "traces.json"
FIELDS = ("log_odds", "margin", "entropy")  # float32; then the booleans and the prompt
FLAGS = ("undecided", "active", "stable", "final")
CAUTION = (0.0, 0.3, 0.5, 0.7, 0.9)  # confidences under which a replay commits nothing; 0 is the oracle


class Recorder(Oracle):
    """The oracle, writing down every step: a decode of it is a trace.

    Args:
        answer: int64 [B, gen_length], see `Oracle`.
        caution: confidence under which nothing is committed beyond one position a step; 0 is the oracle.
        ends_wait: see `Policy`.
    """

    name = "recorder"
    reads_decided = True  # the published filter sees the confidences of decided positions

    def __init__(self, answer: Tensor, block_length: int, caution: float, ends_wait: bool = False) -> None:
        super().__init__(answer)
        self.ends_wait = ends_wait
        self._block_length, self._caution, self._steps = block_length, caution, list[dict[str, Tensor]]()

    def select(self, stats: RowStats, state: BlockState) -> Tensor:
        final, known = super().select(stats, state), state.positions < self._answer.shape[1]
        step = {
            "log_odds": stats.log_odds,
            "margin": stats.logit - stats.second_logit,
            "entropy": stats.entropy,
            "undecided": state.undecided & known,  # of a last block that is cut, nobody knows what is final behind that
            "active": state.active,
            "stable": stats.token == state.predicted,
            "final": final,
        }
        missing = self._block_length - final.shape[1]  # a ragged batch's last blocks
        padded = {name: torch.nn.functional.pad(value, (0, missing)) for name, value in step.items()}
        self._steps.append(padded | {"prompt": state.sequences})
        return final & (stats.confidence >= self._caution)

    def score(self, stats: RowStats, state: BlockState) -> Tensor:
        # the oracle's one guaranteed position is a right one; a cautious replay's is the surest, as any rule's
        return stats.log_odds if self._caution else super().score(stats, state)

    def steps(self) -> dict[str, Tensor]:
        """What was recorded: fields [N, block_length], ``prompt`` int64 [N] (row of the batch)."""
        return {name: torch.cat([step[name] for step in self._steps]).cpu() for name in self._steps[0]}


def collect(
    model: LLaDA,
    prompts: Sequence[Sequence[int]],
    directory: str | Path,
    *,
    gen_length: int,
    block_length: int = 32,
    cache: str = "dual",
    end_of_text: str = "committed",
    ends_wait: bool = True,
    batch_size: int = 32,
    backend: str = "auto",
    progress: bool = True,
) -> dict[str, Tensor]:
    """Record the traces of ``prompts`` (lists of ids) into ``directory``; what is there already is not made again.

    Args:
        ends_wait: whether end ids wait in the replays, see `policies.Policy`; others as for `dllm_engine.decode`.

    Returns:
        Tensors over all steps: `FIELDS` float32 and `FLAGS` bool [N, block_length], ``prompt`` int64 [N].

    Raises:
        TypeError, ValueError: no prompt, or a bad option.
        ValueError: the directory holds traces of another model, prompts or settings, or a file that cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file
    from tqdm import tqdm

    check_counts(gen_length=gen_length, block_length=block_length, batch_size=batch_size)
    if not len(prompts):
        raise ValueError("prompts: none given; at least one is needed")
    folder = Path(directory)
    settings = {
        "gen_length": gen_length, "block_length": block_length, "cache": cache, "end_of_text": end_of_text,
        "batch_size": batch_size,
    }  # fmt: skip
    index = {"format": "dllm-engine traces 4", "caution": list(CAUTION), "ends_wait": ends_wait, "settings": settings}
    index |= {"prompts": len(prompts), "prompts_sha256": _digest(prompts), "model_sha256": fingerprint(model)}
    _check(folder, index)
    shards = []
    for first in tqdm(range(0, len(prompts), batch_size), desc="traces", unit="batch", disable=not progress or None):
        file = folder / f"traces-{first // batch_size:05d}.safetensors"
        if not file.exists():
            batch = [list(p) for p in prompts[first : first + batch_size]]
            options: dict[str, Any] = {**settings, "backend": backend, "seed": 0}
            options |= {"steps": gen_length, "temperature": 0.0, "cfg_scale": 0.0}  # not as generation_config.json says
            del options["batch_size"]
            answer = decode(model, batch, policy="topk", **options).sequences[:, -gen_length:]
            replays = []
            for caution in CAUTION:
                recorder = Recorder(answer, block_length, caution, ends_wait)
                decode(model, batch, policy=recorder, **options)
                replays.append(recorder.steps())
            steps = {name: torch.cat([replay[name] for replay in replays]) for name in replays[0]}
            steps["prompt"] += first
            if not (folder / INDEX_FILE).exists():  # not before there is something that it describes
                (folder / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
            save_file(steps, file.with_suffix(".new"))  # an interruption leaves no half shard
            file.with_suffix(".new").replace(file)
        try:
            shards.append(load_file(file))
        except SafetensorError as error:
            raise ValueError(f"traces: {file} is damaged ({error}); remove it, and it is made again") from None
    return {name: torch.cat([shard[name] for shard in shards]) for name in (*FIELDS, *FLAGS, "prompt")}


def fingerprint(model: LLaDA) -> str:
    """Digest of a model's sizes, ids and weights (of each tensor its sum and its first numbers)."""
    digest = hashlib.sha256(repr(model.config).encode())
    for name, p in model.named_parameters():
        numbers = torch.cat((p.detach().double().sum()[None], p.detach().flatten()[:64].double()))
        digest.update(name.encode() + numbers.cpu().numpy().tobytes())
    return digest.hexdigest()


def _digest(prompts: Sequence[Sequence[int]]) -> str:
    return hashlib.sha256(json.dumps([list(p) for p in prompts]).encode()).hexdigest()


def _check(folder: Path, index: dict[str, Any]) -> None:
    """Make the directory, or see that what it holds has the same index."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / INDEX_FILE
    if not file.exists():
        if any(folder.glob("traces-*.safetensors")):
            raise ValueError(f"traces: {folder} holds traces, but no {INDEX_FILE} that tells how made; remove it")
        return
    held = read_json(file)
    for key, value in index.items():
        if held.get(key) != value:
            how = {"prompts_sha256": "other prompts", "model_sha256": "another model"}.get(key)
            how = how or f"{key} {held.get(key)}, now {value}"
            raise ValueError(f"traces: {file} was made with {how}; give another directory or remove it")

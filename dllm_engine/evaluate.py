"""Evaluation: questions decoded under several settings that take turns, accuracy with its interval, cost and loss."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dllm_engine import policies, tasks
from dllm_engine.decode import DecodeOutput, decode
from dllm_engine.inputs import check_room
from dllm_engine.model import LLaDA
from dllm_engine.options import Options
from dllm_engine.policies import Policy
from dllm_engine.policy_text import PolicyText
from dllm_engine.samples import EXACT, is_right
from dllm_engine.tokenizer import answer_text, encode_each

_Z_ONE_SIDED, _Z_TWO_SIDED = 1.645, 1.96  # 95 %
_NORMAL_FROM = 10  # discordant pairs; with fewer the normal approximation claims too much


@dataclass(frozen=True)
class Setting:
    """One way to decode: ``policy_text`` as in `PolicyText.parse` (``"oracle"`` too), the rest as in `decode`."""

    policy_text: str
    cache: str = "dual"
    end_of_text: str = "auto"
    block_length: int = 32
    gen_length: int = 128
    steps: int | None = None

    @property
    def policy(self) -> PolicyText:
        return PolicyText.parse(self.policy_text, oracle=True)


@dataclass(frozen=True)
class Row:
    """What one prompt cost and gave; ``seconds`` is its equal share of its batch's."""

    index: int
    task: str
    right: bool
    passes: int
    tokens: int
    text: str
    seconds: float


@dataclass
class _Turns:
    """A setting on its way through the batches."""

    setting: Setting
    policy: Policy | str
    rows: list[Row]
    warm: bool = False


def run(model: LLaDA, samples: Sequence[tasks.Sample], setting: Setting, **options: Any) -> list[Row]:
    """One setting; see `run_all`."""
    return run_all(model, samples, [setting], **options)[0]


def run_all(
    model: LLaDA,
    samples: Sequence[tasks.Sample],
    settings: Sequence[Setting],
    *,
    batch_size: int = 16,
    seed: int = 0,
    chat: bool | None = False,
    done: Mapping[Setting, Sequence[Row]] | None = None,
    on_turn: Callable[[Setting], object] | None = None,
    on_batch: Callable[[Setting, list[Row]], object] | None = None,
) -> list[list[Row]]:
    """Rows of each setting, in the order of ``samples``.

    The settings take turns batch by batch, so that a busy machine slows all of them alike; each one's first batch is
    decoded once before without being timed. The oracle's answers (one token per step, same cache and end of text) are
    neither timed nor counted.

    Args:
        seed: sample i is decoded with seed ``seed + i``.
        chat: whether prompts of `EXACT` samples go through the chat template too (None: where there is one); those of
            tasks always do.
        done: rows of whole batches that need not be decoded again.
        on_turn, on_batch: called before a setting decodes a batch, and after it with the new rows.

    Raises:
        ValueError, TypeError: no sample or a bad setting, before the first forward pass.
        RuntimeError: the model gave NaN.
    """
    if not samples or batch_size < 1:
        raise ValueError(f"samples, batch_size: {len(samples)}, {batch_size} given; at least 1 of each is needed")
    asked = ((s.about.get("messages", s.prompt), chat if s.task == EXACT else True) for s in samples)
    prompts = encode_each(model.tokenizer, asked)
    runners = [_Turns(s, checked(model, s, prompts), list((done or {}).get(s, []))) for s in settings]
    for first in range(0, len(samples), batch_size):
        part = slice(first, first + batch_size)
        answers: dict[Setting, Tensor] = {}
        for turn in runners:
            if len(turn.rows) > first:
                continue
            if on_turn is not None:
                on_turn(turn.setting)
            rows = _batch(model, samples[part], prompts[part], turn, first, seed, answers)
            turn.rows += rows
            if on_batch is not None:
                on_batch(turn.setting, rows)
    return [turn.rows for turn in runners]


def checked(model: LLaDA, setting: Setting, prompts: Sequence[Sequence[int]]) -> Policy | str:
    """The setting's policy; raises for whatever `decode` would reject in the middle of the run."""
    check_room(model, prompts, setting.gen_length)
    longest_prompt = max(map(len, prompts))
    text, how = setting.policy, _arguments(setting)
    policy = "topk" if text.name == "oracle" else text.make(model)
    resolved = Options.resolve(model, longest_prompt=longest_prompt, policy=policy, **how).policy
    return text.name if text.name == "oracle" else resolved


def _batch(
    model: LLaDA,
    samples: Sequence[tasks.Sample],
    prompts: Sequence[Sequence[int]],
    turn: _Turns,
    first: int,
    seed: int,
    answers: dict[Setting, Tensor],
) -> list[Row]:
    setting, policy = turn.setting, turn.policy
    plain = replace(setting, policy_text="topk", steps=None)
    if policy == "oracle":
        if plain not in answers:
            answers[plain] = decode_as(model, prompts, plain, "topk", seed + first).sequences[:, -setting.gen_length :]
        policy = policies.Oracle(answers[plain])
    if not turn.warm:
        decode_as(model, prompts, setting, policy, seed + first)
        turn.warm = True
    synchronize(model)
    began = time.perf_counter()
    out = decode_as(model, prompts, setting, policy, seed + first)
    synchronize(model)
    seconds = (time.perf_counter() - began) / len(samples)
    generated = out.sequences[:, -setting.gen_length :]
    if replace(setting, policy_text="topk") == plain and setting.policy_text in ("topk", "topk=1"):
        answers[plain] = generated  # an oracle later in this batch need not decode it again
    rows = []
    for i, (sample, ids) in enumerate(zip(samples, generated.tolist(), strict=True)):
        text = answer_text(model, ids)
        passes, tokens = int(out.sequence_passes[i]), int(out.generated_tokens[i])
        rows.append(Row(first + i, sample.task, is_right(sample, text), passes, tokens, text, seconds))
    return rows


def decode_as(
    model: LLaDA,
    prompts: Sequence[Sequence[int]],
    setting: Setting,
    policy: Policy | str,
    seed: int,
    backend: str = "auto",
) -> DecodeOutput:
    """Decode as the setting says, ``policy`` being its own from `checked`."""
    return decode(model, prompts, policy=policy, seed=seed, **_arguments(setting) | {"backend": backend})


def _arguments(setting: Setting) -> dict[str, Any]:
    """All of `decode`'s but the policy, so that no generation_config.json decides."""
    gen_length, block_length = setting.gen_length, setting.block_length
    steps = setting.policy.steps(gen_length, setting.steps, block_length=block_length)
    return {
        "gen_length": gen_length, "block_length": block_length, "steps": steps or gen_length,  # as good as none
        "cache": setting.cache, "end_of_text": setting.end_of_text, "temperature": 0.0, "cfg_scale": 0.0,
        "backend": "auto",
    }  # fmt: skip


def synchronize(model: LLaDA) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()  # host: the clock starts and stops when the work is done


# -- figures ----------------------------------------------------------------------------------------------------------


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Figures of a setting's rows, as `dllm-engine eval --json` prints them.

    Accuracies are shares, with the Wilson interval; ``forward_passes`` is the mean a prompt; tokens are those before
    the end of the text; ``tasks`` has the accuracy of each task.
    """
    right, total = sum(row.right for row in rows), len(rows)
    passes, tokens, seconds = (sum(getattr(row, name) for row in rows) for name in ("passes", "tokens", "seconds"))
    low, high = wilson(right, total)
    by_task: dict[str, list[bool]] = {}
    for row in rows:
        by_task.setdefault(row.task, []).append(row.right)
    return {
        "accuracy": right / total, "accuracy_low": low, "accuracy_high": high, "forward_passes": passes / total,
        "tokens_per_forward": tokens / passes, "tokens_per_second": tokens / seconds, "prompts": total,
        "seconds": seconds, "tasks": {task: sum(marks) / len(marks) for task, marks in by_task.items()},
    }  # fmt: skip


def wilson(right: int, total: int, z: float = _Z_TWO_SIDED) -> tuple[float, float]:
    """95 % Wilson score interval of a share."""
    p, zz = right / total, z * z / total
    centre, half = (p + zz / 2) / (1 + zz), z * math.sqrt(p * (1 - p) / total + zz / (4 * total)) / (1 + zz)
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_loss(baseline_right: Sequence[bool], right: Sequence[bool]) -> tuple[float, float]:
    """Accuracy lost against a baseline on the same prompts, and the one-sided 95 % upper bound of the loss.

    Normal approximation with the variance of the paired differences. With fewer than 10 discordant pairs the bound is
    the exact binomial one of the prompts lost, those won not counted: 1 − 0.05^(1/n), about 3 / n, if none is lost.

    Raises:
        ValueError: no pair, or lists of different lengths.
    """
    n = len(right)
    if n == 0 or len(baseline_right) != n:
        raise ValueError(f"right: {n} outcomes given; as many as baseline_right ({len(baseline_right)}), at least 1")
    differences = [int(a) - int(b) for a, b in zip(baseline_right, right, strict=True)]
    loss, discordant = sum(differences) / n, sum(map(abs, differences))
    if discordant < _NORMAL_FROM:
        return loss, _binomial_upper(differences.count(1), n)
    variance = (discordant - n * loss * loss) / (n - 1) / n
    return loss, min(1.0, loss + _Z_ONE_SIDED * math.sqrt(max(0.0, variance)))


def _binomial_upper(count: int, n: int) -> float:
    """The share p at which ``count`` or fewer of n happen with a chance of 5 % (Clopper and Pearson)."""
    low, high = 0.0, 1.0
    while count < n and high - low > 1e-12:
        p = (low + high) / 2
        chance = sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(count + 1))
        low, high = (p, high) if chance > 0.05 else (low, p)
    return high

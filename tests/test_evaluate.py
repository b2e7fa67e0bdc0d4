"""Evaluation: figures against those counted by hand, turns, the oracle, policies as text."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dllm_engine import LearnedFilter, LLaDA, evaluate, tasks
from dllm_engine.decode import decode
from dllm_engine.evaluate import Row, Setting
from dllm_engine.policy_text import PolicyText
from dllm_engine.tokenizer import answer_text, encode_prompt

TOPK = Setting("topk", gen_length=32)
FAST = Setting("threshold=0.7", cache="none", gen_length=32)
ORACLE = replace(TOPK, policy_text="oracle")


def fresh(count: int) -> list[tasks.Sample]:
    rng = random.Random(4)
    return [tasks.generate(("copy", "reverse", "sort")[i % 3], rng) for i in range(count)]


def timeless(rows: list[Row]) -> list[Row]:
    return [replace(row, seconds=0.0) for row in rows]


class Calls:
    """Stands in for decode and remembers its calls; ``stop`` is the number of calls after which it is interrupted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop: float = math.inf) -> None:
        self.made: list[tuple[str, int]] = []
        self.caches: set[str] = set()
        self.stop = stop
        monkeypatch.setattr(evaluate, "decode", self)

    def __call__(self, model: LLaDA, prompts: Any, **options: Any) -> Any:
        if len(self.made) >= self.stop:
            raise KeyboardInterrupt
        self.caches.add(options["cache"])
        self.made.append((getattr(options["policy"], "name", options["policy"]), len(prompts)))
        return decode(model, prompts, **options)


# -- figures ----------------------------------------------------------------------------------------------------------


def test_rows_are_what_decode_gives_each_prompt_alone(demo_model: LLaDA) -> None:
    questions = fresh(5)
    rows = evaluate.run(demo_model, questions, FAST, batch_size=2)
    for i, (row, sample) in enumerate(zip(rows, questions, strict=True)):
        prompt = encode_prompt(demo_model.tokenizer, sample.prompt, chat=True)
        out = decode(
            demo_model, [prompt], gen_length=32, policy=PolicyText.parse("threshold=0.7").make(demo_model), cache="none"
        )
        text = answer_text(demo_model, out.sequences[0, -32:].tolist())
        passes, tokens = int(out.sequence_passes[0]), int(out.generated_tokens[0])
        assert replace(row, seconds=0.0) == Row(i, sample.task, tasks.score(sample, text), passes, tokens, text, 0.0)
        assert row.seconds > 0


def test_seeds_count_samples_not_batches(demo_model: LLaDA) -> None:
    setting = Setting("random", gen_length=32)
    two, five = (timeless(evaluate.run(demo_model, fresh(5), setting, batch_size=n)) for n in (2, 5))
    assert two == five
    assert timeless(evaluate.run(demo_model, fresh(5), setting, seed=1)) != five


def test_summary() -> None:
    rows = [
        Row(0, "copy", True, 4, 10, "", 0.5),
        Row(1, "copy", False, 2, 6, "", 0.5),
        Row(2, "sort", True, 6, 8, "", 1),
    ]
    figures = evaluate.summary(rows)
    assert figures["accuracy"] == pytest.approx(2 / 3)
    assert (figures["accuracy_low"], figures["accuracy_high"]) == evaluate.wilson(2, 3)
    assert figures["forward_passes"] == 4
    assert figures["tokens_per_forward"] == 2
    assert figures["tokens_per_second"] == 12
    assert figures["tasks"] == {"copy": 0.5, "sort": 1.0}
    assert (figures["prompts"], figures["seconds"]) == (3, 2)


def test_wilson() -> None:
    """Against the closed-form roots of (p̂ − p)² = z² p (1 − p) / n."""
    for right, total in ((0, 10), (10, 10), (3, 10), (186, 200)):
        low, high = evaluate.wilson(right, total)
        for p in (low, high):
            assert (right / total - p) ** 2 == pytest.approx(1.96**2 * p * (1 - p) / total, abs=1e-9)
        assert low <= right / total <= high


def test_paired_loss() -> None:
    # 100 prompts, 20 lost and 10 won: mean 0.1, variance (30 − 100 · 0.01) / 99, standard error sqrt(0.29293 / 100)
    before, after = [True] * 50 + [False] * 10 + [True] * 40, [False] * 20 + [True] * 80
    loss, upper = evaluate.paired_loss(before, after)
    assert loss == pytest.approx(0.1)
    lost, won = 20, 10
    assert sum(a and not b for a, b in zip(before, after, strict=True)) == lost
    assert sum(b and not a for a, b in zip(before, after, strict=True)) == won
    assert upper == pytest.approx(0.1 + 1.645 * 0.054123, abs=1e-5)
    swapped, _ = evaluate.paired_loss(after, before)
    assert swapped == pytest.approx(-0.1)


def test_paired_loss_with_few_discordant_pairs_is_exact() -> None:
    same = [True] * 100
    assert evaluate.paired_loss(same, same) == (0.0, pytest.approx(1 - 0.05**0.01))  # about 3 / 100
    assert evaluate.paired_loss([False] * 4, [False] * 4)[1] == pytest.approx(1 - 0.05**0.25)
    loss, upper = evaluate.paired_loss(same, [False, *same[1:]])
    assert loss == pytest.approx(0.01)
    assert upper == pytest.approx(0.04656, abs=1e-5)  # Clopper and Pearson, one of 100, one-sided 95 %
    won = evaluate.paired_loss([False, *same[1:]], same)
    assert won == (pytest.approx(-0.01), pytest.approx(1 - 0.05**0.01))  # one prompt won promises no gain
    assert evaluate.paired_loss([True] * 3, [False] * 3) == (1.0, 1.0)
    assert evaluate.paired_loss([True] * 30, [False] * 30) == (1.0, 1.0)
    # ten pairs are enough for the normal approximation: mean 0.1, variance (10 − 100 · 0.01) / 99
    _, upper = evaluate.paired_loss(same, [False] * 10 + same[10:])
    assert upper == pytest.approx(0.1 + 1.645 * math.sqrt(9 / 99 / 100), abs=1e-9)
    with pytest.raises(ValueError, match="right: 0 outcomes given"):
        evaluate.paired_loss([], [])
    with pytest.raises(ValueError, match=r"as many as baseline_right \(2\)"):
        evaluate.paired_loss([True, True], [True])


# -- turns and the oracle ---------------------------------------------------------------------------------------------


def test_settings_take_turns(demo_model: LLaDA, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    seen: list[Setting] = []
    rows = evaluate.run_all(demo_model, fresh(5), [TOPK, FAST], batch_size=3, on_turn=seen.append)
    slow, fast = ("topk", 3), ("threshold", 3)
    assert calls.made == [slow, slow, fast, fast, ("topk", 2), ("threshold", 2)]  # the first of each is the warm-up
    assert seen == [TOPK, FAST, TOPK, FAST]
    for wrong in (replace(FAST, cache="dul"), replace(FAST, end_of_text="no"), replace(FAST, gen_length=33)):
        with pytest.raises(ValueError, match="given"):
            evaluate.run_all(demo_model, fresh(2), [TOPK, wrong], on_turn=seen.append)
    assert len(seen) == 4, "a bad setting was found after the first turn"
    assert timeless(rows[1]) == timeless(evaluate.run(demo_model, fresh(5), FAST))


def test_a_row_has_its_share_of_the_seconds_of_its_batch(demo_model: LLaDA, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(evaluate.time, "perf_counter", lambda: next(clock))
    rows = evaluate.run(demo_model, fresh(5), FAST, batch_size=4)
    assert [row.seconds for row in rows] == [0.25] * 4 + [1.0]


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_the_oracle_gives_the_answers_of_one_token_per_step_in_no_more_passes(
    demo_model: LLaDA, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    questions, setting = fresh(6), replace(TOPK, cache=cache)
    topk, oracle = evaluate.run_all(
        demo_model, questions, [setting, replace(setting, policy_text="oracle")], batch_size=4
    )
    assert [row.text for row in oracle] == [row.text for row in topk]
    assert all(a.passes <= b.passes for a, b in zip(oracle, topk, strict=True))
    assert sum(row.passes for row in oracle) < sum(row.passes for row in topk)
    calls = Calls(monkeypatch)
    alone = evaluate.run(demo_model, questions, replace(setting, policy_text="oracle"), batch_size=4)
    assert timeless(alone) == timeless(oracle)
    assert calls.caches == {cache}


def test_the_oracle_reuses_answers_of_its_batch_only(demo_model: LLaDA, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    together = evaluate.run_all(demo_model, fresh(4), [TOPK, ORACLE], batch_size=2)[1]
    assert [name for name, _ in calls.made].count("topk") == 3
    calls.made.clear()
    others = [replace(TOPK, steps=8), replace(TOPK, cache="none"), replace(TOPK, policy_text="topk=2")]
    *_, alone = evaluate.run_all(demo_model, fresh(4), [*others, ORACLE], batch_size=2)
    assert [name for name, _ in calls.made].count("topk") == 3 * 3 + 2
    assert timeless(alone) == timeless(together)


def test_tokens_a_step(demo_model: LLaDA) -> None:
    setting = replace(TOPK, policy_text="topk=4", end_of_text="off")
    assert {row.passes for row in evaluate.run(demo_model, fresh(2), setting)} == {8}


# -- policies as text -------------------------------------------------------------------------------------------------


def test_policy_texts(demo_model: LLaDA, tmp_path: Path) -> None:
    LearnedFilter(32, threshold=0.6).save_pretrained(tmp_path / "f@1.safetensors")
    file = str(tmp_path / "f@1.safetensors")
    assert PolicyText.parse("topk") == PolicyText("topk")
    assert PolicyText.parse("topk=4") == PolicyText("topk", 4)
    assert PolicyText.parse("learn2pd@0.8") == PolicyText("learn2pd", 0.8)
    assert PolicyText.parse(f"learn2pd={file}") == PolicyText("learn2pd", None, file)
    assert PolicyText.parse(f"learn2pd={file}@0.8") == PolicyText("learn2pd", 0.8, file)
    made: Any = PolicyText.parse(f"learn2pd={file}@0.8").make(demo_model)
    assert made.threshold == 0.8
    made = PolicyText.parse(f"learn2pd={file}").make(demo_model)
    assert made.threshold == 0.6
    made = PolicyText.parse("factor=1.5").make(demo_model)
    assert made.factor == 1.5
    made = PolicyText.parse("localleap=0.8/0.5/3").make(demo_model)
    assert repr(made) == "LocalLeap(anchor=0.8, relaxed=0.5, window=3)"
    assert PolicyText.parse("wedlm").make(demo_model) == "wedlm"
    assert PolicyText.parse("margin=4").make(demo_model) == "margin"
    assert PolicyText.parse("margin=4").steps(32) == 8
    assert PolicyText.parse("topk=4").make(demo_model) == "topk"
    assert PolicyText.parse("topk=4").steps(32) == 8
    assert PolicyText.parse("threshold=0.9").steps(32) is None
    assert PolicyText.parse("topk").steps(32, 16) == 16


def test_the_models_own_filter_at_a_threshold(tmp_path: Path) -> None:
    LearnedFilter(32, threshold=0.6).save_pretrained(tmp_path)

    class Shipping:
        path = tmp_path

    made: Any = PolicyText.parse("learn2pd@0.25").make(Shipping())  # type: ignore[arg-type]
    assert made.threshold == 0.25


def test_the_prompt_that_is_refused_is_named(demo_model: LLaDA) -> None:
    samples = [*fresh(1), replace(fresh(1)[0], about={"messages": [{"role": "user"}]})]
    with pytest.raises(ValueError, match=r"^prompt 1: messages: \[{'role': 'user'}\] given; a list of"):
        evaluate.run(demo_model, samples, TOPK)
    samples[1] = replace(samples[0], prompt="Copy " * 1000)
    with pytest.raises(ValueError, match=r"^prompt 1: 1\d+ tokens given; the model has room for \d+ beside gen_length"):
        evaluate.run(demo_model, samples, TOPK)

"""The exact model of benchmarks/oracle: its marginals, and what the engine's rules must then achieve, in closed form.

ParallelBench (arXiv 2510.04767) gives the accuracies of an ideal model; shares of n runs are held to 3 standard errors.
"""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import published, run, tasks
from oracle.model import JITTER, OracleModel

from dllm_engine import decode, policies
from dllm_engine.tasks import lists

ROOT = Path(__file__).resolve().parent.parent
LINES = [line for line in published.lines() if line.name in policies.names()]


def oracle(task: str, n: int = 10, seed: int = 0) -> OracleModel:
    return OracleModel(tasks.make(task, n), seed=seed)


def share(task: str, n: int, policy: str, runs: int, temperature: float = 0.0) -> float:
    return run.measure(oracle(task, n), policy, runs=runs, temperature=temperature)[0] / runs


def error(p: float, *runs: int) -> float:
    """3 standard errors of a share, or of the difference of two."""
    return 3 * math.sqrt(sum(p * (1 - p) / n for n in runs))


# -- the marginals ----------------------------------------------------------------------------------------------------


def every_answer(task: str, n: int) -> list[tuple[int, ...]]:
    """All right answers as slots, by trying everything: the demo's scorers say what is right."""
    if task == "latin_square":
        rows = np.array(list(itertools.permutations(range(4))))
        grids = rows[np.indices((24,) * 4).reshape(4, -1).T]  # [331776, 4, 4]
        return [tuple(g) for g in grids[(np.sort(grids, axis=1) == np.arange(4)[:, None]).all((1, 2))].reshape(-1, 16)]
    items, word = [chr(97 + i) for i in range(n)], chr(97 + n)
    slots = [*items, word] if lists.TASKS[task].word else items
    about = {"items": items, "word": word, "index": None}
    length = n + {"insert_random": 1, "remove_random": -1}.get(task, 0)
    return [
        ids
        for ids in itertools.product(range(len(slots)), repeat=length)
        # ParallelBench counts the unshuffled list as wrong; the closed forms count it
        if lists.score(task, ", ".join(slots[i] for i in ids), about) or (task == "shuffle" and ids == tuple(range(n)))
    ]


@pytest.mark.parametrize(("task", "n"), [(t, n) for t in tasks.NAMES[:-1] for n in (3, 5)] + [("latin_square", 4)])
def test_marginals_are_those_of_all_answers(task: str, n: int) -> None:
    answers, model, rng = every_answer(task, n), oracle(task, n), np.random.default_rng(n)
    prompts = model.prompts(60, seed=n)
    slots = prompts[:, -model.task.slots :]
    canvases, truth = [], []
    for b in range(60):
        answer = answers[rng.integers(len(answers))]
        hidden = rng.random(len(answer)) < rng.random()
        hidden[rng.integers(len(answer))] = True
        left = [a for a in answers if all(h or a[i] == answer[i] for i, h in enumerate(hidden))]
        canvases.append([model.mask_id if h else int(slots[b, answer[i]]) for i, h in enumerate(hidden)])
        rows = []
        for i in range(len(answer)):
            row = [0.0] * model.config.embedding_size
            for k in range(model.task.slots):
                row[slots[b, k]] = float(Fraction(sum(a[i] == k for a in left), len(left)))
            rows.append(row)
        truth.append(rows)
    tokens = torch.cat((prompts, torch.tensor(canvases)), dim=1)
    expected = torch.tensor(truth, dtype=torch.float64)
    undecided = torch.tensor(canvases) == model.mask_id
    exact = model.task.marginals(model.shown(tokens), undecided)
    by_slot = expected.gather(2, slots[:, None].expand_as(exact))
    torch.testing.assert_close(exact, by_slot, rtol=1e-12, atol=0)
    logits = model(tokens)[:, -model.task.length :]
    torch.testing.assert_close(logits.double().softmax(-1), expected, rtol=JITTER, atol=1e-12)
    assert task == "copy" or int((expected[undecided].amax(-1) < 1).sum()) > 20, "too little was left open"
    for answer in (answers[0], answers[-1]):
        finished = torch.tensor(answer)[None, :, None] == torch.arange(model.task.slots)
        assert bool(model.task.right(finished))
        wrong = finished.clone()
        wrong[0, 0] = finished[0, -1] if answer[0] != answer[-1] else ~finished[0, 0]
        assert not bool(model.task.right(wrong))


def test_after_a_wrong_token_every_slot_is_as_likely() -> None:
    model = oracle("copy", 4)
    tokens = torch.cat((model.prompts(1), torch.full((1, 4), model.mask_id)), dim=1)
    tokens[0, -1] = tokens[0, -5 - 3]  # the first item in the last place
    shown = model.shown(tokens)
    assert torch.equal(model.task.marginals(shown, ~shown.any(-1)), torch.full((1, 4, 4), 0.25, dtype=torch.float64))


def test_noise_is_new_for_each_sequence_step_position_and_id_and_the_same_again() -> None:
    model = oracle("shuffle", 6)
    tokens = torch.cat((model.prompts(200), torch.full((200, 6), model.mask_id)), dim=1)
    first = model(tokens)[:, -6:, :6]
    assert torch.equal(model(tokens[7:8])[:, -6:, :6], first[7:8])
    assert not torch.equal(oracle("shuffle", 6, seed=1)(tokens)[:, -6:, :6], first)
    noise = (first - math.log(1 / 6)) / JITTER
    assert -1e-3 < float(noise.min()) < 0.01
    assert 0.99 < float(noise.max()) < 1.001
    later = tokens.clone()
    later[:, -1] = later[:, -7]
    other = model(later)[:, -6:-1, :6]
    for a, b in ((noise[1:], noise[:-1]), (noise[:, 1:], noise[:, :-1]), (noise[..., 1:], noise[..., :-1])):
        assert abs(float(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1])) < 0.05
    free = other > -10
    a, b = noise[:, :-1][free], (other[free] - math.log(1 / 5)) / JITTER
    assert abs(float(torch.corrcoef(torch.stack((a, b)))[0, 1])) < 0.05


def test_the_engine_decodes_it_alike_on_backends_and_alone() -> None:
    model = oracle("shuffle")
    settings = {"gen_length": 10, "block_length": 10, "cache": "none", "end_of_text": "off", "seed": 0}
    for policy, steps in (("topk", 5), ("threshold", None), ("factor", None)):
        both = [
            decode(model, model.prompts(40), policy=policy, steps=steps, backend=backend, **settings).sequences
            for backend in ("auto", "eager")
        ]
        assert torch.equal(*both)
        alone = decode(model, model.prompts(40)[33:34], policy=policy, steps=steps, **settings).sequences
        assert torch.equal(alone, both[0][33:34])
    with pytest.raises(ValueError, match="whole canvases"):
        decode(model, model.prompts(2), **(settings | {"cache": "dual"}))


# -- closed forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("n", "k"), [(6, 6), (6, 2), (8, 2), (9, 3)])
def test_shuffle_with_k_a_step(n: int, k: int, temperature: float) -> None:
    left = range(n, 0, -k)
    p = math.prod(math.perm(m, k) / m**k for m in left)
    assert share("shuffle", n, f"topk={k}", 3000, temperature) == pytest.approx(p, abs=error(p, 3000))


@pytest.mark.parametrize("n", [3, 10])
def test_replace_random_drawn_in_one_step(n: int) -> None:
    p = (1 - 1 / n) ** (n - 1)
    assert share("replace_random", n, f"topk={n}", 3000, 1.0) == pytest.approx(p, abs=error(p, 3000))


@pytest.mark.parametrize("n", [6, 10])
def test_replace_random_with_two_a_step_is_a_coin(n: int) -> None:
    assert share("replace_random", n, "topk=2", 3000) == pytest.approx(0.5, abs=error(0.5, 3000))


@pytest.mark.parametrize(("n", "k"), [(9, 3), (12, 4), (10, 5), (10, 10)])
def test_replace_random_with_more_a_step_never_replaces(n: int, k: int) -> None:
    assert share("replace_random", n, f"topk={k}", 100) == 0


@pytest.mark.parametrize("n", range(3, 13))
def test_replace_random_needs_a_threshold_above_that_of_keeping(n: int) -> None:
    model, edge = oracle("replace_random", n), (n - 1) / n
    assert run.measure(model, f"threshold={edge + 0.001}", runs=50) == (50, n)
    assert run.measure(model, f"threshold={edge - 0.001}", runs=50) == (0, 1)


def test_shuffle_with_a_threshold_above_a_half_takes_one_token_a_step() -> None:
    assert run.measure(oracle("shuffle", 7), "threshold=0.501", runs=100) == (100, 7)


@pytest.mark.parametrize(
    ("n", "policy", "accuracy", "steps"),
    [
        (11, "threshold=0.9", 0, 1),
        (9, "threshold=0.9", 1, 9),
        (10, "threshold=0.95", 1, 10),
        (10, "factor=1.05", 1, 2),
        (10, "factor=0.95", 1, 3),
        (16, "threshold=0.95", 1, 16),
        (24, "threshold=0.95", 0, 1),
    ],
)
def test_replace_random_beside_the_equalities(n: int, policy: str, accuracy: int, steps: int) -> None:
    assert run.measure(oracle("replace_random", n), policy, runs=200) == (200 * accuracy, steps)


@pytest.mark.parametrize(
    ("task", "policy", "most"), [("remove_random", "threshold=0.9", 9), ("insert_random", "factor=1.0", 6)]
)
def test_equals_pass_half_of_the_time(task: str, policy: str, most: int) -> None:
    """Once in a decode two positions are exactly as sure as the rule asks; if both pass (1 in 4) it saves a step."""
    right, steps = run.measure(oracle(task), policy, runs=1000)
    assert right == 1000
    assert most - steps == pytest.approx(0.25, abs=error(0.25, 1000))


# -- the published figures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.policy)
def test_published_figures(line: published.Line) -> None:
    for task, cell in line.published.items():
        runs = 200 if cell.accuracy in (0, 1) else 4000
        right, steps = run.measure(oracle(task), line.policy, runs=runs)
        if not cell.equals:
            pooled = (right + cell.accuracy * published.RUNS) / (runs + published.RUNS)
            allowed = error(pooled, runs, published.RUNS) if cell.accuracy not in (0, 1) else 0
            assert abs(right / runs - cell.accuracy) <= allowed, f"{line.policy} on {task}"
            assert steps == cell.steps, f"{line.policy} on {task}"


def test_few_figures_are_excused() -> None:
    excused = [(line.policy, task) for line in LINES for task, cell in line.published.items() if cell.equals]
    assert sum(task != "latin_square" for _, task in excused) <= 5 + 2  # of them 2 of rules that may not be registered


def test_every_registered_rule_is_decoded_and_others_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, skipped = run.settings()
    assert {line.name for line in chosen} == set(policies.names())
    assert all(text.partition("=")[0] not in policies.names() for text in skipped)
    monkeypatch.setattr(policies, "names", lambda: ["topk", "brand_new"])
    chosen, skipped = run.settings()
    assert [line.policy for line in chosen] == ["topk", "topk=2", "brand_new"]
    assert "threshold=0.9" in skipped


def test_the_command_prints_json() -> None:
    command = [sys.executable, "-m", "benchmarks.oracle", "--runs", "5", "--size", "4", "--json"]
    arguments = ["--policy", "topk=2", "learn2pd", "--tasks", "copy", "latin_square"]
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert [(r["policy"], r["task"]) for r in found] == list(
        itertools.product(("topk=2", "learn2pd"), ("copy", "latin_square"))
    )
    assert found[0]["accuracy"] == 1
    assert found[0]["forward_passes"] == 2
    assert found[0]["published"] is None  # they are of lists of 10
    assert found[1]["published"]["steps"] == 8

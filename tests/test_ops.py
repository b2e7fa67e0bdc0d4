"""The registered ops: schema, compilation, and that a bad argument never reaches a kernel."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import matrices, run_tests
from test_decode_step import STATE, fresh_state, rules_for

from dllm_engine import backends, native, ops
from dllm_engine.rules import Rule

NONE = torch.empty(0, dtype=torch.int32)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("learn2pd-one", torch.float32), ("learn2pd-one", torch.bfloat16), ("learn2pd-position", torch.float32)],
)
def test_opcheck(backend: str, name: str, dtype: torch.dtype) -> None:
    hidden, head = matrices(6, 16, 50, dtype)
    rows = torch.tensor([1, 5, 0], dtype=torch.int32)
    probes, keys = torch.tensor([[1], [2], [3]]), torch.arange(9).view(3, 3)
    arguments = (hidden, head, rows, torch.tensor([3], dtype=torch.int32), NONE, probes, 0.5, keys, backend)
    torch.library.opcheck(torch.ops.dllm.row_stats.default, arguments)
    state = fresh_state(0, batch=2)
    rule = rules_for(8, "cpu")[name]
    hidden, head = matrices(16, 16, 50, dtype)
    step = (
        hidden.view(2, 8, 16), head, torch.tensor([1, 0]), state.tokens, state.undecided, state.predicted,
        state.progress, state.seeds,
        state.quota, rule.bounds, rule.weights, torch.zeros(2, 2, 8, dtype=torch.int64), torch.zeros(5, 2, 8), NONE,
        NONE, torch.tensor([1]), torch.tensor([1, 4]), 3, 1, 0.0, rule.filter_length, rule.cut, True, rule.position,
        False, backend,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.dllm.decode_step_.default, step)


def test_compiled_without_a_graph_break() -> None:
    hidden, head = matrices(6, 32, 50, torch.float32)
    rows = torch.tensor([1, 5, 0], dtype=torch.int32)

    def scores(h: torch.Tensor) -> torch.Tensor:
        stats = ops.row_stats(h * 2, head, rows, banned_ids=(3,), backend="cpu")
        return stats.confidence + stats.token

    torch.testing.assert_close(torch.compile(scores, fullgraph=True)(hidden), scores(hidden))

    rule = rules_for(8, "cpu")["threshold"]
    states = [fresh_state(2, batch=2) for _ in range(2)]
    blocks = matrices(16, 32, 50, torch.float32)[0].view(2, 8, 32)

    def step(h: torch.Tensor, state: Any) -> torch.Tensor:
        ops.decode_step_(h * 2, head, state, torch.arange(2), rule, backend="cpu")
        return state.progress + 0

    torch.testing.assert_close(torch.compile(step, fullgraph=True)(blocks, states[0]), step(blocks, states[1]))
    assert torch.equal(states[0].tokens, states[1].tokens)


HIDDEN, HEAD = matrices(4, 16, 50, torch.float32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": [1.0]}, TypeError, "hidden: list given; a tensor"),
        ({"hidden": HIDDEN[0]}, ValueError, r"hidden: shape \[16\] given"),
        ({"hidden": HIDDEN.double()}, TypeError, "hidden: torch.float64 given; float32, bfloat16 or float16"),
        ({"hidden": HIDDEN[:, :8]}, ValueError, "lm_head: width 16 given; hidden has 8"),
        ({"hidden": HIDDEN.T.contiguous().T}, ValueError, "hidden: stride 4 along D given"),
        ({"hidden": HIDDEN.to("meta")}, ValueError, "lm_head: on cpu, hidden on meta"),
        ({"lm_head": HEAD[:0]}, ValueError, "lm_head: shape"),
        ({"lm_head": HEAD.int()}, TypeError, "lm_head: torch.int32 given"),
        ({"rows": [0]}, TypeError, "rows: list given"),
        ({"rows": torch.tensor([0.0])}, TypeError, "rows: torch.float32 given"),
        ({"rows": torch.tensor([[0]])}, ValueError, r"rows: shape \[1, 1\] given"),
        ({"rows": torch.tensor([0, 4])}, ValueError, "rows: 0 to 4 given; 0 to 3 allowed"),
        ({"rows": torch.tensor([-1])}, ValueError, "rows: -1 to -1 given"),
        ({"banned_ids": (50,)}, ValueError, "banned_ids: 50 given; ids 0 to 49"),
        ({"excluded_ids": ("a",)}, ValueError, "excluded_ids: 'a' given"),
        ({"banned_ids": torch.tensor([2, 1], dtype=torch.int32)}, ValueError, r"banned_ids: \[2, 1\] given; ascending"),
        ({"excluded_ids": torch.tensor([1, 1], dtype=torch.int32)}, ValueError, "excluded_ids: .* each once"),
        (
            {"excluded_ids": torch.tensor([1, 50], dtype=torch.int32)},
            ValueError,
            "excluded_ids: 1 to 50 given; 0 to 49",
        ),
        ({"probe_ids": torch.zeros(2, 1, dtype=torch.int64)}, ValueError, r"probe_ids: shape \[2, 1\] given; \[1, 1\]"),
        ({"probe_ids": torch.zeros(1, 9, dtype=torch.int64)}, ValueError, "probe_ids: 9 a row given; at most 8"),
        ({"probe_ids": torch.full((1, 1), 50)}, ValueError, "probe_ids: 50 to 50 given"),
        ({"probe_ids": [[1]]}, TypeError, "probe_ids: list given"),
        ({"noise_keys": [1]}, TypeError, "noise_keys: list given"),
        ({"banned_ids": torch.tensor(3, dtype=torch.int32)}, ValueError, r"banned_ids: shape \[\] given"),
        ({"probe_ids": torch.zeros(1, 1)}, TypeError, "probe_ids: torch.float32 given"),
        ({"temperature": -1.0}, ValueError, "temperature: -1.0 given"),
        ({"temperature": math.nan}, ValueError, "temperature: nan given"),
        ({"temperature": 1.0}, ValueError, "noise_keys: needed with a temperature"),
        ({"temperature": 1.0, "noise_keys": torch.zeros(1, 2, dtype=torch.int64)}, ValueError, "noise_keys: shape"),
        ({"backend": "abacus"}, ValueError, "backend: 'abacus' given; known"),
        ({"backend": "cuda"}, RuntimeError, "backend: 'cuda' cannot run here"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_argument(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"hidden": HIDDEN, "lm_head": HEAD, "rows": torch.tensor([0])} | change
    with pytest.raises(error, match=message):
        ops.row_stats(arguments.pop("hidden"), arguments.pop("lm_head"), arguments.pop("rows"), **arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": HIDDEN}, ValueError, r"hidden: \[4, 16\] given; a tensor \[B', S, D\]"),
        ({"hidden": torch.zeros(2, 9, 16)}, ValueError, "hidden: 9 rows a block given; 1 to the block length 8"),
        ({"sequences": torch.tensor([0])}, ValueError, r"sequences: shape \[1\] given; \[2\]"),
        ({"sequences": torch.tensor([0, 2])}, ValueError, "sequences: 0 to 2 given; 0 to 1 allowed"),
        ({"sequences": torch.tensor([1, 1])}, ValueError, r"sequences: \[1, 1\] given; each may occur once"),
        ({"sequences": torch.tensor([0, 1], dtype=torch.int32)}, TypeError, "sequences: torch.int32 given"),
        (
            {"banned_ids": torch.tensor([2, 1], dtype=torch.int32)},
            ValueError,
            "banned_ids: .* ascending ids are needed",
        ),
        ({"rule": Rule(torch.zeros(3), torch.empty(0))}, ValueError, "rule.bounds: 3 given; the block has 8 rows"),
        ({"rule": Rule(torch.zeros(8), torch.zeros(2 * 16 + 8))}, ValueError, "rule.weights: a filter of 4 given"),
        ({"rule": Rule(torch.zeros(8), torch.zeros(100))}, ValueError, "rule.weights: shape"),
        (
            {"rule": Rule(torch.zeros(8), torch.zeros(2 * 200**2 + 400))},
            ValueError,
            "a filter of 200 given; .* 8 to 128",
        ),
        (
            {"rule": Rule(torch.zeros(8), torch.zeros(17 * 129 + 1), position=True)},
            ValueError,
            "a filter of 129 given; .* 1 to 128",
        ),
        ({"rule": Rule(torch.zeros(8), torch.zeros(17 * 3), position=True)}, ValueError, "rule.weights: shape"),
        ({"rule": Rule(torch.zeros(8), torch.empty(0), position=True)}, ValueError, "rule.weights: shape"),
        ({"rule": Rule(torch.zeros(8), torch.zeros(1), position=True)}, ValueError, "a filter of 0 given"),
        ({"rule": Rule(torch.zeros(8), torch.full((144,), math.nan))}, ValueError, "rule.weights: .* not finite"),
        ({"end_ids": torch.tensor([1.0])}, TypeError, "end_ids: torch.float32 given"),
        ({"temperature": math.inf}, ValueError, "temperature: inf given"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_argument_of_a_step(change: dict[str, Any], error: type[Exception], message: str) -> None:
    state = fresh_state(0, batch=2)
    before = [getattr(state, field).clone() for field in STATE]
    arguments: dict[str, Any] = {
        "hidden": matrices(16, 16, 50, torch.float32)[0].view(2, 8, 16), "sequences": torch.arange(2),
        "rule": rules_for(8, "cpu")["threshold"],
    } | change  # fmt: skip
    with pytest.raises(error, match=message):
        ops.decode_step_(
            arguments.pop("hidden"), HEAD, state, arguments.pop("sequences"), arguments.pop("rule"), **arguments
        )
    assert all(torch.equal(a, getattr(state, field)) for a, field in zip(before, STATE, strict=True))


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("progress", lambda x: x.int(), "torch.int32 given; torch.int64"),
        ("quota", lambda x: x.int(), "torch.int32 given; torch.int64"),
        ("undecided", lambda x: x.long(), "torch.int64 given; torch.bool"),
        ("seeds", lambda x: x[:1], r"shape \[1\] given; \[2\]"),
        ("predicted", lambda x: x[:, :-1], r"shape \[2, 18\] given; \[2, 19\]"),
        ("tokens", lambda x: torch.cat((x, x), 1)[:, :19], r"strides \[38, 1\] given; a contiguous tensor"),
        ("end_ids", lambda x: x.float(), "torch.float32 given; torch.int64"),
    ],
    ids=lambda value: value if isinstance(value, str) and value in (*STATE, "end_ids") else "",
)
def test_a_state_that_kernels_would_misread_is_refused(field: str, change: Any, message: str) -> None:
    state = fresh_state(0, batch=2)
    setattr(state, field, change(getattr(state, field)))
    hidden = matrices(16, 16, 50, torch.float32)[0].view(2, 8, 16)
    with pytest.raises((TypeError, ValueError), match=f"^state.{field}: {message}"):
        ops.decode_step_(hidden, HEAD, state, torch.arange(2), rules_for(8, "cpu")["threshold"])


@pytest.mark.parametrize(("column", "value"), [(0, -1), (0, 12), (2, -1), (2, 8)])
def test_a_state_that_points_outside_is_refused(column: int, value: int) -> None:
    """A block that reaches over the canvas of 19 columns, or a step of it that has no quota."""
    state = fresh_state(0, batch=2)
    state.progress[1, column] = value
    before = [getattr(state, field).clone() for field in STATE]
    hidden = matrices(16, 16, 50, torch.float32)[0].view(2, 8, 16)
    with pytest.raises(ValueError, match=f"state.progress: .*{value}.* given"):
        ops.decode_step_(hidden, HEAD, state, torch.arange(2), rules_for(8, "cpu")["threshold"])
    assert all(torch.equal(a, getattr(state, field)) for a, field in zip(before, STATE, strict=True))


def every_other(tensor: torch.Tensor) -> torch.Tensor:
    """Equal, but its elements lie apart."""
    return torch.stack((tensor, torch.full_like(tensor, -9 if tensor.is_floating_point() else 7)), -1)[..., 0]


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_arguments_may_be_views(backend: str) -> None:
    keys, rows, probes = torch.arange(9).view(3, 3), torch.tensor([1, 3, 0]), torch.tensor([[1, 2], [2, 9], [0, 49]])
    plain, apart = (
        ops.row_stats(
            HIDDEN, HEAD, change(rows.to(dtype)), probe_ids=change(probes), noise_keys=change(keys), temperature=0.5,
            backend=backend,
        )
        for change, dtype in ((torch.clone, torch.int64), (every_other, torch.int32))
    )  # fmt: skip
    for a, b in zip(plain.fields(), apart.fields(), strict=True):
        assert torch.equal(a, b)
    hidden = matrices(16, 16, 50, torch.float32)[0].view(2, 8, 16)
    shifted, sequences = hidden.transpose(0, 1).contiguous().transpose(0, 1), torch.tensor([2, 0])
    for seed, (name, rule) in itertools.product(range(6), rules_for(8, "cpu").items()):
        states = [fresh_state(seed, batch=3) for _ in range(2)]
        ends = torch.arange(50 if seed % 2 else 2)  # every id ends the text, or few do
        ops.decode_step_(hidden, HEAD, states[0], sequences, rule, end_ids=ends, backend=backend)
        rule = replace(rule, bounds=every_other(rule.bounds), weights=every_other(rule.weights))
        given = every_other(sequences), rule
        ops.decode_step_(shifted, HEAD, states[1], *given, end_ids=every_other(ends), backend=backend)
        for field in STATE:
            assert torch.equal(getattr(states[0], field), getattr(states[1], field)), (name, field)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_blocks_of_one_row_may_be_views(backend: str) -> None:
    """torch calls such a tensor contiguous, whatever its stride from row to row."""
    states = [fresh_state(0, batch=3, width=1) for _ in range(2)]
    hidden = matrices(3, 16, 50, torch.float32)[0].view(1, 3, 16).transpose(0, 1)
    assert hidden.stride() == (16, 48, 1)
    for state, given in zip(states, (hidden, hidden.clone(memory_format=torch.contiguous_format)), strict=True):
        stats = ops.decode_step_(given, HEAD, state, torch.arange(3), rules_for(1, "cpu")["topk"], backend=backend)
        assert stats.token.flatten().tolist() == (hidden[:, 0] @ HEAD.T).argmax(1).tolist()
    assert torch.equal(states[0].tokens, states[1].tokens)


def test_only_the_published_filter_needs_decided_rows() -> None:
    assert {name for name, rule in rules_for(8, "cpu").items() if rule.reads_decided} == {"learn2pd-model"}


def test_scratch_is_at_most_a_megabyte() -> None:
    for dim, vocab in ((4096, 126464), (64, 500_000), (8192, 256_000)):
        for rows in (1, 8, 32, 1024):
            assert native._cpu.scratch_bytes(dim, vocab, rows, 2) <= 2**20, (dim, vocab, rows)


def test_auto_is_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backends.resolve("auto", HIDDEN, HEAD) == "cpu"
    monkeypatch.setenv("DLLM_BACKEND", "eager")
    assert backends.resolve("auto", HIDDEN, HEAD) == "eager"
    assert backends.resolve("cpu", HIDDEN, HEAD) == "cpu"  # an explicit name wins
    monkeypatch.setenv("DLLM_BACKEND", "abacus")
    with pytest.raises(ValueError, match="DLLM_BACKEND: 'abacus' given"):
        backends.resolve("auto", HIDDEN, HEAD)


def interpreted(*arguments: str) -> None:
    run_tests(*arguments, TRITON_INTERPRET="1", DLLM_BACKEND="triton")


BY_INTERPRETER: dict[str, list[str]] = {
    f"test_{name}.py": []
    for name in (
        "block_calls", "row_stats", "decode_step", "block_attention", "layer_kernels", "fused_layer", "products"
    )
} | {"test_benchmarks.py": ["-k", "kernels"]}  # fmt: skip


@pytest.mark.parametrize("file", BY_INTERPRETER)
def test_interpreted_triton(file: str) -> None:
    """The same tests of the kernels, by the interpreter: it must be chosen before Triton is imported."""
    pytest.importorskip("triton")
    interpreted(f"tests/{file}", *BY_INTERPRETER[file])


@pytest.mark.slow
def test_interpreted_triton_gives_the_goldens() -> None:
    """Of each reference, rule and cache those of few passes, a batch and guidance: a pass takes a third of a second."""
    pytest.importorskip("triton")
    few = "test_decode and (s16 or batch2 or cfg or threshold0.3 or static_dual or tau0.6)"
    interpreted("tests/test_golden.py", "-k", few)

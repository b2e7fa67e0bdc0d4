"""GPU kernels as they are compiled, run without a GPU (`ptx`); and that this would find what a GPU would punish."""

from __future__ import annotations

import importlib.util
import re
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import SLOWLY, compare, matrices, run_tests, truth
from ptx import cuda as ptx_cuda
from ptx.machine import Machine
from ptx.memory import Fault, Global
from ptx.text import parse

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(SLOWLY, reason="these choose themselves how kernels run")


# -- the machine, by hand-written programs --------------------------------------------------------------------------

HEAD = """
.visible .entry k(.param .u64 out, .param .u64 in)
.reqntid 64
{
	.reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<99>; .reg .b64 %d<9>;
	.shared .align 16 .b8 tile[512];
	ld.param.u64 %d1, [out];
	ld.param.u64 %d2, [in];
	mov.u32 %r1, %tid.x;
	mul.wide.u32 %d3, %r1, 4;
	add.s64 %d4, %d1, %d3;
	add.s64 %d5, %d2, %d3;
	ld.global.b32 %r2, [%d5];
	shl.b32 %r3, %r1, 2;
"""
TAIL = """
	st.global.b32 [%d4], %r9;
	ret;
}
"""


def run(body: str, given: np.ndarray[Any, Any], kind: str = "u4", head: str = HEAD) -> np.ndarray[Any, Any]:
    """What each of 64 threads leaves in %r9; it begins with its number in %r1, its word of ``given`` in %r2."""
    out, words = np.zeros(64, "u4"), np.ascontiguousarray(given).view("u4")
    (kernel,) = parse(head + body + TAIL).values()
    memory = Global(a.view(np.uint8) for a in (out, words))
    Machine(kernel).run(memory, (1,), [(a.ctypes.data, np.uint64) for a in (out, words)])
    return out.view(kind)


ARITHMETIC = {
    "add.s32 %r9, %r2, -7;": lambda x: x - 7,
    "mul.lo.s32 %r9, %r2, 1000003;": lambda x: x * 1000003,
    "mul.hi.u32 %r9, %r2, 3528531795;": lambda x: x % 2**32 * 3528531795 >> 32,
    "shr.s32 %r9, %r2, 3;": lambda x: x >> 3,
    "shr.u32 %r9, %r2, 3;": lambda x: x % 2**32 >> 3,
    "shl.b32 %r9, %r2, 40;": lambda x: 0,
    "div.s32 %r9, %r2, 7;": lambda x: int(x / 7),
    "rem.s32 %r9, %r2, 7;": lambda x: x - 7 * int(x / 7),
    "bfe.u32 %r9, %r2, 5, 9;": lambda x: x >> 5 & 511,
    "bfe.s32 %r9, %r2, 5, 9;": lambda x: (x >> 5 & 511) - (512 if x >> 13 & 1 else 0),
    "prmt.b32 %r9, %r2, %r1, 16707;": lambda x: None,
    "setp.lt.s32 %p1, %r2, 5; selp.b32 %r9, 1, 2, %p1;": lambda x: 1 if x < 5 else 2,
    "setp.lt.u32 %p1, %r2, 5; selp.b32 %r9, 1, 2, %p1;": lambda x: 1 if x % 2**32 < 5 else 2,
    "min.s32 %r9, %r2, 5; @%p1 mov.u32 %r9, 0;": lambda x: min(x, 5),
    "not.b32 %r9, %r2;": lambda x: ~x,
    "popc.b32 %r9, %r2;": lambda x: (x % 2**32).bit_count(),
}


@pytest.mark.parametrize("body", ARITHMETIC)
def test_integers(body: str) -> None:
    given = np.random.default_rng(0).integers(-(2**31), 2**31, 64, dtype=np.int64).astype("i4")
    given[:4] = -8, 0, 4, 5
    found = run(body, given)
    expected = ARITHMETIC[body]
    for n, x in enumerate(given.tolist()):
        want = expected(x)
        if want is None:  # bytes 3, 4, 1 and 4 of thread and word, from the lowest
            both = (x % 2**32).to_bytes(4, "little") + n.to_bytes(4, "little")
            want = int.from_bytes(bytes(both[i] for i in (3, 4, 1, 4)), "little")
        assert found[n] == want % 2**32, (x, want)


def test_floats() -> None:
    given = np.random.default_rng(0).standard_normal(64).astype("f4")
    given[:5] = np.nan, np.inf, -np.inf, 0.0, -0.0
    with np.errstate(all="ignore"):
        exact = given.astype("f8")
        third = (exact * exact + np.float32(1 / 3)).astype("f4")
        np.testing.assert_array_equal(run("fma.rn.f32 %r9, %r2, %r2, 0f3EAAAAAB;", given, "f4"), third)
        np.testing.assert_array_equal(run("max.f32 %r9, %r2, 0f3F800000;", given, "f4"), np.fmax(given, 1))
        found = run("ex2.approx.f32 %r9, %r2;", given, "f4")
        np.testing.assert_allclose(found, np.exp2(exact).astype("f4"), rtol=3e-7)
        assert (found != np.exp2(exact).astype("f4"))[5:].any()  # an approximation is not trusted to be exact
        halves = run("cvt.rn.bf16x2.f32 %r9, %r2, %r2;", given)
    np.testing.assert_array_equal(
        halves[1:] & 0xFFFF, torch.tensor(given[1:]).bfloat16().view(torch.int16).numpy().view("u2")
    )
    ordered = run("setp.lt.f32 %p1, %r2, 0f3F800000; selp.b32 %r9, 1, 0, %p1;", given)
    either = run("setp.ltu.f32 %p1, %r2, 0f3F800000; selp.b32 %r9, 1, 0, %p1;", given)
    assert (ordered[0], either[0]) == (0, 1)


def test_threads_meet_again_behind_branches() -> None:
    body = """
	mov.u32 %r9, 0;
	mov.u32 %r4, %r1;
$again:
	setp.eq.s32 %p1, %r4, 0;
	@%p1 bra $done;
	add.s32 %r9, %r9, %r4;
	sub.s32 %r4, %r4, 1;
	bra $again;
$done:
	shfl.sync.bfly.b32 %r9, %r9, 1, 31, -1;
"""
    sums = [n * (n + 1) // 2 for n in range(64)]
    assert run(body, np.zeros(64, "u4")).tolist() == [sums[n ^ 1] for n in range(64)]


def test_shared_memory_needs_a_barrier() -> None:
    """Each thread reads what its counterpart in the other warp wrote."""
    body = """
	mov.u32 %r4, tile; add.s32 %r5, %r4, %r3; st.shared.b32 [%r5], %r2;
	bar.sync 0;
	xor.b32 %r6, %r3, 128; add.s32 %r6, %r4, %r6; ld.shared.b32 %r9, [%r6];
"""
    given = np.arange(64, dtype="u4") * 3
    assert run(body, given).tolist() == np.roll(given, 32).tolist()
    with pytest.raises(Fault, match="another warp wrote"):
        run(body.replace("bar.sync 0;", ""), given)
    late = body + "st.shared.b32 [%r5], %r1;"
    with pytest.raises(Fault, match="another warp read"):
        run(late, given)


def test_copies_are_not_there_before_they_are_waited_for() -> None:
    body = """
	mov.u32 %r4, tile; shl.b32 %r5, %r1, 4; and.b32 %r5, %r5, 511; add.s32 %r5, %r4, %r5;
	and.b32 %r6, %r1, 15; mul.wide.u32 %d6, %r6, 16; add.s64 %d6, %d2, %d6;
	setp.lt.u32 %p1, %r1, 16;
	@%p1 cp.async.cg.shared.global [%r5], [%d6], 16;
	cp.async.commit_group;
	cp.async.wait_group 0;
	bar.sync 0;
	and.b32 %r7, %r3, 255; add.s32 %r7, %r4, %r7; ld.shared.b32 %r9, [%r7];
"""
    given = np.arange(64, dtype="u4") + 5
    assert run(body, given).tolist() == given.tolist()
    assert (run(body.replace("wait_group 0", "wait_group 1"), given) == 0xFFFFFFFF).all()
    assert (run(body.replace("	cp.async.commit_group;\n", ""), given) == 0xFFFFFFFF).all()


def test_what_is_launched_early_waits() -> None:
    """Such a kernel may ask for data before the one ahead of it has ended, but touch nothing, nor end."""
    wait = "griddepcontrol.launch_dependents; prefetch.global.L2 [%d5]; griddepcontrol.wait;"
    head = HEAD.replace("	ld.global.b32 %r2, [%d5];\n", "")
    late = "ld.global.b32 %r9, [%d5];"
    assert run(wait + late, np.arange(64, dtype="u4"), head=head).tolist() == [*range(64)]
    run(late, np.zeros(64, "u4"), head=head)  # not launched early
    for body in (
        late + wait,
        "setp.eq.s32 %p1, %r1, 3; mov.u32 %r9, 0;\n@%p1 bra $out;\n" + wait + "\n$out:",
        "setp.eq.s32 %p1, %r1, 3; mov.u32 %r9, 0;\n@%p1 ret;\n" + wait,
    ):
        with pytest.raises(Fault, match="before the kernel ahead has ended"):
            run(body, np.zeros(64, "u4"), head=head)
    with pytest.raises(Fault, match="outside"):
        run(wait.replace("%d5", "%d5+4") + late, np.zeros(64, "u4"), head=head)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.b32 %r9, [%d5+4];", "outside"),
        ("ld.global.b32 %r9, [%d5+2];", "no multiple"),
        ("setp.eq.s32 %p1, %r1, 3;\n@%p1 bra $out; bar.sync 0;\n$out:\nbar.sync 0;", "wait at 2 barriers"),
        ("setp.eq.s32 %p1, %r1, 3; @%p1 shfl.sync.bfly.b32 %r9, %r2, 1, 31, -1;", "part of a warp"),
    ],
)
def test_faults(body: str, message: str) -> None:
    with pytest.raises(Fault, match=message):
        run(body, np.zeros(64, "u4"))
    with pytest.raises(NotImplementedError, match="not known"):
        run("mov.u32 %r9, 0; lol.b32 %r9, %r2;", np.zeros(64, "u4"))


# -- the kernels ----------------------------------------------------------------------------------------------------


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Triton's kernels run as on an H100."""
    pytest.importorskip("triton")
    from ptx.triton import Device, install

    from dllm_engine.backends import BACKENDS

    monkeypatch.setitem(BACKENDS, "triton", BACKENDS["triton"])
    hopper = Device(90)
    install(hopper, monkeypatch.setattr)
    return hopper


def score(device: Any, rows: int, dim: int = 448, vocab: int = 700) -> None:
    """Statistics of so many rows, against float64."""
    from dllm_engine.kernels import decode_step
    from dllm_engine.stats import RowStats

    hidden, head = matrices(rows, dim, vocab, torch.bfloat16, peak=3.0)
    index, none = torch.arange(rows, dtype=torch.int32), torch.empty(0, dtype=torch.int64)
    banned, excluded = torch.tensor([0, 5, 699], dtype=torch.int32), torch.tensor([5, 9], dtype=torch.int32)
    fields = decode_step.row_stats(hidden, head, index, banned, excluded, none.view(rows, 0), 0.0, none)
    stats = RowStats(*fields)
    compare(stats, truth(hidden, head, index, (0, 5, 699), (5, 9)))
    assert device.launches[-2:] == ["_score_rows", "finish_rows"]


@pytest.mark.parametrize("rows", [5, 70])
def test_hopper_scores_rows(device: Any, rows: int) -> None:
    """By tiles of 16 rows on `mma.sync`, and of 128 on `wgmma`."""
    score(device, rows)


TRITON = tuple(map(int, metadata.version("triton").split(".")[:2])) if importlib.util.find_spec("triton") else (0, 0)
of_current_compilers = pytest.mark.skipif(TRITON < (3, 4), reason="what Triton before 3.4 makes looks different")


def score_in_order(device: Any, rows: int) -> None:
    """The same of rows that follow each other, whose tiles the copy engine brings; bit for bit."""
    from dllm_engine.kernels import decode_step

    hidden, head = matrices(rows, 200, 700, torch.bfloat16, peak=3.0)
    index, none = torch.arange(rows, dtype=torch.int32), torch.empty(0, dtype=torch.int64)
    found = []
    for consecutive in (True, False):
        found += decode_step._score(
            hidden, head, rows, index, none.int(), none.int(), none.view(rows, 0), none.float(), 0.0, none,
            consecutive=consecutive,
        )  # fmt: skip
    engines = [bool(machine.maps) for machine in device._compiled.values()]
    assert engines == [True, False]
    assert all(torch.equal(a, b) for a, b in zip(found[:2], found[2:], strict=True))
    x = hidden.double() @ head.double().T
    assert (found[0][3].amax(1) - x.amax(1)).abs().max() < 1e-3


with_copies = pytest.mark.skipif(TRITON < (3, 6), reason="the copy engine is used from Triton 3.6 on")


@with_copies
@pytest.mark.parametrize("rows", [20, 130])
def test_the_copy_engine_brings_tiles(device: Any, rows: int) -> None:
    """Of rows and ids that there are not, and a depth that is not one of whole tiles, it brings zeros."""
    score_in_order(device, rows)


@with_copies
@pytest.mark.parametrize(
    ("line", "instead", "message"),
    [
        (r"mbarrier\.try_wait[^;]*;\s*@!complete bra\.uni waitLoop;", "", "more arrivals than"),
        (r"expect_tx\.shared::cta\.b64 _, (\[%r\d+\]), \d+;", r"expect_tx.shared::cta.b64 _, \1, 64;", "announced are"),
        (r"@%p\d+ mbarrier\.arrive\.expect_tx[^;]*;", "", "waits for what nobody has asked for"),
        (r"@%p\d+ mbarrier\.init[^;]*;", "", "no barrier there"),
        (r"bar\.sync\s+0;", "", "no barrier between"),
    ],
    ids=["wait", "bytes", "arrival", "init", "bar"],
)
def test_what_copies_of_tiles_need(
    device: Any, monkeypatch: pytest.MonkeyPatch, line: str, instead: str, message: str
) -> None:
    """Without it the machine stops, or the result is wrong."""
    from ptx import triton

    def without(text: str) -> Any:
        return parse(re.sub(line, instead, text) if "bulk.tensor" in text else text)

    monkeypatch.setattr(triton, "parse", without)
    with pytest.raises(AssertionError, match=message):
        score_in_order(device, 70)


@of_current_compilers
def test_statistics_take_few_instructions(device: Any) -> None:
    """At many rows they are what tensor cores wait for: two tiles of plain ids, 128 logits a thread each.

    24.5 by Triton 3.9 and 27 to 28.4 by 3.4 to 3.7, with what is done once a part; with masks it is over 40.
    """
    for vocab in (768, 1024):
        score(device, 128, 64, vocab)
    score_768, _, score_1024, _ = device.instructions
    assert 15 < (score_1024 - score_768) / 128 < (27 if TRITON >= (3, 9) else 29)


@of_current_compilers
@pytest.mark.parametrize(
    ("line", "which", "message"),
    [
        (r"wgmma\.wait_group\.sync\.aligned 1;", 0, "overwritten while"),
        (r"wgmma\.wait_group\.sync\.aligned 0;", 0, "while its product is under way"),
        (r"wgmma\.fence\.sync\.aligned;", 0, "no fence followed"),
        (r"cp\.async\.commit_group;", -1, "overwritten while"),
        (r"bar\.sync\s+0;", -1, "no barrier between"),
    ],
)
def test_what_a_compiler_may_not_leave_out(
    device: Any, monkeypatch: pytest.MonkeyPatch, line: str, which: int, message: str
) -> None:
    """The machine would find it if the loop that hides the latency waited too little."""
    from ptx import triton

    def without(text: str) -> Any:
        if "wgmma" in text:
            found = list(re.finditer(line, text))
            text = text[: found[which].start()] + text[found[which].end() :]
        return parse(text)

    monkeypatch.setattr(triton, "parse", without)
    with pytest.raises(AssertionError, match=message):
        score(device, 70)


EARLY_KERNELS = {
    "_multiply": lambda x: products().linear(x, x, early=True),
    "_add_norm": lambda x: layer().add_norm(x, x, x[0], 1e-5, early=True),
    "_silu_mul": lambda x: layer().silu_mul(x, early=True),
    "_rope_write": lambda x: layer().rope_write(
        x[None, :1], *(torch.ones(1, 1, 1, 16),) * 2, *torch.zeros(2, 1, 1, 3, 16, dtype=x.dtype).unbind(0),
        torch.zeros(1, 1, dtype=torch.int64), heads=2, early=True,
    ),
    "_attend": lambda x: attend(x, 1),
    "_merge": lambda x: attend(x, 2),
}  # fmt: skip


def products() -> Any:
    """Imported late: it imports Triton."""
    from dllm_engine.kernels import products

    return products


def layer() -> Any:
    """See `products`."""
    from dllm_engine.kernels import layer

    return layer


def attend(x: torch.Tensor, splits: int) -> None:
    from dllm_engine.kernels.block_attention import block_attention

    q, keys = x.view(1, 1, 4, 64), torch.zeros(1, 1, 300, 64, dtype=x.dtype)
    block_attention(q, keys, keys, torch.zeros(1).long(), torch.full((1,), 290), splits=splits, early=True)


@pytest.mark.skipif(TRITON < (3, 5), reason="Triton before 3.5 cannot launch early")
@pytest.mark.parametrize("name", EARLY_KERNELS)
def test_early_kernels_wait(device: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Each waits once, before it touches anything, and lets the next come; without the wait the machine stops it."""
    from ptx import triton

    x = torch.zeros(4, 64).bfloat16()
    texts: list[str] = []

    def noted(text: str) -> Any:
        texts.append(text)
        return parse(text)

    monkeypatch.setattr(triton, "parse", noted)
    EARLY_KERNELS[name](x)
    assert name in device.launches
    for text in texts:
        assert len(re.findall(r"griddepcontrol\.wait\s*;", text)) == 1
        assert len(re.findall(r"griddepcontrol\.launch_dependents\s*;", text)) == 1
    device._compiled.clear()
    monkeypatch.setattr(
        triton, "parse", lambda text: parse(re.sub(r"griddepcontrol\.wait\s*;", "", text) if name in text else text)
    )
    with pytest.raises(Fault, match="launched early and does not wait"):
        EARLY_KERNELS[name](x)


@pytest.mark.skipif(ptx_cuda.NVCC is None, reason="no nvcc")
@pytest.mark.parametrize("rows", [20, 70])
def test_the_cuda_kernel_scores_rows(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    from dllm_engine import ops
    from dllm_engine.backends import BACKENDS

    monkeypatch.setitem(BACKENDS, "cuda", BACKENDS["cuda"])
    module = ptx_cuda.install(partial(monkeypatch.setattr, raising=False))
    hidden, head = matrices(rows, 448, 700, torch.bfloat16, peak=3.0)
    index = torch.arange(rows, dtype=torch.int32)
    stats = ops.row_stats(hidden, head, index, banned_ids=(0, 5, 699), excluded_ids=(5, 9), backend="cuda")
    compare(stats, truth(hidden, head, index, (0, 5, 699), (5, 9)))
    assert module.launches == 1


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["80", "90"])
@pytest.mark.parametrize(
    "file",
    [
        "test_row_stats.py",
        "test_decode_step.py",
        "test_block_attention.py",
        "test_layer_kernels.py",
        "test_products.py",
        "test_fused_layer.py",
        "test_block_calls.py",
    ],
)
def test_kernels_as_compiled(file: str, architecture: str) -> None:
    """The kernels' own tests; for sm_80 those of the CUDA kernel too."""
    pytest.importorskip("triton")
    run_tests(f"tests/{file}", DLLM_TEST_PTX=architecture, DLLM_BACKEND="triton")

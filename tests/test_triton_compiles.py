"""The Triton kernels compile for GPUs that are not here, without spilling registers."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
from_3_5 = pytest.mark.skipif(TRITON < (3, 5), reason="Triton before 3.5 cannot launch early")
from_3_6 = pytest.mark.skipif(TRITON < (3, 6), reason="the copy engine is used from Triton 3.6 on")
PTXAS = next((BIN / name for name in ("ptxas-blackwell", "ptxas") if (BIN / name).exists()), None)  # the newer one
POINTERS = {
    "rows": "i32", "banned": "i32", "excluded": "i32", "probe_ids": "i64", "probe_logits": "fp32",
    "noise_keys": "i64", "sequences": "i64", "undecided": "u8", "progress": "i64", "seeds": "i64", "floats": "fp32",
    "ints": "i32", "out_ids": "i64", "out_values": "fp32", "tokens": "i64", "quota": "i64", "bounds": "fp32",
    "weights": "fp32", "waiting_ids": "i64", "end_ids": "i64", "predicted": "i64", "first": "i64", "end": "i64",
    "parts": "fp32", "cos": "fp32", "sin": "fp32", "columns": "i64",
}  # fmt: skip
# pointers to the model's dtype
DATA = ("hidden", "head", "hidden_tiles", "head_tiles", "q", "keys", "values", "out", "x", "delta", "weight", "total")
DATA += ("qkv", "gate_up")
STRIDES = [f"{name}_{of}" for name in ("q", "key", "value", "out", "cache") for of in ("batch", "head", "row")]
STRIDES += ["hidden_stride", "head_stride", "x_row", "delta_row", "qkv_batch", "qkv_row", "table_batch", "table_row"]
# as Triton finds them for a real model
ALIGNED = (*DATA, *STRIDES, "dim", "parts", "cos", "sin", "columns", "size", "row_stride", "depth", "span")
ALIGNED += ("delta_part", "qkv_part", "part_stride")


def report(
    kernel: Any, constants: dict[str, Any], arch: int, warps: int, stages: int, dtype: str = "bf16",
    parts: tuple[str, ...] = (), tiles: dict[str, tuple[int, int]] | None = None, **more: Any,
) -> Any:  # fmt: skip
    """Registers a thread, bytes spilled and bytes of shared memory that ptxas reports. parts: pointers to float32.
    tiles: sizes of what the copy engine brings."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tiles = tiles or {}

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in tiles:
            return f"tensordesc<{dtype}{list(tiles[name])}>"
        if name in DATA:
            return "*fp32" if name in parts else f"*{dtype}"
        if name in POINTERS:
            return f"*{POINTERS[name]}"
        return "fp32" if name in ("temperature", "cut", "scale", "eps") else "i32"

    signature = {name: kind(name) for name in kernel.arg_names}
    at = {name: i for i, name in enumerate(kernel.arg_names)}
    attributes = {(at[name],): [["tt.divisibility", 16]] for name in ALIGNED if name in at and name not in tiles}
    source = ASTSource(kernel, signature, {(at[name],): value for name, value in constants.items()}, attributes)
    options = {"num_warps": warps, "num_stages": stages, **more}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    name = "sm_90a" if arch == 90 else f"sm_{arch}"
    command = [str(PTXAS), "-v", f"-arch={name}", "-o", "/dev/null", "/dev/stdin"]
    done = subprocess.run(command, input=compiled.asm["ptx"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    registers = int(re.search(r"Used (\d+) registers", done.stderr).group(1))  # type: ignore[union-attr]
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", done.stderr))
    return registers, spilled, compiled.metadata.shared, compiled.asm["ptx"]


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    if PTXAS is None:
        pytest.skip(f"no ptxas in {BIN}")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    from dllm_engine.kernels import decode_step

    if not hasattr(decode_step._score_rows, "arg_names"):
        pytest.skip("Triton was imported for the interpreter")
    return decode_step


@pytest.mark.slow
@pytest.mark.parametrize("step", [False, True])
@pytest.mark.parametrize("rows", [16, 32, 64, None])
@pytest.mark.parametrize(("arch", "copied"), [(80, False), (90, False), pytest.param(90, True, marks=from_3_6)])
def test_score_rows(kernels: Any, arch: int, copied: bool, rows: int | None, step: bool) -> None:
    if copied and rows == 16:
        pytest.skip("fewer rows than the copy engine is used for")
    config = (kernels.WIDE if arch == 90 else kernels.NARROW)[rows]
    tiles = {"hidden_tiles": (config.rows, config.depth), "head_tiles": (config.ids, config.depth)} if copied else {}
    constants = {
        "PROBES": 0, "SAMPLE": False, "STEP": step, "ALL_ROWS": False, "UPCAST": False, "COPIED": copied,
        "SEGMENT": kernels.SEGMENT,
        "ROWS": config.rows, "IDS": config.ids, "DEPTH": config.depth, "PART": kernels.PART,
    }  # fmt: skip
    registers, spilled, shared, ptx = report(
        kernels._score_rows, constants, arch, config.warps, config.stages, tiles=tiles
    )
    assert spilled == 0
    assert registers <= 255
    assert shared <= (99 if arch == 80 else 227) * 1024  # 99: of the small relatives of sm_80
    # weights come in while products are made
    assert ("cp.async.bulk.tensor.2d" if copied else "cp.async.c") in ptx
    assert ("cp.async.c" in ptx) != copied
    # from 64 rows on Hopper's own products, of which one is under way while the next part is waited for
    assert ("wgmma.wait_group.sync.aligned 1" in ptx) == (arch == 90 and rows not in (16, 32)), ptx
    assert "mma.sync" in ptx or "wgmma" in ptx


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("extra", [{"SAMPLE": True}, {"PROBES": 8}, {"SAMPLE": True, "PROBES": 8}, {"UPCAST": True}])
@pytest.mark.parametrize("count", [16, 1024])
@pytest.mark.parametrize("arch", [80, 90])
def test_score_rows_variants(kernels: Any, arch: int, count: int, extra: dict[str, Any], dtype: str) -> None:
    hidden = torch.empty(32, 8, dtype={"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype])
    config = kernels.config_for(hidden, hidden, count, "UPCAST" in extra, "UPCAST" not in extra)
    base = {
        "PROBES": 0, "SAMPLE": False, "STEP": False, "ALL_ROWS": True, "UPCAST": False, "COPIED": False,
        "SEGMENT": kernels.SEGMENT,
        "ROWS": config.rows, "IDS": config.ids, "DEPTH": config.depth, "PART": kernels.PART,
    }  # fmt: skip
    registers, spilled, _, _ = report(kernels._score_rows, base | extra, arch, config.warps, config.stages, dtype)
    assert registers <= 255
    assert spilled == 0


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("size", "position"), [(0, False), (32, False), (48, True), (128, True)])
def test_finish_step(kernels: Any, arch: int, size: int, position: bool) -> None:
    constants = {
        "DECIDED_IS_ONE": True, "POSITION": position, "FILTER": size, "FILTER_PAD": kernels._padded(size),
        "WIDTH": 32, "CHUNK": 32, "LINE": 2048,
    }  # fmt: skip
    registers, spilled, _, _ = report(kernels.finish_step, constants, arch, 8, 3)
    assert spilled == 0
    assert registers <= 255


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("step", [False, True])
def test_finish_rows(kernels: Any, arch: int, step: bool) -> None:
    constants = {"STEP": step, "ALL_ROWS": False, "SEGMENTS": 256, "ROWS": 1}
    registers, spilled, _, _ = report(kernels.finish_rows, constants, arch, 1, 3)
    assert spilled == 0
    assert registers <= 255


@pytest.fixture
def attention(kernels: Any) -> Any:
    from dllm_engine.kernels import block_attention

    return block_attention


TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize(
    ("dtype", "dim", "rows"),
    [("bf16", 128, 16), ("bf16", 128, 32), ("bf16", 128, 64), ("bf16", 64, 32), ("bf16", 64, 64), ("bf16", 16, 16),
     ("fp16", 128, 32), ("bf16", 256, 32), ("fp32", 16, 16), ("fp32", 64, 16), ("fp32", 128, 16), ("fp32", 256, 16)],
)  # fmt: skip
def test_attend(attention: Any, arch: int, direct: bool, dtype: str, dim: int, rows: int) -> None:
    config = attention.config_for(TORCH[dtype], dim, rows)
    assert config.rows == rows
    constants = {"DIRECT": direct, "UPCAST": False, "ROWS": config.rows, "KEYS": config.keys, "DIM": dim}
    constants["EARLY"] = early = arch == 90 and TRITON >= (3, 5)
    more = {"launch_pdl": True} if early else {}
    registers, spilled, shared, ptx = report(
        attention._attend, constants, arch, config.warps, config.stages, dtype, **more
    )
    assert spilled == 0
    assert registers <= 255
    assert shared <= (163 if arch == 80 else 227) * 1024
    assert "cp.async" in ptx  # keys come in while products are made
    assert dtype == "fp32" or "mma.sync" in ptx or "wgmma" in ptx


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dim", [16, 128, 256])
def test_merge_of_attention(attention: Any, arch: int, dim: int) -> None:
    constants = {"EARLY": False, "ROWS": attention.MERGE_ROWS, "DIM": dim}
    registers, spilled, _, _ = report(attention._merge, constants, arch, 4, 3)
    assert spilled == 0
    assert registers <= 255


@pytest.mark.slow
def test_attention_of_one_row(attention: Any) -> None:
    """Triton makes constants of arguments that are 1."""
    ones = dict.fromkeys(("packed", "width", "group", "key_heads", "segments"), 1)
    constants = ones | {"DIRECT": False, "UPCAST": False, "EARLY": False, "ROWS": 16, "KEYS": 64, "DIM": 64}
    assert report(attention._attend, constants, 90, 4, 3)[1] == 0
    assert report(attention._merge, ones | {"EARLY": False, "ROWS": attention.MERGE_ROWS, "DIM": 64}, 90, 4, 3)[1] == 0


@pytest.fixture
def layer(kernels: Any) -> Any:
    from dllm_engine.kernels import layer

    return layer


def check_elementwise(kernel: Any, constants: dict[str, Any], arch: int, warps: int, dtype: str) -> str:
    constants = {"PARTS": 0, "EARLY": False} | constants
    more = {"launch_pdl": True} if constants["EARLY"] else {}
    parts = ("delta", "qkv", "gate_up") if constants["PARTS"] else ()
    registers, spilled, _, ptx = report(kernel, constants, arch, warps, 3, dtype, parts, enable_fp_fusion=False, **more)
    assert spilled == 0
    assert registers * warps * 32 <= 65536
    # each product and sum is rounded, as in eager torch (a product of two bfloat16 may be an fma of bfloat16 and −0)
    assert not re.search(r"fma\S*\.f32", ptx)
    return str(ptx)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("size", [64, 4096, 16384])
def test_add_norm(layer: Any, arch: int, dtype: str, add: bool, size: int) -> None:
    block, warps = layer.norm_tile(size)
    ptx = check_elementwise(layer._add_norm, {"ADD": add, "BLOCK": block}, arch, warps, dtype)
    assert size < 4096 or "ld.global.v4" in ptx  # 16 bytes at once


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("dim", [16, 64, 128, 256])
def test_rope_write(layer: Any, arch: int, dtype: str, dim: int) -> None:
    constants = {"HEADS": layer.HALVES // (dim // 2), "HALF": dim // 2}
    ptx = check_elementwise(layer._rope_write, constants, arch, 2, dtype)
    assert "ld.global.v4" in ptx
    assert "st.global.v4" in ptx
    assert "bar.sync" not in ptx  # nothing goes through shared memory


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_silu_mul(layer: Any, arch: int, dtype: str) -> None:
    ptx = check_elementwise(layer._silu_mul, {"BLOCK": layer.BLOCK}, arch, 4, dtype)
    assert "ld.global.v4" in ptx
    assert "st.global.v4" in ptx


@pytest.mark.slow
@pytest.mark.parametrize("early", [False, pytest.param(True, marks=from_3_5)])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_layer_of_products_in_parts(layer: Any, dtype: str, early: bool) -> None:
    """LLaDA-8B's on Hopper: each reads 16 bytes at once."""
    common = {"PARTS": 4, "EARLY": early}
    block, warps = layer.norm_tile(4096)
    for kernel, constants, by in (
        (layer._add_norm, {"ADD": True, "BLOCK": block}, warps),
        (layer._rope_write, {"HEADS": layer.HALVES // 64, "HALF": 64}, 2),
        (layer._silu_mul, {"BLOCK": layer.BLOCK}, 4),
    ):
        ptx = check_elementwise(kernel, constants | common, 90, by, dtype)
        assert "ld.global.v4" in ptx
        assert ("griddepcontrol.wait" in ptx) == early


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "early"), [(80, False), (90, False), pytest.param(90, True, marks=from_3_5)])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(("rows", "gated"), [(16, False), (32, False), (32, True)])
def test_multiply(kernels: Any, arch: int, rows: int, gated: bool, dtype: str, early: bool) -> None:
    """Three programs fit onto a multiprocessor of sm_90, two of sm_80, and weights come in while products are made."""
    from dllm_engine.kernels import products

    config = products.CONFIG
    constants = {
        "WHOLE": True, "FULL": rows == 32, "GATED": gated, "EARLY": early, "UPCAST": False,
        "ROWS": rows, "FEATURES": config.features, "DEPTH": config.depth,
    }  # fmt: skip
    for out in ((),) if gated else ((), ("out",)):
        registers, spilled, shared, ptx = report(
            products._multiply, constants, arch, config.warps, config.stages, dtype, out,
            **({"launch_pdl": True} if early else {}),
        )  # fmt: skip
        assert spilled == 0
        programs = 2 if arch == 80 else 3
        assert programs * registers * config.warps * 32 <= 65536
        assert programs * (shared + 1024) <= (164 if arch == 80 else 228) * 1024
        assert "cp.async" in ptx
        assert ("wgmma.wait_group.sync.aligned 1" in ptx) == (arch == 90), ptx
        if early:
            waits, goes = (ptx.index(f"griddepcontrol.{word}") for word in ("wait", "launch_dependents"))
            assert waits < ptx.index("cp.async") < goes


@pytest.mark.slow
def test_layer_of_one(layer: Any) -> None:
    """Triton makes constants of arguments that are 1: one row, one head, one column."""
    ones = dict.fromkeys(("width", "heads", "key_heads"), 1) | {"HEADS": 4, "HALF": 8}
    check_elementwise(layer._rope_write, ones, 90, 2, "bf16")
    check_elementwise(layer._add_norm, {"size": 1, "x_row": 1, "delta_row": 1, "ADD": True, "BLOCK": 1}, 90, 1, "bf16")
    check_elementwise(layer._silu_mul, {"size": 1, "BLOCK": layer.BLOCK}, 90, 4, "bf16")

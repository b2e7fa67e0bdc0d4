from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

# Small tensors gain nothing by a second thread, and lose much where it waits for a core that something else has. Before
# torch is imported, and for the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from cases import INTERPRETED, PTX, all_isas, backend_params
from safetensors.torch import save_file

from dllm_engine import LLaDA, LLaDAConfig
from dllm_engine.backends import BACKENDS
from dllm_engine.built_in import DEMO_MODEL

GOLDEN = Path(__file__).parent / "golden"

if INTERPRETED:
    import interpreter

    interpreter.install()

if PTX:
    import ptx.cuda
    import ptx.triton

    ptx.triton.install(ptx.triton.Device(PTX), setattr)
    if PTX == 80:  # all that the CUDA kernel is made for
        ptx.cuda.install(setattr)


@pytest.fixture(scope="module")
def isas() -> Iterator[None]:
    """Each instruction set of the CPU kernel as a backend of its own."""
    with all_isas():
        yield


@pytest.fixture(params=backend_params(), ids=lambda value: "-".join(value) if isinstance(value, tuple) else None)
def where(request: pytest.FixtureRequest, isas: None) -> tuple[str, str]:
    """(backend, device)."""
    backend, device = request.param
    if device == "cuda" and (reason := BACKENDS[backend].unavailable):
        pytest.skip(reason)
    return backend, device


@pytest.fixture(autouse=True)
def one_at_a_time(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test on a GPU leaves nothing to the next.

    CUDA graphs of an earlier test's engine may hang in cycles, and a capture of another kind must not meet them. After
    a fault a process can use the device no more: one of several makes room for another, so that only that test fails.
    """
    on_gpu = request.node.get_closest_marker("gpu") is not None
    if on_gpu:
        gc.collect()
    yield
    if on_gpu and "PYTEST_XDIST_WORKER" in os.environ:
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # others may need what this one took
        except RuntimeError:
            os._exit(1)


@pytest.fixture(scope="session")
def golden_model() -> LLaDA:
    """The goldens' random checkpoint, float32 on the CPU; tests must not change it."""
    return LLaDA.from_pretrained(GOLDEN / "checkpoint", device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def demo_model() -> LLaDA:
    return LLaDA.from_pretrained(DEMO_MODEL, device="cpu", dtype="float32")


def tiny_config(**changes: Any) -> dict[str, Any]:
    """``config.json`` of a small model, with the goldens' keys."""
    raw = json.loads((GOLDEN / "checkpoint" / "config.json").read_text(encoding="utf-8"))
    sizes = {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "mlp_hidden_size": 48}
    ids = {"vocab_size": 60, "embedding_size": 64, "mask_token_id": 59, "eos_token_id": 1}
    return raw | sizes | ids | changes


def ending_model(seed: int = 5, **changes: Any) -> LLaDA:
    """A `tiny_model` with an end id that comes up now and then."""
    model = tiny_model(seed, **changes)
    model.lm_head[1] = model.lm_head[40] * 1.3
    return model


def tiny_model(
    seed: int = 0, scale: float = 1.0, *, shifted: bool = False, block_size: int = 0, **changes: Any
) -> LLaDA:
    """A random model in memory whose predictions are peaked enough that rounding decides nothing.

    ``shifted``: rows predict the column behind theirs, as Dream's do. ``block_size``: of block-causal attention.
    """
    config = replace(LLaDAConfig.from_dict(tiny_config(**changes)), shifted=shifted, block_size=block_size)
    model = LLaDA(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        with torch.no_grad():
            if parameter.ndim == 2:
                parameter.normal_(std=scale * 1.6 * parameter.shape[1] ** -0.5, generator=generator)
    return model.eval().requires_grad_(False)


SPECIAL = {
    126080: "<|startoftext|>",
    126081: "<|endoftext|>",
    126336: "<|mdm_mask|>",
    126346: "<|start_header_id|>",
    126347: "<|end_header_id|>",
    126348: "<|eot_id|>",
}
TEMPLATE = (
    "{% for m in messages %}{% if loop.first %}<|startoftext|>{% endif %}<|start_header_id|>{{ m['role'] }}"
    "<|end_header_id|> {{ m['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|> {% endif %}"
)


def eight_b_in_miniature(directory: Path) -> Path:
    """LLaDA-8B's config keys, vocabulary, ids, chat template and shards, with two small layers."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    directory.mkdir()
    sizes = {"d_model": 64, "mlp_hidden_size": 96, "vocab_size": 126464, "embedding_size": 126464}
    changes = sizes | {"mask_token_id": 126336, "eos_token_id": 126081, "pad_token_id": 126081}
    (directory / "config.json").write_text(json.dumps(tiny_config(**changes)), encoding="utf-8")
    model = tiny_model(**changes)
    tensors = {"model.transformer." + name: p.bfloat16().contiguous() for name, p in model.state_dict().items()}
    names = sorted(tensors)
    index = {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{i}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, directory / file)
        index |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    words = {SPECIAL.get(i, f"w{i}"): i for i in range(126349)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL.values()])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>", "mask_token": "<|mdm_mask|>", "chat_template": TEMPLATE,
    }  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory

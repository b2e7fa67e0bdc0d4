"""Loading: what is written is what is read, and a checkpoint that does not fit is refused by name."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config, tiny_model
from safetensors.torch import load_file, save_file

from dllm_engine import LLaDA, LLaDAConfig, decode
from dllm_engine.built_in import DEMO_MODEL
from dllm_engine.tokenizer import read_facts

PREFIX = "model.transformer."
IDS = torch.tensor([[3, 4, 59, 12, 40]])


def save(model: LLaDA, raw: dict[str, Any], directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    tensors = {PREFIX + name: p.to(dtype).contiguous() for name, p in model.state_dict().items()}
    save_file(tensors, directory / "model.safetensors")
    return directory


def edit(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    raw = json.loads(file.read_text(encoding="utf-8"))
    for key, value in changes.items():
        if value is None:
            raw.pop(key)
        else:
            raw[key] = value
    file.write_text(json.dumps(raw), encoding="utf-8")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save(tiny_model(), tiny_config(), tmp_path / "model")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_kv_heads": 2},
        {"n_kv_heads": 1},
        {"n_kv_heads": None, "multi_query_attention": True},
        {"weight_tying": True},
        {"include_qkv_bias": True},
        {"eos_token_id": [1, 2]},
        {"mlp_hidden_size": None, "mlp_ratio": 2},
        {"embedding_size": None, "vocab_size": 64},
    ],
    ids=lambda c: "-".join(c) or "plain",
)
def test_round_trip(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = tiny_model(**changes)
    loaded = LLaDA.from_pretrained(save(model, tiny_config(**changes), tmp_path / "m"), device="cpu")
    assert torch.equal(loaded(IDS), model(IDS))
    assert (loaded.mask_id, loaded.fill_id, loaded.vocab_size) == (59, 1, model.config.vocab_size)
    assert (loaded.lm_head.data_ptr() == loaded.wte.weight.data_ptr()) == bool(changes.get("weight_tying"))
    assert decode(loaded, [[3, 4]], gen_length=8, block_length=8).sequences.shape == (1, 10)


def test_grouped_query_attention_equals_repeated_heads(tmp_path: Path) -> None:
    grouped = tiny_model(n_kv_heads=2)
    full = tiny_model()
    state = grouped.state_dict()
    for name in list(state):
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            state[name] = state[name].view(2, 8, 32).repeat_interleave(2, 0).reshape(32, 32)
    full.load_state_dict(state)
    torch.testing.assert_close(grouped(IDS), full(IDS), atol=1e-5, rtol=1e-5)


def test_names_of_another_layout_are_told(tmp_path: Path) -> None:
    """It was said that the LM head is missing, and how this checkpoint names its tensors was not."""
    directory = save(tiny_model(), tiny_config(), tmp_path / "m")
    tensors = load_file(directory / "model.safetensors")
    save_file({name.removeprefix("model."): t for name, t in tensors.items()}, directory / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"the first is (model\.transformer\.blocks\S+); transformer\.blocks\S+, which"
    ):
        LLaDA.from_pretrained(directory, device="cpu")


@pytest.mark.parametrize("shards", [2, 3, 7])
def test_sharded(tmp_path: Path, shards: int, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model()
    directory = save(model, tiny_config(), tmp_path / "m")
    tensors = load_file(directory / "model.safetensors")
    weight_map = {}
    for i in range(shards):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {key: tensors[key] for key in list(tensors)[i::shards]}
        save_file(part, directory / name)
        weight_map |= dict.fromkeys(part, name)
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    assert torch.equal(LLaDA.from_pretrained(directory, device="cpu")(IDS), model(IDS))
    assert capsys.readouterr().err == "", "no bar where there is no terminal"

    (directory / f"model-00002-of-0000{shards}.safetensors").rename(directory / "gone")
    with pytest.raises(FileNotFoundError, match=f"1 of {shards} shards missing: model-00002"):
        LLaDA.from_pretrained(directory)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("wanted", [None, "bfloat16", torch.float32])
def test_dtypes(tmp_path: Path, stored: torch.dtype, wanted: Any) -> None:
    model = tiny_model()
    directory = save(model, tiny_config(), tmp_path / "m", stored)
    loaded = LLaDA.from_pretrained(directory, device="cpu", dtype=wanted)
    expected = {None: stored, "bfloat16": torch.bfloat16}.get(wanted, wanted)
    assert {p.dtype for p in loaded.parameters()} == {expected}
    assert torch.equal(loaded.wte.weight, model.wte.weight.to(stored).to(expected))
    with pytest.raises(ValueError, match="dtype: 'int8' given; allowed: float32, bfloat16, float16"):
        LLaDA.from_pretrained(directory, dtype="int8")


def test_a_stored_head_beside_tied_embeddings_must_equal_them(tmp_path: Path) -> None:
    directory = save(tiny_model(), tiny_config(), tmp_path / "m")
    edit(directory, weight_tying=True)
    with pytest.raises(ValueError, match="weight_tying true, but the stored LM head differs"):
        LLaDA.from_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    tensors[PREFIX + "ff_out.weight"] = tensors[PREFIX + "wte.weight"].clone()
    save_file(tensors, directory / "model.safetensors")
    LLaDA.from_pretrained(directory)
    del tensors[PREFIX + "ff_out.weight"]
    save_file(tensors, directory / "model.safetensors")
    LLaDA.from_pretrained(directory)
    embedding = tensors.pop(PREFIX + "wte.weight")
    save_file(tensors | {PREFIX + "ff_out.weight": embedding}, directory / "model.safetensors")
    with pytest.raises(ValueError, match=r"wte\.weight"):
        LLaDA.from_pretrained(directory)
    save_file(tensors | {PREFIX + "wte.weight": embedding}, directory / "model.safetensors")
    edit(directory, weight_tying=False)
    with pytest.raises(ValueError, match=r"weight_tying false, but .*ff_out.weight \(the LM head\) is not"):
        LLaDA.from_pretrained(directory)


def test_a_broken_tokenizer_config_is_named(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="tokenizer_config.json is not valid JSON"):
        read_facts(tmp_path)


def test_only_cpus_and_cuda_devices_are_taken() -> None:
    with pytest.raises(ValueError, match="device: 'mps' given; cpu, cuda or cuda:N allowed"):
        LLaDA.from_pretrained(DEMO_MODEL, device="mps")


def test_end_ids_come_from_config_generation_config_and_tokenizer(tmp_path: Path, demo_model: LLaDA) -> None:
    directory = save(tiny_model(), tiny_config(), tmp_path / "m")
    (directory / "generation_config.json").write_text('{"eos_token_id": [7, 1, 0]}', encoding="utf-8")
    assert LLaDA.from_pretrained(directory).end_ids == (1, 7, 0)  # the config's first
    (directory / "generation_config.json").write_text('{"eos_token_id": 64}', encoding="utf-8")
    with pytest.raises(ValueError, match="end id 64 .* outside the 64 rows"):
        LLaDA.from_pretrained(directory)
    mask = json.loads((directory / "config.json").read_text(encoding="utf-8"))["mask_token_id"]
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [mask]}), encoding="utf-8")
    with pytest.raises(ValueError, match=f"end id {mask} .* is the mask id"):
        LLaDA.from_pretrained(directory)
    assert demo_model.end_ids == (1, 4)  # <|endoftext|> and <|eot_id|>
    assert demo_model.vocab_size == len(demo_model.tokenizer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'; this engine runs 'llada'"),
        ({"mask_token_id": None}, r"'mask_token_id' is missing \(without it no position can be masked\)"),
        ({"d_model": None}, "key 'd_model' is missing"),
        ({"rms_norm_eps": None}, "key 'rms_norm_eps' is missing"),
        ({"weight_tying": None}, "key 'weight_tying' is missing"),
        ({"weight_tying": "false"}, "weight_tying is 'false'; true or false is needed"),
        ({"include_qkv_bias": "false"}, "include_qkv_bias is 'false'; true or false is needed"),
        ({"num_experts": 64, "d_model": None}, "key 'hidden_size' is missing"),
        ({"rope_theta": 0}, "rope_theta is 0.0, rms_norm_eps 1e-05; above 0 and at least 0 are needed"),
        ({"rms_norm_eps": -1}, "rms_norm_eps -1.0; above 0 and at least 0"),
        ({"eos_token_id": None}, "key 'eos_token_id' is missing"),
        ({"alibi": True}, "alibi is True; supported: False"),
        ({"activation_type": "gelu"}, "activation_type is 'gelu'; supported: 'silu' or 'swiglu'"),
        ({"block_type": "sequential"}, "block_type is 'sequential'; supported: 'llama'"),
        ({"mask_token_id": 64}, "mask_token_id 64 is outside the 64 embedding rows"),
        ({"mask_token_id": 1}, "mask_token_id 1 is also an eos_token_id"),
        ({"eos_token_id": []}, "eos_token_id is empty"),
        ({"n_heads": 5}, "d_model 32 over n_heads 5 must be a whole, even head size"),
        ({"n_kv_heads": 3}, "n_heads 4 is no multiple of n_kv_heads 3"),
        ({"embedding_size": 50}, "embedding_size 50 < vocab_size 60"),
        ({"n_layers": 0}, "n_layers is 0; it must be at least 1"),
        ({"d_model": "x"}, "config.json: d_model is 'x'; a whole number is needed"),
        ({"n_layers": 1.5}, "config.json: n_layers is 1.5; a whole number is needed"),
        ({"rope_theta": "abc"}, "config.json: rope_theta is 'abc'; a finite number is needed"),
        ({"rope_theta": float("inf")}, "config.json: rope_theta is inf; a finite number is needed"),
        ({"vocab_size": 0}, "config.json: vocab_size is 0; it must be at least 1"),
        ({"eos_token_id": [1, "x"]}, "config.json: eos_token_id is 'x'; a whole number is needed"),
        ({"n_layers": 3}, "6 tensors missing|tensors missing, the first is model.transformer.blocks.2"),
        ({"n_layers": 1}, "tensors that this model has no place for, the first: model.transformer.blocks.1"),
        ({"mlp_hidden_size": 40}, r"ff_proj.weight has shape \[48, 32\], config.json needs \[40, 32\]"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_config_errors(checkpoint: Path, changes: dict[str, Any], message: str) -> None:
    edit(checkpoint, **changes)
    with pytest.raises(ValueError, match=message):
        LLaDA.from_pretrained(checkpoint)


def test_file_errors(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no directory .*nowhere"):
        LLaDA.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is a file; give the checkpoint's directory"):
        LLaDA.from_pretrained(checkpoint / "config.json")
    weights = checkpoint / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="model.safetensors is truncated or not a safetensors file"):
        LLaDA.from_pretrained(checkpoint)
    tensors = {name: t.to(torch.int8) for name, t in tiny_model().state_dict().items()}
    save_file({PREFIX + name: t for name, t in tensors.items()}, weights)
    with pytest.raises(ValueError, match="is stored as I8; supported: F32, BF16, F16"):
        LLaDA.from_pretrained(checkpoint)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor model.safetensors.index.json"):
        LLaDA.from_pretrained(checkpoint)
    index = checkpoint / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"x": "../elsewhere.safetensors"}}', encoding="utf-8")
    with pytest.raises(ValueError, match="shard name '../elsewhere.safetensors' given; the name of a file beside it"):
        LLaDA.from_pretrained(checkpoint)
    index.write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="'weight_map' is missing or empty"):
        LLaDA.from_pretrained(checkpoint)
    (checkpoint / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        LLaDA.from_pretrained(checkpoint)
    (checkpoint / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        LLaDA.from_pretrained(checkpoint)


def test_only_what_the_index_lists_is_read(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").rename(checkpoint / "one.safetensors")
    save_file(tensors | {"optimiser.step": torch.zeros(1, dtype=torch.int64)}, checkpoint / "one.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "one.safetensors")}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert torch.equal(LLaDA.from_pretrained(checkpoint, device="cpu")(IDS), tiny_model()(IDS))


def test_a_whole_file_counts_before_an_index(checkpoint: Path) -> None:
    """Transformers saves the one over the shards of the other, and leaves the index, as it leaves no shard or all."""
    old = {name: tensor + 1 for name, tensor in load_file(checkpoint / "model.safetensors").items()}
    index = {"weight_map": dict.fromkeys(old, "model-00001-of-00001.safetensors")}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    for is_there in (False, True):
        if is_there:
            save_file(old, checkpoint / "model-00001-of-00001.safetensors")
        assert torch.equal(LLaDA.from_pretrained(checkpoint, device="cpu")(IDS), tiny_model()(IDS))


def test_an_index_that_promises_too_much(checkpoint: Path) -> None:
    tensors = checkpoint / "model.safetensors"
    names = [*load_file(tensors), PREFIX + "blocks.9.q_proj.weight"]
    tensors.rename(checkpoint / "one.safetensors")
    index = {"weight_map": dict.fromkeys(names, "one.safetensors")}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ValueError, match=r"promises .*blocks.9.q_proj.weight .* but it is not in the shard"):
        LLaDA.from_pretrained(checkpoint)


def test_remote_code_is_never_run(checkpoint: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    for name in ("modeling_llada.py", "configuration_llada.py", "tokenization_llada.py"):
        (checkpoint / name).write_text(f"open({str(marker)!r}, 'w')\n", encoding="utf-8")
    edit(checkpoint, auto_map={"AutoModel": "modeling_llada.LLaDAModelLM", "AutoConfig": "configuration_llada.X"})
    LLaDA.from_pretrained(checkpoint)
    assert not marker.exists()


def test_the_config_reads_llada_8b() -> None:
    """The keys and values that LLaDA-8B-Instruct publishes."""
    raw = tiny_config(
        d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, mlp_hidden_size=12288, vocab_size=126464,
        embedding_size=126464, mask_token_id=126336, eos_token_id=126081, max_sequence_length=4096,
    )  # fmt: skip
    config = LLaDAConfig.from_dict(raw)
    assert (config.head_dim, config.fill_id, config.mask_token_id) == (128, 126081, 126336)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory from /proc")
def test_loading_needs_little_more_than_the_weights(tmp_path: Path) -> None:
    """Peak anonymous memory at most 1.15 times the weights, over what the libraries themselves take."""
    changes = {"d_model": 512, "mlp_hidden_size": 1536, "n_layers": 16, "vocab_size": 16000, "embedding_size": 16000}
    model = tiny_model(mask_token_id=9, **changes)
    weights = sum(p.numel() * 4 for p in model.parameters())
    directory = save(model, tiny_config(mask_token_id=9, **changes), tmp_path / "m")
    tensors = load_file(directory / "model.safetensors")
    half = len(tensors) // 2
    for i, names in enumerate((list(tensors)[:half], list(tensors)[half:])):
        save_file({n: tensors[n] for n in names}, directory / f"{i}.safetensors")
    weight_map = {n: f"{int(i >= half)}.safetensors" for i, n in enumerate(tensors)}
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    script = f"""
import threading, time, torch
from safetensors.torch import load_file
from dllm_engine import LLaDA
import tqdm, safetensors
def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
torch.ones(1000, 1000) @ torch.ones(1000, 1000)
before, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
model = LLaDA.from_pretrained({str(directory)!r}, device="cpu")
peak = max(peak, anonymous())
done = True
thread.join()
print(peak - before)
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(out.stdout) <= 1.15 * weights, f"{int(out.stdout) / weights:.2f} times the weights"


def test_what_is_multiplied_together_lies_together(tmp_path: Path) -> None:
    """Loaded weights are joined without a second copy; replaced or copied ones fall back to their own matrices."""
    for changes in ({}, {"n_kv_heads": 2, "include_qkv_bias": True}):
        made = tiny_model(seed=3, **changes)
        save(made, tiny_config(**changes), tmp_path)
        model = LLaDA.from_pretrained(tmp_path, device="cpu", dtype="float32")
        joined = model.joined_weights()
        block, first = model.blocks[0], joined[0]
        assert first is not None
        assert torch.equal(first.qkv, torch.cat([p.weight for p in (block.q_proj, block.k_proj, block.v_proj)]))
        assert torch.equal(first.gate_up, torch.cat([block.ff_proj.weight, block.up_proj.weight]))
        assert first.qkv.data_ptr() == block.q_proj.weight.data_ptr()
        tokens, rope = torch.arange(12)[None], model.rope_tables(torch.arange(12)[None])
        apart = model.hidden_states(tokens, rope)
        torch.testing.assert_close(model.hidden_states(tokens, rope, joined=joined), apart, rtol=1e-5, atol=1e-5)
        block.k_proj.weight[0] += 1  # in place: seen by both
        assert torch.equal(first.qkv[model.config.d_model], block.k_proj.weight[0])
        block.k_proj.weight = torch.nn.Parameter(block.k_proj.weight * 2, requires_grad=False)
        assert model.joined_weights()[0] is None
        assert model.joined_weights()[1] is not None
        assert copy.deepcopy(model).joined_weights()[1] is None

"""Reading weights: safetensors on disk, or the tensors of a loaded transformers module. Nothing is unpickled."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dllm_engine.config import LLaDAConfig, read_json
from dllm_engine.model import LLaDA

PREFIX = "model.transformer."  # checkpoint name = PREFIX + the name in our module
HEAD = "ff_out.weight"
_FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TOGETHER = ("q_proj", "k_proj", "v_proj"), ("ff_proj", "up_proj")  # `Block.joined`
_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def load_pretrained(path: str | Path, *, device: str | torch.device | None, dtype: str | torch.dtype | None) -> LLaDA:
    """See `LLaDA.from_pretrained`."""
    target_dtype = _float_dtype(dtype)
    target = _device(device)
    directory = _find(path)
    config = LLaDAConfig.from_dict(read_json(directory / "config.json"), str(directory / "config.json"))
    shards = _shards(directory)
    model = _empty(config)
    tensors = _read(shards, model, config, target, target_dtype)
    _assign(model, tensors)
    _describe(model, directory)
    return model


def share_transformers(module: nn.Module, vocab_size: int | None) -> LLaDA:
    """See `LLaDA.from_transformers`."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"model: {type(module).__name__} given; a LLaDA or a loaded LLaDAModelLM is needed")
    raw = getattr(module, "config", None)
    if raw is None or not hasattr(raw, "to_dict"):
        raise ValueError(f"model: {type(module).__name__} has no transformers config; a loaded LLaDAModelLM is needed")
    config = LLaDAConfig.from_dict(raw.to_dict(), f"{type(module).__name__}.config")
    model = _empty(config)
    given = {n.removeprefix(PREFIX): p.detach() for n, p in module.named_parameters() if n.startswith(PREFIX)}
    if config.weight_tying and HEAD in given and given[HEAD].data_ptr() == given["wte.weight"].data_ptr():
        del given[HEAD]
    _match(model, {name: tuple(t.shape) for name, t in given.items()}, type(module).__name__)
    floats = {t.dtype for t in given.values()}
    if len(floats) != 1 or not floats <= set(_STORED.values()):
        raise ValueError(f"model: tensors are {sorted(map(str, floats))}; one of {', '.join(_FLOATS)} is needed")
    _assign(model, given)
    name = getattr(raw, "_name_or_path", "") or ""
    _describe(model, Path(name) if name and Path(name).is_dir() else None)
    if vocab_size is not None:
        if not 0 < vocab_size <= config.embedding_size:
            raise ValueError(f"vocab_size: {vocab_size} given; 1 to {config.embedding_size} (embedding rows) allowed")
        model.vocab_size = vocab_size
    return model


_WRAPPED: weakref.WeakKeyDictionary[nn.Module, LLaDA] = weakref.WeakKeyDictionary()


def wrapped(module: nn.Module) -> LLaDA:
    """`share_transformers`, kept with its engine while the module lives and its tensors are the same."""
    kept = _WRAPPED.get(module) if isinstance(module, nn.Module) else None
    if kept is None or _addresses(kept, "") != _addresses(module, PREFIX):
        kept = _WRAPPED[module] = share_transformers(module, None)
    return kept


def _addresses(module: nn.Module, prefix: str) -> dict[str, int]:
    named = ((n, p) for n, p in module.named_parameters() if n.startswith(prefix))
    return {n.removeprefix(prefix): p.data_ptr() for n, p in named}


# -- files ----------------------------------------------------------------------------------------------------------


def _find(path: str | Path) -> Path:
    directory = Path(path).expanduser()
    if directory.is_dir():
        return directory
    if directory.exists():
        raise ValueError(f"path: {directory} is a file; give the checkpoint's directory")
    name = str(path)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"path: no directory {directory} (and {name!r} is no hub id of the form 'owner/name')")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.txt"]  # never *.bin, never *.py
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub client raises its own, requests' and OS errors
        raise FileNotFoundError(f"path: no directory {name!r}, and the hub gave no such model ({error})") from error


def _shards(directory: Path) -> dict[Path, list[str] | None]:
    """Shard file -> the tensors that the index says it holds (None: no index, all that it holds)."""
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index}: 'weight_map' is missing or empty")
        shards: dict[Path, list[str] | None] = {}
        for name, file in weight_map.items():
            if Path(file).name != file:
                raise ValueError(f"{index}: shard name {file!r} leaves the directory")
            listed = shards.setdefault(directory / file, [])
            assert listed is not None
            listed.append(name)
        missing = [file.name for file in shards if not file.exists()]
        if missing:
            raise FileNotFoundError(
                f"{directory}: {len(missing)} of {len(shards)} shards missing: {', '.join(missing)}"
            )
        return shards
    if single.exists():
        return {single: None}
    raise FileNotFoundError(f"{directory}: neither model.safetensors nor model.safetensors.index.json is there")


def _read(
    shards: dict[Path, list[str] | None], model: LLaDA, config: LLaDAConfig, device: torch.device, dtype: Any
) -> dict[str, Tensor]:
    """Copy tensor by tensor out of the memory-mapped shards, so that beside the weights one tensor is held at most."""
    from safetensors import SafetensorError, safe_open
    from tqdm import tqdm

    files, stored, shapes = {}, {}, {}
    for file, listed in shards.items():
        try:
            files[file] = safe_open(file, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is truncated or not a safetensors file ({error})") from None
        held = set(files[file].keys())
        absent = sorted(set(listed or ()) - held)
        if absent:
            raise ValueError(f"{file}: the index promises {absent[0]} ({len(absent)} such) but it is not in the shard")
        for full in sorted(listed if listed is not None else held):
            name = full.removeprefix(PREFIX)
            part = files[file].get_slice(full)
            if part.get_dtype() not in _STORED:
                raise ValueError(f"{file}: {full} is stored as {part.get_dtype()}; supported: {', '.join(_STORED)}")
            stored[name], shapes[name] = (file, full), tuple(part.get_shape())

    if config.weight_tying and HEAD in stored and "wte.weight" in stored:
        head, embedding = (files[stored[n][0]].get_tensor(stored[n][1]) for n in (HEAD, "wte.weight"))
        if head.shape != embedding.shape or not torch.equal(head, embedding):
            raise ValueError("config.json says weight_tying true, but the stored LM head differs from the embedding")
        del stored[HEAD], shapes[HEAD]
    if not config.weight_tying and HEAD not in stored and "wte.weight" in stored:
        raise ValueError(f"config.json says weight_tying false, but {PREFIX}{HEAD} (the LM head) is not in the weights")
    _match(model, shapes, "the checkpoint")

    file, full = stored["wte.weight"]
    dtype = dtype or _STORED[files[file].get_slice(full).get_dtype()]
    tensors = _allocate(shapes, device, dtype)
    for file in tqdm(files, desc="loading shards", disable=len(files) == 1 or None, leave=False):
        for name, (where, full) in stored.items():
            if where == file:
                tensors[name].copy_(files[file].get_tensor(full))
    return tensors


def _allocate(shapes: dict[str, tuple[int, ...]], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Where the weights go; those of a layer that are multiplied by the same input lie one behind the other."""
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        layer, _, part = name.removesuffix(".weight").rpartition(".")
        group = next((group for group in _TOGETHER if part in group and name.endswith(".weight")), (part,))
        names = [f"{layer}.{member}.weight" for member in group] if len(group) > 1 else [name]
        if name == names[0]:
            rows = [shapes[member][0] for member in names]
            whole = torch.empty(sum(rows), *shape[1:], dtype=dtype, device=device)
            tensors |= zip(names, whole.split(rows), strict=True)
    return tensors


# -- module ---------------------------------------------------------------------------------------------------------


def _empty(config: LLaDAConfig) -> LLaDA:
    with torch.device("meta"):
        return LLaDA(config)


def uninitialised(config: LLaDAConfig, device: torch.device, dtype: torch.dtype) -> LLaDA:
    """A model whose weights lie as `load_pretrained` lays them, and are anything."""
    model = _empty(config)
    _assign(model, _allocate({name: tuple(p.shape) for name, p in model.named_parameters()}, device, dtype))
    return model


def _match(model: LLaDA, shapes: dict[str, tuple[int, ...]], source: str) -> None:
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    missing, unknown = sorted(expected.keys() - shapes.keys()), sorted(shapes.keys() - expected.keys())
    if missing:
        instead = f"; {unknown[0]}, which it has, is none of this model's" if unknown else ""
        raise ValueError(f"{source}: {len(missing)} tensors missing, the first is {PREFIX}{missing[0]}{instead}")
    if unknown:
        raise ValueError(f"{source}: {len(unknown)} tensors that this model has no place for, the first: {unknown[0]}")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise ValueError(
                f"{source}: {PREFIX}{name} has shape {list(shapes[name])}, config.json needs {list(shape)}"
            )


def _assign(model: LLaDA, tensors: dict[str, Tensor]) -> None:
    parameters = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}
    model.load_state_dict(parameters, assign=True)
    model.eval().requires_grad_(False)


def _describe(model: LLaDA, directory: Path | None) -> None:
    """Vocabulary, end ids (config first, then what generation config and tokenizer add) and defaults of `decode`."""
    from dllm_engine import generation_config
    from dllm_engine.tokenizer import read_facts

    model.path = directory
    if directory is None:
        return
    rows = model.config.embedding_size
    end_ids = list(model.config.eos_token_ids)
    generation = directory / generation_config.FILE
    if generation.exists():
        raw = read_json(generation)
        eos = raw.get("eos_token_id")
        end_ids += eos if isinstance(eos, list) else [] if eos is None else [eos]
        model.generation_defaults = generation_config.defaults(raw, str(generation))
    facts = read_facts(directory)
    end_ids += facts.end_ids
    for i in end_ids:
        if not 0 <= i < rows:
            raise ValueError(f"{directory}: end id {i} (generation config or tokenizer) is outside the {rows} rows")
    model.end_ids = tuple(dict.fromkeys(end_ids))
    if facts.size is not None:
        if facts.size > rows:
            raise ValueError(f"{directory}: the tokenizer has {facts.size} tokens, the embedding {rows} rows")
        model.vocab_size = facts.size


def _device(device: str | torch.device | None) -> torch.device:
    cuda = torch.cuda.is_available()
    if device is None:
        return torch.device("cuda" if cuda else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: {device!r} given; {str(error).splitlines()[0]}") from None
    if target.type not in ("cpu", "cuda"):
        raise ValueError(f"device: {device!r} given; cpu, cuda or cuda:N allowed")
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: {device!r} given; this torch sees {torch.cuda.device_count()} CUDA devices")
    return target


def _float_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or dtype in _FLOATS.values():
        return dtype  # type: ignore[return-value]
    name = str(dtype).removeprefix("torch.")
    if name not in _FLOATS:
        raise ValueError(f"dtype: {dtype!r} given; allowed: {', '.join(_FLOATS)}")
    return _FLOATS[name]

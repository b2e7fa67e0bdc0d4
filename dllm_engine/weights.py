"""Weights: read from safetensors, or shared with a loaded transformers module. Nothing is unpickled."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dllm_engine.config import LLaDAConfig, read_json
from dllm_engine.layers import Router

_PREFIX = "model.transformer."  # in LLaDA's checkpoints, before the names of our modules
_EMBEDDING, _HEAD = "wte.weight", "ff_out.weight"
_Names = dict[str, str]
# what others call our modules: the model's own, and those of a layer
_QWEN: tuple[_Names, _Names] = (  # LLaDA-MoE, Dream, SDAR, Fast-dLLM v2
    {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head", "blocks": "model.layers"},
    {
        "attn_norm": "input_layernorm", "ff_norm": "post_attention_layernorm",
        "q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj",
        "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm", "attn_out": "self_attn.o_proj",
        "ff_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj", "ff_out": "mlp.down_proj", "experts": "mlp",
    },
)  # fmt: skip
_LLADA2: tuple[_Names, _Names] = (
    _QWEN[0] | {"wte": "model.word_embeddings"},
    _QWEN[1] | {f"{part}_proj": "attention.query_key_value" for part in "qkv"}
    | {"q_norm": "attention.query_layernorm", "k_norm": "attention.key_layernorm", "attn_out": "attention.dense"},
)  # fmt: skip
_FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TOGETHER = ("q_proj", "k_proj", "v_proj"), ("ff_proj", "up_proj")  # `Block.joined`
_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.txt"]  # that are read; never *.bin, never *.py
_HEAD_BYTES, _SAMPLE = 2**16, 512  # see `digest`
_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def load_(
    module: nn.Module, config: LLaDAConfig, directory: Path, *, device: torch.device, dtype: torch.dtype | None
) -> None:
    """Give a module made on the meta device the weights of a checkpoint, in ``dtype`` or the checkpoint's own.

    Raises:
        FileNotFoundError, ValueError: the files are not all there, or hold something else than the module needs.
    """
    _assign(module, _read(_shards(directory), module, config, device, dtype))


def share_(module: nn.Module, config: LLaDAConfig, other: nn.Module) -> None:
    """Give a module made on the meta device the tensors of another one, of transformers, that is loaded.

    Raises:
        ValueError: other tensors than the module needs.
    """
    given, places = _tensors_of(other, config), places_of(module, config)
    _match(places, {name: tuple(t.shape) for name, t in given.items()}, type(other).__name__)
    _assign(module, {place.parameter: tensor for name, tensor in given.items() for place in places[name]})


def allocate_(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Weights that lie as `load_` lays them, and are anything."""
    _assign(module, _allocate(module, device, dtype))


def shares(module: nn.Module, config: LLaDAConfig, other: nn.Module) -> bool:
    """Whether the module's tensors are still those of the other one."""
    own = {_full_name(name, config): p.data_ptr() for name, p in module.named_parameters()}
    return own == {name: tensor.data_ptr() for name, tensor in _tensors_of(other, config).items()}


def _tensors_of(other: nn.Module, config: LLaDAConfig) -> dict[str, Tensor]:
    """A module's tensors by their names in a checkpoint, without an LM head that is the embedding."""
    roots = ("model.", "lm_head.") if _names(config) else _PREFIX
    given = {name: p.detach() for name, p in other.named_parameters() if name.startswith(roots)}
    head, embedding = (given.get(_full_name(name, config)) for name in (_HEAD, _EMBEDDING))
    if config.weight_tying and head is not None and embedding is not None and head.data_ptr() == embedding.data_ptr():
        del given[_full_name(_HEAD, config)]
    return given


# -- files ----------------------------------------------------------------------------------------------------------


def find(path: str | Path) -> Path:
    """Directory of a checkpoint, by path or hub id; see `LLaDA.from_pretrained`."""
    if (directory := local(path)) is not None:
        return directory
    from huggingface_hub import snapshot_download

    name = str(path)
    try:
        return Path(snapshot_download(name, allow_patterns=_FILES))
    except Exception as error:  # the hub client raises its own, requests' and OS errors
        raise FileNotFoundError(f"path: no directory {name!r}, and the hub gave no such model ({error})") from error


def loaded_from(config: Any) -> Path | None:
    """Where transformers read a module with this config: a directory, or the hub's snapshot in the cache; None if
    neither is there.
    """
    name = getattr(config, "_name_or_path", "") or ""
    if name and Path(name).is_dir():
        return Path(name)
    if name.count("/") != 1:
        return None
    from huggingface_hub import try_to_load_from_cache

    try:
        file = try_to_load_from_cache(name, "config.json", revision=getattr(config, "_commit_hash", None))
    except ValueError:  # no name that a hub id could have
        return None
    return Path(file).parent if isinstance(file, str) else None


def local(path: str | Path, argument: str = "path") -> Path | None:
    """The directory of this machine that is meant, or None: a hub id. Messages name the ``argument``.

    Raises:
        ValueError: a file. FileNotFoundError: neither a directory nor of the form of a hub id.
    """
    directory, name = Path(path).expanduser(), str(path)
    if not name:  # which would be this directory
        raise ValueError(f"{argument}: '' given; a checkpoint's directory or a hub id is needed")
    if directory.is_dir():
        return directory
    if directory.exists():
        raise ValueError(f"{argument}: {directory} is a file; give the checkpoint's directory")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"{argument}: no directory {directory} (and {name!r} is no hub id of the form 'owner/name')"
        )
    return None


def digest(path: Path) -> str:
    """What tells a checkpoint (or a file of one) from another one in its place, without reading all of it: of weights
    the first 64 KiB (names and shapes) and a thousand samples, everything else whole.
    """
    made = hashlib.sha256()
    found = {file for pattern in _FILES for file in path.glob(pattern) if file.is_file()} if path.is_dir() else {path}
    for file in sorted(found):
        size = file.stat().st_size
        made.update(f"{file.name} {size}\n".encode())
        with open(file, "rb") as stream:
            if file.suffix != ".safetensors":
                made.update(stream.read())
                continue
            made.update(stream.read(_HEAD_BYTES))
            for at in range(_HEAD_BYTES, size, max(size // 1024, _SAMPLE)):
                stream.seek(at)
                made.update(stream.read(_SAMPLE))
    return f"sha256 {made.hexdigest()[:16]}"


def _shards(directory: Path) -> dict[Path, list[str] | None]:
    """Shard file -> the tensors that the index says it holds (None: no index, all that it holds)."""
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if single.exists():  # first, as in transformers, which leaves the index of shards that were saved here before
        return {single: None}
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index}: 'weight_map' is missing or empty")
        shards: dict[Path, list[str] | None] = {}
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise ValueError(f"{index}: shard name {file!r} given; the name of a file beside it is needed")
            listed = shards.setdefault(directory / file, [])
            assert listed is not None
            listed.append(name)
        missing = [file.name for file in shards if not file.exists()]
        if missing:
            raise FileNotFoundError(
                f"{directory}: {len(missing)} of {len(shards)} shards missing: {', '.join(missing)}"
            )
        return shards
    raise FileNotFoundError(f"{directory}: neither model.safetensors nor model.safetensors.index.json is there")


def _read(
    shards: dict[Path, list[str] | None],
    module: nn.Module,
    config: LLaDAConfig,
    device: torch.device,
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """Copy tensor by tensor out of the memory-mapped shards, so that beside the weights one tensor is held at most."""
    from safetensors import SafetensorError, safe_open
    from tqdm import tqdm

    files, stored, shapes, places = {}, {}, {}, places_of(module, config)
    for file, listed in shards.items():
        try:
            files[file] = safe_open(file, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is truncated or not a safetensors file ({error})") from None
        held = set(files[file].keys())
        absent = sorted(set(listed or ()) - held)
        if absent:
            raise ValueError(f"{file}: the index promises {absent[0]} ({len(absent)} such) but it is not in the shard")
        for name in sorted(listed if listed is not None else held):
            part = files[file].get_slice(name)
            if part.get_dtype() not in _STORED:
                raise ValueError(f"{file}: {name} is stored as {part.get_dtype()}; supported: {', '.join(_STORED)}")
            stored[name], shapes[name] = file, tuple(part.get_shape())

    head, embedding = (_full_name(name, config) for name in (_HEAD, _EMBEDDING))
    tied, tying = config.weight_tying, "tie_word_embeddings" if _names(config) else "weight_tying"
    if tied and head in stored and embedding in stored:
        one, other = (files[stored[name]].get_tensor(name) for name in (head, embedding))
        if one.shape != other.shape or not torch.equal(one, other):
            raise ValueError(f"config.json says {tying} true, but the stored LM head differs from the embedding")
        del stored[head], shapes[head]
    if not tied and head not in stored and embedding in stored:
        raise ValueError(f"config.json says {tying} false, but {head} (the LM head) is not in the weights")
    _match(places, shapes, "the checkpoint")

    dtype = dtype or _STORED[files[stored[embedding]].get_slice(embedding).get_dtype()]
    tensors = _allocate(module, device, dtype)
    for file in tqdm(files, desc="loading shards", disable=len(files) == 1 or None, leave=False):
        for name, where in stored.items():
            if where == file:
                parts = files[file].get_tensor(name).split([place.shape[0] for place in places[name]])
                for place, part in zip(places[name], parts, strict=True):
                    tensors[place.parameter][place.at].copy_(part)
    return tensors


def _allocate(module: nn.Module, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Where the weights go; those of a layer that are multiplied by the same input lie one behind the other. A `Router`
    is in float32.
    """
    routers = tuple(f"{name}." for name, part in module.named_modules() if isinstance(part, Router))
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        layer, _, part = name.removesuffix(".weight").rpartition(".")
        group = next((group for group in _TOGETHER if part in group and name.endswith(".weight")), (part,))
        names = [f"{layer}.{member}.weight" for member in group] if len(group) > 1 else [name]
        if name == names[0]:
            rows = [shapes[member][0] for member in names]
            own = torch.float32 if name.startswith(routers) else dtype
            whole = torch.empty(sum(rows), *shape[1:], dtype=own, device=device)
            tensors |= zip(names, whole.split(rows), strict=True)
    return tensors


# -- module ---------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where a tensor of a checkpoint goes, or some of its rows: a parameter, or a part of one, and its shape."""

    parameter: str
    at: tuple[int | slice, ...]
    shape: tuple[int, ...]


def _names(config: LLaDAConfig) -> tuple[_Names, _Names] | None:
    """What others call our modules; None: LLaDA's are called as ours."""
    if config.routing is not None:
        return _LLADA2
    return _QWEN if config.num_experts or config.shifted or config.qk_norm else None


def _full_name(parameter: str, config: LLaDAConfig) -> str:
    """What a checkpoint calls a parameter (or what it is part of)."""
    if (names := _names(config)) is None:
        return _PREFIX + parameter
    outer, inner = names
    first, *others = parameter.split(".")
    return ".".join((outer[first], *(inner.get(part, part) for part in others)))


def places_of(module: nn.Module, config: LLaDAConfig) -> dict[str, list[Place]]:
    """Where each tensor of a checkpoint goes, by its name there: its rows to one place or several."""
    places: dict[str, list[Place]] = {}
    for name, p in module.named_parameters():
        stored = _full_name(name, config)
        parts: dict[str, tuple[int | slice, ...]] = {stored: ()}
        layer, _, part = stored.rpartition(".")
        if part == "gate_up":
            parts = {f"{layer}.experts.{e}.{n}": (e, h) for e in range(len(p)) for n, h in _halves(p).items()}
        elif part == "down":
            parts = {f"{layer}.experts.{e}.down_proj.weight": (e,) for e in range(len(p))}
        elif part == "shared_gate_up":
            parts = {f"{layer}.shared_experts.{n}": (h,) for n, h in _halves(p).items()}
        elif part == "shared_down":
            parts = {f"{layer}.shared_experts.down_proj.weight": ()}
        for full, at in parts.items():
            places.setdefault(full, []).append(Place(name, at, tuple(p[at].shape)))
    return places


def _halves(gate_up: Tensor) -> dict[str, slice]:
    """Which rows are whose. gate_up: [..., 2 F, D]."""
    half = gate_up.shape[-2] // 2
    return {"gate_proj.weight": slice(half), "up_proj.weight": slice(half, None)}


def _match(places: dict[str, list[Place]], shapes: dict[str, tuple[int, ...]], source: str) -> None:
    missing, unknown = sorted(places.keys() - shapes.keys()), sorted(shapes.keys() - places.keys())
    if missing:
        instead = f"; {unknown[0]}, which it has, is none of this model's" if unknown else ""
        raise ValueError(f"{source}: {len(missing)} tensors missing, the first is {missing[0]}{instead}")
    if unknown:
        raise ValueError(f"{source}: {len(unknown)} tensors that this model has no place for, the first: {unknown[0]}")
    for name, parts in places.items():
        given, needed = list(shapes[name]), [sum(part.shape[0] for part in parts), *parts[0].shape[1:]]
        if given != needed:
            raise ValueError(f"{source}: {name} has shape {given}, config.json needs {needed}")


def _assign(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    parameters = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}
    module.load_state_dict(parameters, assign=True)
    module.eval().requires_grad_(False)


# -- where and in what type -----------------------------------------------------------------------------------------


def device_of(device: str | torch.device | None) -> torch.device:
    """A device by name; a GPU if there is one, else the CPU, without."""
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


def dtype_of(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A float type by name."""
    if dtype is None or dtype in _FLOATS.values():
        return dtype  # type: ignore[return-value]
    name = str(dtype).removeprefix("torch.")
    if name not in _FLOATS:
        raise ValueError(f"dtype: {dtype!r} given; allowed: {', '.join(_FLOATS)}")
    return _FLOATS[name]

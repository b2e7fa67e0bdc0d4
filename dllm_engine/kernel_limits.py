"""Where `dllm_engine.kernels` can run and what they take, told without Triton: importing it takes a second."""

from __future__ import annotations

import importlib
import importlib.util
import os

import torch
from torch import Tensor

TRITON = (3, 2)  # the oldest that the kernels are written for
MAX_WIDTH = 128  # rows of a block
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (16, 32, 64, 128, 256)


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def devices() -> tuple[str, ...]:
    """Where tensors may be."""
    return ("cpu", "cuda") if interpreted() else ("cuda",)


def check_device(name: str, x: Tensor) -> None:
    if x.device.type not in devices():
        raise ValueError(f"{name}: on {x.device}; CUDA tensors, or TRITON_INTERPRET=1, which interprets, slowly")


def release(version: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int(part) for part in version.split(".")[:2])


def unavailable() -> str:
    """Why no kernel can run on this machine, "" if some can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; `pip install dllm-engine[triton]`"
    if not torch.cuda.is_available() and not interpreted():
        return "no CUDA device; TRITON_INTERPRET=1 interprets the kernels on the CPU, slowly"
    return ""


def too_old(device: torch.device, least: int) -> str:
    """Why a GPU of compute capability ``least``.0 is needed and this one is none, "" if it is."""
    major, minor = torch.cuda.get_device_capability(device)
    return "" if major >= least else f"compute capability {least}.0 is needed, this device has {major}.{minor}"


def block_attention_unavailable(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Why the kernel of `block_attention` cannot take tensors of this kind here, "" if it can.

    Triton is imported only where everything else fits.
    """
    if dtype not in DTYPES:
        return f"it takes bfloat16, float16 and float32, not {str(dtype).removeprefix('torch.')}"
    if head_dim not in HEAD_DIMS:
        return f"it takes heads of a power of two from {HEAD_DIMS[0]} to {HEAD_DIMS[-1]}, not of {head_dim}"
    if device.type not in devices():
        hint = "TRITON_INTERPRET=1 interprets it on the CPU, slowly"
        return f"it runs on cuda tensors, these are on {device.type}; {hint}"
    if reason := unavailable() or (too_old(device, 8) if device.type == "cuda" else ""):
        return reason
    try:
        version = importlib.import_module("triton").__version__
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    if release(version) < TRITON:
        return f"triton {TRITON[0]}.{TRITON[1]} or newer is needed, this is {version}"
    return ""

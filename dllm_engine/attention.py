"""Where attention to the cache can run as one kernel, `dllm_engine.kernels.block_attention`."""

from __future__ import annotations

import importlib
import importlib.util
import os

import torch

TRITON = (3, 2)  # the oldest that the kernels are written for
MAX_WIDTH = 128  # rows of a block


def block_attention_available(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """None if the kernel can take tensors of this kind here, else why it cannot.

    Triton is imported only where everything else fits: it takes a second.
    """
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"it takes bfloat16, float16 and float32, not {str(dtype).removeprefix('torch.')}"
    if not 16 <= head_dim <= 256 or head_dim & (head_dim - 1):
        return f"it takes heads of a power of two from 16 to 256, not of {head_dim}"
    if device.type not in (("cpu", "cuda") if interpreted else ("cuda",)):
        hint = "TRITON_INTERPRET=1 interprets it on the CPU, slowly"
        return f"it runs on cuda tensors, these are on {device.type}; {hint}"
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return "no CUDA device"
        if (capability := torch.cuda.get_device_capability(device)) < (8, 0):
            return f"compute capability 8.0 is needed, this device has {capability[0]}.{capability[1]}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; `pip install dllm-engine[triton]`"
    try:
        version = importlib.import_module("triton").__version__
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    if tuple(int(part) for part in version.split(".")[:2]) < TRITON:
        return f"triton {TRITON[0]}.{TRITON[1]} or newer is needed, this is {version}"
    return None

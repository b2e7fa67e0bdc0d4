"""Storage that outlives a call, and the check that it fits before it is allocated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Buffers:
    """Flat storages by name. A call takes contiguous views of the shapes that it needs, so that small batches of long
    prompts and large ones of short prompts share the same bytes, and kernels see the strides of a fresh tensor.

    Storages start as zeros and only grow; a view holds what the call before left there.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flat: dict[str, Tensor] = {}
        self.graphs: dict[Any, Any] = {}  # of `graphs.BlockCalls`: they hold addresses in these storages
        self.graphs_work = True
        self._pool: Any = None
        self._stream: Any = None

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The first elements of storage ``name`` as ``shape``; views taken before a growth keep the old bytes.

        Raises:
            MemoryError: the storage must grow and the device has not that many bytes left.
        """
        count = math.prod(shape)
        flat = self._flat.get(name)
        if flat is None or flat.numel() < count or flat.dtype != dtype:
            del flat
            self.drop_graphs(0)
            self._flat.pop(name, None)  # freed first: old and new need not fit beside each other
            check_fits(name, count * dtype.itemsize, self.device)
            flat = self._flat[name] = torch.zeros(count, dtype=dtype, device=self.device)
        return flat[:count].view(*shape)

    def zero(self) -> None:
        """Back to zeros: after a failed call, whose NaNs would get through a mask (0 · NaN is NaN)."""
        for flat in self._flat.values():
            flat.zero_()

    def drop_graphs(self, keep: int) -> None:
        """All but the ``keep`` graphs that were used last."""
        if len(self.graphs) > keep:
            for key in [*self.graphs][: len(self.graphs) - keep]:
                del self.graphs[key]
            if not any(self.graphs.values()):
                self._pool = None  # torch takes none again that its last graph left: cuBLAS's workspace is still there

    def graph_memory(self) -> dict[str, Any]:
        """Where graphs are captured. All share their memory, for they never run at once: `torch.cuda.graph`'s options.

        With nobody else: cuBLAS has a workspace for each stream, which torch (from 2.12 on) frees with any graph that
        was captured on it.
        """
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        return {"pool": self._pool, "stream": self._stream}

    @property
    def nbytes(self) -> int:
        """Bytes of all storages."""
        return sum(flat.nbytes for flat in self._flat.values())


def available_bytes(device: torch.device) -> int | None:
    """Bytes that an allocation may take now; None where the system does not tell."""
    if device.type == "cuda":
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reusable
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return None
    for line in meminfo.read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def check_fits(name: str, needed: int, device: torch.device) -> None:
    """Raise MemoryError if ``needed`` bytes are more than the device has left."""
    available = available_bytes(device)
    if available is not None and needed > available:
        raise MemoryError(
            f"{name}: {needed:,} bytes needed, {available:,} available on {device};"
            " fewer sequences at once or shorter ones need less"
        )

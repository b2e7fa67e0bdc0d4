"""Block calls of ``dual`` as CUDA graphs: forward and fused step in one launch from the host.

A graph replays kernels with the addresses and shapes that were captured. So a call here reads all that changes from
the device (blocks, ends, padding, which sequences), always computes whole blocks, and is filled up with the state's
idle row to one of few sizes.
"""

from __future__ import annotations

import gc
import os
import warnings
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dllm_engine import ops
from dllm_engine.buffers import Buffers
from dllm_engine.forward import Forward, additive
from dllm_engine.kernel_limits import MAX_WIDTH, block_attention_unavailable
from dllm_engine.kv_cache import LayerCache
from dllm_engine.layers import Joined, Kernels
from dllm_engine.options import Options
from dllm_engine.rules import Rule

MOST = 32  # graphs kept by an engine


def supported(forward: Forward, options: Options) -> bool:
    """Whether block calls can be of this kind, if the fused step decides: on a GPU, without guidance."""
    return forward.model.device.type == "cuda" and options.cache.name == "dual" and not options.cfg_scale


class Kept(NamedTuple):
    """A graph and the tensors that must live as long."""

    graph: Any
    tensors: list[Any]


class BlockCalls:
    """The block calls of one decode; graphs are kept with the buffers, for later decodes of the same shape."""

    def __init__(
        self, forward: Forward, rule: Rule, end_ids: Tensor | None, scoring: dict[str, Any], buffers: Buffers
    ) -> None:
        self.forward, self.model, self.buffers, self.end_ids, self.scoring = (
            forward, forward.model, buffers, end_ids, scoring
        )  # fmt: skip
        self.state = forward.state.with_idle
        device, length = self.model.device, self.state.length
        sequences = buffers.take("joined", (self.state.batch,), torch.int64)
        # a later decode with other bounds or another filter of that size replays the same graph
        bounds = buffers.take("bounds", rule.bounds.shape, torch.float32).copy_(rule.bounds)
        weights = buffers.take("weights", rule.weights.shape, torch.float32).copy_(rule.weights)
        self.sequences, self.rule = sequences, replace(rule, bounds=bounds, weights=weights)
        self.layers = [self._kept(i, layer, buffers) for i, layer in enumerate(forward.joined)]
        computed = forward.state.alignment if forward.opens else self.state.block_length
        self.offsets = torch.arange(-forward.shift, computed, device=device)
        self.every = torch.arange(length + 1, device=device)
        self.idle = torch.tensor(self.state.idle, device=device)
        self.rows = torch.arange(self.state.batch, device=device)[:, None]
        reason = block_attention_unavailable(device, self.model.dtype, self.model.config.head_dim)
        self.by_kernel = not reason and len(self.offsets) <= MAX_WIDTH
        self.kernels = self._layer_kernels() if self.by_kernel else Kernels.NONE
        self.altered = self.model.altered()
        self.joined: list[int] = []
        ids = tuple(tuple(t.tolist()) for t in (scoring["banned_ids"], scoring["excluded_ids"]))  # host: once a decode
        self.key = (
            self.state.batch, self.state.prompt_length, length, self.state.block_length,
            rule.bounds.shape, rule.weights.shape, rule.cut, rule.decided_is_one, rule.position, rule.ends_wait,
            *ids, end_ids is None, scoring["temperature"], scoring["backend"], self.model.dtype,
            self.kernels, self.altered, self.model.config, tuple(p.data_ptr() for p in self.model.parameters()),
        )  # fmt: skip

    @staticmethod
    def _kept(i: int, layer: Joined | None, buffers: Buffers) -> Joined | None:
        """Biases that were joined for this decode lie where a graph of an earlier one reads them."""
        if layer is None or layer.bias is None:
            return layer
        return layer._replace(bias=buffers.take(f"bias {i}", layer.bias.shape, layer.bias.dtype).copy_(layer.bias))

    def __call__(self, joining: list[int]) -> None:
        """One block call of ``joining``, the sequences of the first cache slots in order, and its commit."""
        count = min(1 << (len(joining) - 1).bit_length(), self.state.batch - 1)
        if joining != self.joined:
            filled = torch.tensor(joining + [self.state.batch - 1] * (self.state.batch - len(joining)), device="cpu")
            pinned = filled.pin_memory() if self.model.device.type == "cuda" else filled
            self.sequences.copy_(pinned, non_blocking=True)
            self.joined = joining
        with torch.cuda.device_of(self.sequences):  # graphs and Triton's kernels belong to the current device
            self._run(count)

    def _run(self, count: int) -> None:
        if not self.captures:
            self._call(count)
            return
        graphs, key = self.buffers.graphs, (count, *self.key)
        if key in graphs and graphs[key] is None:  # the first call compiled its kernels
            graphs[key] = self._capture(count)
        kept = graphs[key] = graphs.pop(key, None)  # the last in order is the last that was used
        if kept is None:
            self._call(count)
        else:
            kept.graph.replay()
        self.buffers.drop_graphs(MOST)

    def _layer_kernels(self) -> Kernels:
        """What ``DLLM_LAYER_KERNELS`` asks for, as far as this model allows; docs/kernels.md tells what there is."""
        allowed = {str(int(kernels)): kernels for kernels in Kernels}
        given = os.environ.get("DLLM_LAYER_KERNELS", "2")
        if given not in allowed:
            raise ValueError(f"DLLM_LAYER_KERNELS: {given!r} given; {', '.join(allowed)} allowed")
        from dllm_engine.kernels import early, layer

        kernels = allowed[given]
        if kernels is Kernels.EARLY and (reason := early.unavailable(self.model.device)):
            raise ValueError(f"DLLM_LAYER_KERNELS: {given} cannot be had here: {reason}")
        config = self.model.config
        fits = config.d_model <= layer.MAX_SIZE and not config.num_experts and not config.qk_norm
        return kernels if all(self.forward.joined) and fits else Kernels.NONE

    @property
    def captures(self) -> bool:
        """Whether calls become graphs; ``DLLM_GRAPHS=0`` runs the same calls kernel by kernel, as hooks need it."""
        wanted = os.environ.get("DLLM_GRAPHS", "1") != "0" and not self.altered
        return wanted and self.model.device.type == "cuda" and self.buffers.graphs_work

    def _capture(self, count: int) -> Kept | None:
        """The call as a graph (capturing computes nothing); None, with a warning, where that fails."""
        graph, stream, collects = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), gc.isenabled()
        gc.disable()  # to destroy a graph that some cycle held would break off the capture
        try:
            # what other threads allocate meanwhile is their business
            with torch.cuda.graph(graph, **self.buffers.graph_memory(), capture_error_mode="thread_local"):
                self._call(count)
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # a capture that cannot be ended leaves its own as the current one
            self.buffers.graphs_work = False
            warnings.warn(f"block calls run without CUDA graphs: {error}", stacklevel=2)
            return None
        finally:
            if collects:
                gc.enable()
        return Kept(graph, self._tensors())

    def _tensors(self) -> list[Any]:
        """What a graph reads beside buffers and weights; not this object, which holds the model."""
        own = [self.offsets, self.every, self.idle, self.rows, self.end_ids, self.model._rope, self.layers]
        return [*own, self.state.end_ids, *self.scoring.values()]

    def _call(self, count: int) -> None:
        model, state, length = self.model, self.state, self.state.length
        sequences = self.sequences[:count]
        state.progress[-1] = self.idle  # a step moves it on
        start, end = state.block_start[sequences, None], state.active_end[sequences, None]
        first = start
        if self.forward.causal:
            first = self.forward.state.home(start)
            end = torch.minimum(end, first + self.forward.state.alignment)
        columns = first + self.offsets
        padding = state.padding[sequences, None]
        rope = model.rope_tables((columns - padding).clamp_min(0))
        # rows behind the end go to the spare column, and all of the idle one's: their slots are other sequences'
        written = torch.where((columns < end) & (start < end), columns, length)
        assert self.forward.kv is not None
        caches = [
            LayerCache(k[:count], v[:count], written, self.rows[:count], (k[:count], v[:count]))
            for k, v in self.forward.kv.layers
        ]
        seen: Tensor | tuple[Tensor, Tensor]
        if self.by_kernel:
            seen = padding[:, 0], end[:, 0]
        else:
            seen = additive(((self.every < padding) | (self.every >= end))[:, None], model.dtype)
        tokens = state.tokens[sequences[:, None], columns]
        hidden = model.hidden_states(tokens, rope, seen, caches, self.layers, self.kernels)
        if self.forward.opens:
            at = start - first + self.every[: state.block_length]
            hidden = torch.cat((self.forward.kept[sequences], hidden), dim=1)
            hidden = hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[-1]))
        hidden = hidden[:, : state.block_length]
        ops.decode_step_(
            hidden, model.lm_head, state, sequences, self.rule, end_ids=self.end_ids, known=True, **self.scoring
        )

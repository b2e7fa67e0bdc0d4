"""The engine: owns the buffers of decoding, runs batches, and keeps its rows busy over any number of prompts."""

from __future__ import annotations

import atexit
import math
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from dllm_engine import checks, continuous, inputs, weights
from dllm_engine.buffers import Buffers
from dllm_engine.config import LLaDAConfig
from dllm_engine.continuous import Scheduler
from dllm_engine.forward import Forward
from dllm_engine.kv_cache import KVCache
from dllm_engine.loop import Loop
from dllm_engine.model import LLaDA
from dllm_engine.options import Options, default, resolve_backend
from dllm_engine.outputs import DecodeOutput, Generated, own
from dllm_engine.policies import Policy
from dllm_engine.refresh import Cache
from dllm_engine.state import DecodeState
from dllm_engine.streaming import stream_to
from dllm_engine.uncompiled import uncompiled

_KEEPING = threading.Lock()
_KEPT: weakref.WeakKeyDictionary[nn.Module, Engine] = weakref.WeakKeyDictionary()
_OPEN: weakref.WeakSet[Iterator[Generated]] = weakref.WeakSet()  # iterators that nobody may have finished


@atexit.register
def _close_iterators() -> None:
    """Before the interpreter takes away what their own end needs."""
    for results in [*_OPEN]:
        with suppress(ValueError):  # one that another thread is in
            results.close()  # type: ignore[attr-defined]


class Engine:
    """Decodes with buffers that are allocated once and used again by every call.

    Calls from several threads queue. While an iterator of `generate_many` is open, other calls raise.
    """

    def __init__(
        self,
        model: LLaDA | nn.Module,
        *,
        max_batch: int,
        max_length: int,
        cache: str | Cache | None = None,
        backend: str = "auto",
    ) -> None:
        """Allocates canvas and KV cache; guidance doubles it when first used.

        Args:
            max_batch: sequences at once.
            max_length: columns of one: prompt, its padding, generation.
            cache, backend: what the calls use if they do not say; without a cache here, `decode`'s default.

        Raises:
            TypeError, ValueError, RuntimeError: a bad argument, or a backend that cannot run here.
            MemoryError: the device has not that many bytes left.
        """
        checks.check_counts(max_batch=max_batch, max_length=max_length)
        loaded = model if isinstance(model, LLaDA) else LLaDA.from_transformers(model)
        loaded.check_weights()
        resolve_backend(backend, loaded, 0.0)
        self.cache: Cache | None = Cache.of(default(loaded, "cache") if cache is None else cache)
        self.max_batch, self.max_length, self.backend = max_batch, max_length, backend
        self._model: Callable[[], LLaDA | None] = lambda: loaded
        self._buffers: Buffers | None = Buffers(loaded.device)
        self._lock = threading.RLock()  # re-entrant: a streamer that calls its own engine gets an error, not a deadlock
        self._busy = self._grows = False
        columns = max_length + 2 * loaded.config.block_size  # whole blocks: see `DecodeState`
        with torch.inference_mode():
            if self.cache.name != "none":
                self._buffers.take("KV cache", KVCache.shape(loaded.config, max_batch, columns), loaded.dtype)
            DecodeState.rows(self._buffers, max_batch, columns)
            Forward.take_kept(self._buffers, loaded, max_batch)

    @classmethod
    def kept(cls, model: LLaDA | nn.Module) -> Engine:
        """The one that `dllm_engine.decode` keeps while a model lives; it grows with the calls.

        A transformers module gets another one when its tensors are other ones.
        """
        with _KEEPING:
            engine = _KEPT.get(model) if isinstance(model, nn.Module) else None
            if engine is None or not engine._is_of(model):
                engine = cls(model, max_batch=1, max_length=1, cache="none")
                engine._grows, engine.cache = True, None
                if isinstance(model, LLaDA):
                    engine._model = weakref.ref(model)  # what holds its own key would never leave the table
                _KEPT[model] = engine
            return engine

    @property
    def model(self) -> LLaDA:
        model = self._model()
        assert model is not None  # only `kept` holds it weakly, and is reached through it
        return model

    def _is_of(self, model: nn.Module) -> bool:
        """Whether a module's tensors are those of this engine's model, and so are its sizes and ids."""
        if model is self.model:
            return True
        if not weights.shares(self.model, self.model.config, model):
            return False
        config: Any = model.config
        settings, own = config.to_dict(), self.model.config
        for key, value in (("mask_token_id", own.mask_token_id), ("eos_token_id", list(own.eos_token_ids))):
            if settings.get(key) is None:  # the tokenizer said it
                settings[key] = value
        return LLaDAConfig.from_dict(settings, "model.config") == own

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return self._buffers.nbytes if self._buffers is not None else 0

    def close(self) -> None:
        """Give the buffers back (what is running ends first); later calls raise RuntimeError."""
        with self._lock:
            self._buffers = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    @uncompiled
    @torch.inference_mode()
    def decode(
        self,
        input_ids: Tensor | Sequence[Sequence[int]],
        *,
        attention_mask: Tensor | None = None,
        gen_length: int | None = None,
        block_length: int | None = None,
        steps: int | None = None,
        policy: Policy | str | None = None,
        cache: str | Cache | None = None,
        temperature: float | None = None,
        cfg_scale: float | None = None,
        end_of_text: str | None = None,
        seed: int | Sequence[int] | None = None,
        backend: str | None = None,
        streamer: Any = None,
    ) -> DecodeOutput:
        """See `dllm_engine.decode`; ``cache`` and ``backend`` are by default the engine's.

        Raises:
            ValueError: also for more than the engine's ``max_batch`` or ``max_length``.
            RuntimeError: also if the engine is closed, or an iterator of `generate_many` is open.
            MemoryError: guidance needs twice the KV cache, and it does not fit.
        """
        model = self.model
        prompt, padding = inputs.check_prompt(model, input_ids, attention_mask)
        options = Options.resolve(
            model,
            longest_prompt=prompt.shape[1] - int(padding.min()),  # host: input checks, once per decode
            gen_length=gen_length,
            block_length=block_length,
            steps=steps,
            policy=policy,
            cache=self.cache if cache is None else cache,
            temperature=temperature,
            cfg_scale=cfg_scale,
            end_of_text=end_of_text,
            backend=self.backend if backend is None else backend,
        )
        return self.run(prompt, padding, options, checks.check_seeds(seed, len(prompt)), streamer)

    def run(
        self, prompt: Tensor, padding: Tensor, options: Options, seeds: list[int], streamer: Any = None
    ) -> DecodeOutput:
        """`decode` on checked arguments; in inference mode."""
        batch, length = len(prompt), prompt.shape[1] + options.gen_length
        if not self._grows and (batch > self.max_batch or length > self.max_length):
            raise ValueError(
                f"input_ids: {batch} sequences of {length} columns given;"
                f" this engine was made for {self.max_batch} of {self.max_length}"
            )
        with self._lock, self._lent() as buffers:
            model = self.model
            state = DecodeState(
                prompt,
                padding,
                gen_length=options.gen_length,
                block_length=options.block_length,
                steps=options.steps,
                seeds=seeds,
                mask_id=model.mask_id,
                fill_id=model.fill_id,
                end_ids=model.end_ids,
                buffers=buffers,
                alignment=options.alignment,
            )
            stream = stream_to(streamer, state, list(range(batch)))
            loop = Loop(model, state, options, buffers)

            def described(b: int, column: int) -> str:
                return f"sequence {b} at position {column - state.spans[b].first + prompt.shape[1]}"

            try:
                while joined := loop.step():
                    loop.check(joined, described)
                    if stream is not None:
                        stream.step(joined, loop.where)
            finally:
                loop.close()
            if stream is not None:
                stream.end()
            sequences = state.sequences_of(prompt)
            is_end = torch.isin(sequences[:, prompt.shape[1] :], loop.end_ids)
            with torch.inference_mode(False):
                return DecodeOutput(
                    sequences=own(sequences),
                    forward_passes=loop.passes,
                    sequence_passes=torch.tensor(loop.taken, device=state.tokens.device),
                    generated_tokens=own((is_end.cumsum(1) == 0).sum(1)),
                    settings=options.told(seeds),
                )

    def generate_many(
        self,
        prompts: Iterable[Sequence[int] | Tensor],
        *,
        gen_length: int | None = None,
        block_length: int | None = None,
        steps: int | None = None,
        policy: Policy | str | None = None,
        cache: str | Cache | None = None,
        temperature: float | None = None,
        cfg_scale: float | None = None,
        end_of_text: str | None = None,
        seed: int | Sequence[int] | None = None,
        backend: str | None = None,
        streamer: Callable[[int, Tensor], Any] | None = None,
        progress: bool = False,
    ) -> Iterator[Generated]:
        """Decode any number of prompts, ``max_batch`` at a time, and yield each as soon as it is finished.

        Results come **in order of completion**; ``index`` says of which prompt. Each equals the `decode` of that prompt
        alone with seed ``seed + index``, or ``seed[index]`` of a list. A prompt is taken from ``prompts`` only when a
        row is free for it. Until the iterator is exhausted or closed, the engine takes no other call.

        Args:
            prompts: lists of ids or LongTensors [P], of at most ``max_length - gen_length`` tokens each.
            streamer: called once a committed block with the prompt's index and a LongTensor.
            progress: draw a bar.

        Raises:
            TypeError, ValueError: a bad option, at once; a bad prompt, by its index, after everything before it has
                been yielded. So is what ``prompts`` raises.
            RuntimeError: as for `decode`; on NaN, naming prompt and position.
        """
        model = self.model
        options = Options.resolve(
            model,
            longest_prompt=1,
            gen_length=gen_length,
            block_length=block_length,
            steps=steps,
            policy=policy,
            cache=self.cache if cache is None else cache,
            temperature=temperature,
            cfg_scale=cfg_scale,
            end_of_text=end_of_text,
            backend=self.backend if backend is None else backend,
        )
        self._check_rows(options)
        if not isinstance(prompts, Iterable) or isinstance(prompts, str):
            raise TypeError(f"prompts: {type(prompts).__name__} given; an iterable of lists of ints is needed")
        if streamer is not None and not callable(streamer):
            raise TypeError(f"streamer: {type(streamer).__name__} given; generate_many takes a callable")
        results = self._many(prompts, options, checks.seeds_of(seed), streamer, progress)
        _OPEN.add(results)
        return results

    @torch.inference_mode()
    def _many(
        self,
        prompts: Iterable[Sequence[int] | Tensor],
        options: Options,
        seed_of: Callable[[int], int],
        streamer: Callable[[int, Tensor], Any] | None,
        progress: bool,
    ) -> Iterator[Generated]:
        with self.scheduler(options, streamer) as scheduler:
            buffers = self._buffers
            results: Iterable[Generated] = continuous.generate(scheduler, prompts, seed_of)
            if progress:
                from tqdm import tqdm

                total = len(prompts) if isinstance(prompts, Sequence | Tensor) else None
                results = tqdm(results, total=total, unit="prompt")
            for result in results:
                yield result
                if self._buffers is not buffers:
                    raise RuntimeError("this engine was closed while it was generating")

    def _check_rows(self, options: Options) -> None:
        if options.policy.of_one_batch:
            raise ValueError(f"policy: {type(options.policy).__name__} belongs to one batch; give it to decode()")
        if self.max_length <= options.gen_length:
            raise ValueError(
                f"gen_length: {options.gen_length} given; max_length {self.max_length} leaves no room for a prompt"
            )

    @contextmanager
    def scheduler(
        self, options: Options, streamer: Callable[[int, Tensor], Any] | None = None, patience: float = math.inf
    ) -> Iterator[Scheduler]:
        """The engine's ``max_batch`` rows, to be filled one by one; until it is left, the engine takes no other call.

        To be used in inference mode. An exception raised inside leaves clean buffers.

        Args:
            options: of all rows; a row may have a shorter ``gen_length`` of its own.
            streamer: called once a committed block with the name under which a prompt was admitted and its tokens.
            patience: see `Loop`; no answer depends on it.

        Raises:
            ValueError: a rule of one batch, or ``gen_length`` leaves no room for a prompt.
            RuntimeError: the engine is closed or busy.
        """
        self._check_rows(options)
        limit = self.model.config.max_sequence_length
        limit -= limit % options.alignment  # the last block is computed whole
        rows, longest = self.max_batch, min(self.max_length, limit) - options.gen_length
        with self._lent() as buffers:
            scheduler = Scheduler(
                self.model, options, buffers, rows=rows, longest=longest, streamer=streamer, patience=patience
            )
            try:
                yield scheduler
            finally:
                scheduler.loop.close()

    @contextmanager
    def _lent(self) -> Iterator[Buffers]:
        """The buffers, to one user at a time."""
        mine = False
        try:
            with self._lock:
                if self._buffers is None:
                    raise RuntimeError("this engine is closed")
                if self._busy:
                    raise RuntimeError(
                        "this engine is busy: finish or close the iterator of generate_many first; a streamer cannot"
                        " call the engine that calls it"
                    )
                if self._buffers.device != self.model.device:  # the model was moved
                    self._buffers = Buffers(self.model.device)
                buffers = self._buffers
                mine = self._busy = True  # in this order: an interrupt may come between any two
            yield buffers
        except BaseException:  # also an iterator closed early: keys of the last step may be NaN
            if mine:
                with torch.inference_mode():
                    buffers.zero()
            raise
        finally:
            if mine:
                self._busy = False

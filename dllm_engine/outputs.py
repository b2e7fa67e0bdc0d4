"""What decoding returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def own(tensor: Tensor, device: str | torch.device | None = None) -> Tensor:
    """A copy for the caller: no view of a buffer, and no inference tensor, so it may be changed and used in a loss."""
    with torch.inference_mode(False):
        return tensor.to(device or tensor.device, copy=True)


class DecodeOutput(dict[str, Any]):
    """What `decode` returns, to be used like transformers' ``ModelOutput``: ``out.sequences``, ``out["sequences"]``
    and ``out[0]`` are the same; iterating gives the keys, `to_tuple` the values.

    A read-only dict in the order below, and no ``ModelOutput`` itself: transformers need not be there.

    Attributes:
        sequences: LongTensor [B, P + gen_length]; positions after the end of the text hold the end token.
        tokens_per_forward: FloatTensor [B], generated_tokens / sequence_passes.
        forward_passes: model calls made; a refresh, or guidance's doubled batch, is one.
        sequence_passes: LongTensor [B], calls that a sequence took part in.
        generated_tokens: LongTensor [B], tokens before the first end id.
        settings: what was resolved: every argument of `decode` that is not one of input, with the seeds in a list.
    """

    sequences: Tensor
    tokens_per_forward: Tensor
    forward_passes: int
    sequence_passes: Tensor
    generated_tokens: Tensor
    settings: dict[str, Any]

    def __init__(
        self,
        sequences: Tensor,
        forward_passes: int,
        sequence_passes: Tensor,
        generated_tokens: Tensor,
        settings: dict[str, Any],
    ) -> None:
        super().__init__(
            sequences=sequences,
            tokens_per_forward=generated_tokens.float() / sequence_passes,
            forward_passes=forward_passes,
            sequence_passes=sequence_passes,
            generated_tokens=generated_tokens,
            settings=settings,
        )
        self.__dict__.update(self)

    def __getitem__(self, key: str | int | slice) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """The values, in the order of the keys."""
        return tuple(self.values())

    def __reduce__(self) -> tuple[Any, ...]:
        values = {name: value for name, value in self.items() if name != "tokens_per_forward"}
        return type(self), tuple(values.values())

    def _read_only(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("a DecodeOutput is read-only; dict(output) is a copy that is not")

    __setattr__ = __delattr__ = __setitem__ = __delitem__ = _read_only
    pop = popitem = setdefault = update = clear = __ior__ = _read_only


@dataclass(frozen=True)
class Generated:
    """What `Engine.generate_many` yields for a prompt.

    Attributes:
        index: of the prompt, counted from 0.
        sequence: LongTensor [P + gen_length] on the CPU, the prompt without padding and what was generated.
        prompt_length: P.
        passes: model calls that it took part in.
        generated_tokens: tokens before the first end id.
        seed: its own.
    """

    index: int
    sequence: Tensor
    prompt_length: int
    passes: int
    generated_tokens: int
    seed: int

    @property
    def generated(self) -> Tensor:
        """LongTensor [gen_length], a view of ``sequence``."""
        return self.sequence[self.prompt_length :]

    @property
    def tokens_per_forward(self) -> float:
        """generated_tokens / passes."""
        return self.generated_tokens / self.passes

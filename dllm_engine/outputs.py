"""What decoding returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class DecodeOutput:
    """What `decode` returns.

    Attributes:
        sequences: LongTensor [B, P + gen_length]; positions after the end of the text hold the end token.
        forward_passes: model calls made; a refresh, or guidance's doubled batch, is one.
        sequence_passes: LongTensor [B], calls that a sequence took part in.
        generated_tokens: LongTensor [B], tokens before the first end id.
        settings: what was resolved: policy, cache, end_of_text, backend, seed.
    """

    sequences: Tensor
    forward_passes: int
    sequence_passes: Tensor
    generated_tokens: Tensor
    settings: dict[str, Any]

    @property
    def tokens_per_forward(self) -> Tensor:
        """FloatTensor [B]: generated_tokens / sequence_passes."""
        return self.generated_tokens / self.sequence_passes


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

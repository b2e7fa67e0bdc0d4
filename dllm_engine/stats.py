"""What a pass over the LM head says of a row."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowStats:
    """What one pass over the LM head says of each row; every field is [R] (or [B, S] after `reshape`).

    Attributes:
        token: int64, the best allowed id (with a temperature: the drawn one); −1 for a row with NaN or no allowed id.
        logit: float32, its logit, without noise.
        second_token, second_logit: the best other allowed id; −1 and −inf if there is none.
        logsumexp: float32 over all ids of the normaliser.
        log_odds: float32, logit − log Σ_{v ≠ token} exp(logit_v), summed without the winner: it goes on
            discriminating where float32 probabilities have all rounded to 1.
        entropy: float32, nats.
        probe_logits: float32 [R, K], logits of the ids asked for.
    """

    token: Tensor
    logit: Tensor
    second_token: Tensor
    second_logit: Tensor
    logsumexp: Tensor
    log_odds: Tensor
    entropy: Tensor
    probe_logits: Tensor

    @property
    def confidence(self) -> Tensor:
        """Probability of ``token``: float32, at most 1."""
        return torch.sigmoid(self.log_odds)

    def fields(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, f.name) for f in fields(self))

    def reshape(self, *shape: int) -> RowStats:
        return RowStats(
            **{f.name: getattr(self, f.name).reshape(*shape, *getattr(self, f.name).shape[1:]) for f in fields(self)}
        )

"""A `LLaDA` whose logits are the logarithms of a task's true conditional marginals; the engine runs it as any other."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_engine import LLaDA, LLaDAConfig
from dllm_engine.kv_cache import LayerCache
from dllm_engine.layers import Joined, Kernels
from dllm_engine.noise import philox

from .tasks import Task

# For log 0: with an infinity the identity head would add 0 · inf = NaN. Rules that average logits (Prophet) see it: at
# −1e4 one certain position would outweigh a whole block; from −14 to −35 their figures are the same.
FLOOR = -34.5
JITTER = 1e-3  # far above float32's rounding of log-odds, far below any gap between different marginals
_STREAM = 2  # of the counter-based generator; the engine's own noise has streams 0 and 1


class OracleModel(LLaDA):
    """Exact conditional marginals in place of the transformer: hidden states are log-probabilities, the head is 1.

    It is a function of the tokens alone. A prompt (`prompts`) is the sequence's number, written in item symbols, and
    the task's slots; the columns after it are the answer. Ids: one a slot, then the mask, then the end of text.

    Logits get noise uniform in [0, `JITTER`), drawn from (seed, sequence's number, undecided positions, position, id):
    equal candidates fall as a coin would. Every step draws anew: with one draw a sequence, whatever a step left over
    would be biased in the next (a rule that commits the surest first leaves those where the noise speaks against it).
    """

    def __init__(self, task: Task, *, seed: int = 0) -> None:
        size = task.slots + 2 + task.slots % 2  # rotary heads must be even; the odd id beyond is never chosen
        super().__init__(
            LLaDAConfig(
                d_model=size,
                n_layers=1,
                n_heads=1,
                n_kv_heads=1,
                mlp_hidden_size=1,
                vocab_size=task.slots + 2,
                embedding_size=size,
                max_sequence_length=1024,
                mask_token_id=task.slots,
                eos_token_ids=(task.slots + 1,),
                rms_norm_eps=1e-5,
                rope_theta=10000.0,
                weight_tying=True,
            )
        )
        self.task, self.seed = task, seed
        self.eval().requires_grad_(False)
        self.wte.weight.copy_(torch.eye(size))

    def prompts(self, runs: int, seed: int = 0) -> Tensor:
        """``runs`` instances, int64 [runs, P]: the sequence's number, then the slots in random order."""
        base, digits = self.task.slots, 1
        while base**digits < runs:
            digits += 1
        number = torch.arange(runs)[:, None] // base ** torch.arange(digits - 1, -1, -1) % base
        slots = torch.rand(runs, base, generator=torch.Generator().manual_seed(seed)).argsort(1)
        return torch.cat((number, slots), dim=1)

    def shown(self, tokens: Tensor) -> Tensor:
        """The slot that each answer position holds, bool [B, S, K]; none where it is undecided. tokens: [B, P + S]."""
        prompt, answer = tokens[:, : -self.task.length], tokens[:, -self.task.length :]
        return answer[:, :, None] == prompt[:, None, -self.task.slots :]

    def hidden_states(
        self,
        tokens: Tensor,
        rope: tuple[Tensor, Tensor],
        seen: Tensor | tuple[Tensor, Tensor] | None = None,
        caches: list[LayerCache] | None = None,
        joined: list[Joined | None] | None = None,
        kernels: Kernels = Kernels.NONE,
    ) -> Tensor:
        """See `LLaDA.hidden_states`: [B, L, D] for tokens [B, L], a prompt of `prompts` and the answer's columns.

        Raises:
            ValueError: rows or keys are left out.
        """
        if caches is not None or seen is not None:
            raise ValueError(
                'the oracle reads whole canvases: cache "none", end_of_text "off" and no padding are needed'
            )
        length, size = self.task.length, self.config.d_model
        undecided = tokens[:, -length:] == self.mask_id  # no prompt and no answer holds the mask
        slots = tokens[:, -length - self.task.slots : -length]
        logs = self.task.marginals(self.shown(tokens), undecided).log().clamp_min(FLOOR)
        hidden = torch.full((*tokens.shape, size), FLOOR, dtype=torch.float64, device=tokens.device)
        hidden[:, -length:].scatter_(2, slots[:, None].expand_as(logs), logs)
        hidden[:, -length:] += self._jitter(tokens[:, : -length - self.task.slots], undecided)
        return hidden.float()

    def _jitter(self, number: Tensor, undecided: Tensor) -> Tensor:
        """float64 [B, S, D] from the digits of the sequences' numbers, int64 [B, N], and bool [B, S]."""
        device = undecided.device
        sequence = torch.zeros(len(number), dtype=torch.int64, device=device)
        for digit in number.unbind(1):
            sequence = sequence * self.task.slots + digit
        ids = torch.arange(self.config.d_model, device=device)
        position = torch.arange(undecided.shape[1], device=device)[:, None]
        left = undecided.sum(1)[:, None, None]
        seed, stream = (torch.tensor(value, device=device) for value in (self.seed, _STREAM))
        word = philox((ids, position, left, stream), (seed, sequence[:, None, None]))[0]
        return (word.double() + 0.5) * (JITTER * 2.0**-32)

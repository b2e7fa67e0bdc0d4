"""What End-of-Text Prediction saves and whether it changes an answer: ``python benchmarks/end_of_text.py``.

A pass is *after the end* if every undecided position of the sequence's block lies behind the first end id of its final
text: no such pass can change the answer. Each rule is decoded three times, with end of text off, committed and
predicted; printed and appended to ``benchmarks/results/<device>.jsonl`` are the share of answers that changed against
"off", the passes, and the share of the passes after the end that are gone. The answer of a worded sum is its final
number, that of a list the list. A sum has interchangeable phrasings, and which of two equally likely ones is taken
changes with anything; the share of texts that changed at all is told beside.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from common import append
from learn2pd import questions
from torch import Tensor
from tqdm import tqdm

from dllm_engine import LLaDA, decode, policies, tasks
from dllm_engine.built_in import DEMO_MODEL
from dllm_engine.policies import Policy
from dllm_engine.policy_text import PolicyText
from dllm_engine.state import BlockState
from dllm_engine.stats import RowStats
from dllm_engine.tasks import sums
from dllm_engine.tokenizer import answer_text, encode_prompt

WAYS = ("off", "committed", "predicted")


class Watched(Policy):
    """Notes each sequence's first undecided position (counted in the generation) at every pass of another policy."""

    seen: list[tuple[Tensor, Tensor]]

    @staticmethod
    def of(policy: Policy) -> Watched:
        """A copy of ``policy`` that is watched."""
        kind = type("Watched", (Watched, type(policy)), {})
        watched: Watched = object.__new__(kind)
        watched.__dict__ |= vars(policy)
        watched.seen = []
        return watched

    def select(self, stats: RowStats, state: BlockState) -> Tensor:
        first = state.positions.masked_fill(~state.undecided, 1 << 30).amin(1)
        self.seen.append((state.sequences, first))
        return super().select(stats, state)

    def after(self, ends: Tensor) -> int:
        """Passes of sequences whose undecided positions all lie behind ``ends`` [B]."""
        return sum(int((first > ends[sequences]).sum()) for sequences, first in self.seen)


def _answer(sample: tasks.Sample, text: str) -> int | str | None:
    return sums.answer(text) if sample.task == "worded_sums" else text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--policy", nargs="+", default=["threshold=0.9", "auto"])
    parser.add_argument("--cache", nargs="+", default=["dual"])
    parser.add_argument("--families", nargs="+", default=["sums", "lists"])
    parser.add_argument("--prompts", type=int, default=1000, help="of each family")
    parser.add_argument("--gen-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=50)
    args = parser.parse_args()
    model = LLaDA.from_pretrained(args.model, device="cpu", dtype="float32")
    samples = [s for family in args.families for s in questions(model, family, args.prompts, "end")]
    prompts = [encode_prompt(model.tokenizer, sample.prompt, chat=True) for sample in samples]
    end_ids = torch.tensor(model.end_ids)
    records: list[dict[str, Any]] = []
    for text in args.policy:
        for cache in args.cache:
            policy = policies.resolve(PolicyText.parse(text).make(model), model, block_length=32, cache=cache)
            answers: dict[str, list[str]] = {way: [] for way in WAYS}
            passes, after = dict.fromkeys(WAYS, 0), dict.fromkeys(WAYS, 0)
            for first in tqdm(range(0, len(prompts), args.batch_size), desc=f"{text}, {cache}", disable=None):
                for way in WAYS:
                    watched = Watched.of(policy)
                    out = decode(
                        model,
                        prompts[first : first + args.batch_size],
                        gen_length=args.gen_length,
                        policy=watched,
                        cache=cache,
                        end_of_text=way,
                        seed=0,
                    )
                    generated = out.sequences[:, -args.gen_length :]
                    is_end = torch.isin(generated, end_ids)
                    ends = torch.where(is_end.any(1), is_end.int().argmax(1), args.gen_length)
                    answers[way] += [answer_text(model, ids) for ids in generated.tolist()]
                    passes[way] += int(out.sequence_passes.sum())
                    after[way] += watched.after(ends)
            for way in WAYS:
                texts = sum(a != b for a, b in zip(answers["off"], answers[way], strict=True))
                read = [[_answer(s, text) for s, text in zip(samples, answers[w], strict=True)] for w in ("off", way)]
                changed = sum(a != b for a, b in zip(*read, strict=True))
                records.append({
                    "benchmark": "end_of_text", "policy": text, "cache": cache, "end_of_text": way,
                    "gen_length": args.gen_length, "prompts": len(prompts), "answers_changed": changed / len(prompts),
                    "texts_changed": texts / len(prompts),
                    "forward_passes": passes[way] / len(prompts), "passes_after_end": after[way] / len(prompts),
                    "after_end_removed": 1 - after[way] / max(1, after["off"]),
                })  # fmt: skip
                print(
                    f"{text:<16}{cache:<8}{way:<12}{passes[way] / len(prompts):7.2f} passes,"
                    f" {after[way] / len(prompts):6.2f} after the end"
                    f" ({100 * records[-1]['after_end_removed']:.1f} % of off's gone),"
                    f" {100 * changed / len(prompts):.2f} % of the answers changed,"
                    f" {100 * texts / len(prompts):.2f} % of the texts"
                )
    print(append(records, model.device))


if __name__ == "__main__":
    main()

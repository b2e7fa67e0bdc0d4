"""Workers of Ray against one engine, on the built-in model: ``python benchmarks/ray_decode.py --workers 2``.

The same prompts, settings and seeds; texts must be equal. Ray's seconds are those of `decode_file` on a running
cluster, with the start of its workers (import, model); the engine's have no start in them. Prints, appends nothing: on
one machine the workers share what the engine has alone.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

import torch

from dllm_engine import Engine, LLaDA, tasks
from dllm_engine.built_in import DEMO_MODEL
from dllm_engine.integrations.ray_file import decode_file
from dllm_engine.tokenizer import answer_text, encode_prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=400, metavar="N", help="worded sums (%(default)s)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], metavar="N", help="(1 2)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="of a worker and of the engine (8)")
    parser.add_argument("--rows-per-task", type=int, default=50, metavar="N", help="(%(default)s)")
    parser.add_argument("--policy", default="topk", help="(%(default)s)")
    parser.add_argument("--gen-length", type=int, default=64, metavar="N", help="(%(default)s)")
    args = parser.parse_args()
    rng = random.Random(0)
    rows = [{"prompt": tasks.generate("worded_sums", rng).prompt} for _ in range(args.prompts)]
    how = {"gen_length": args.gen_length, "policy": args.policy}

    import ray

    ray.init(num_cpus=max(args.workers), object_store_memory=200_000_000, log_to_driver=False, logging_level="warning")
    texts: dict[str, list[str]] = {}

    def tell(name: str, tokens: int, seconds: float) -> None:
        print(f"{name:<24}{seconds:8.1f} s {tokens / seconds:8,.0f} tokens/s", flush=True)

    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "prompts.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        for workers in args.workers:
            output = Path(place) / str(workers)
            size = {"batch_size": args.batch_size, "rows_per_task": args.rows_per_task}
            done = decode_file(file, output, workers=workers, seed=0, **size, **how)
            tell(f"{workers} workers, 1 CPU each", done.generated_tokens, done.seconds)
            parts = [part.read_text(encoding="utf-8").splitlines() for part in sorted(output.glob("part-*.jsonl"))]
            texts[f"{workers} workers"] = [json.loads(line)["text"] for part in parts for line in part]
    ray.shutdown()

    model = LLaDA.from_pretrained(DEMO_MODEL, device="cpu", dtype="float32")
    prompts = [encode_prompt(model.tokenizer, row["prompt"], chat=True) for row in rows]
    for threads in sorted({1, max(args.workers)}):
        torch.set_num_threads(threads)
        with Engine(model, max_batch=args.batch_size, max_length=max(map(len, prompts)) + args.gen_length) as engine:
            began = time.perf_counter()
            results = sorted(engine.generate_many(prompts, seed=0, **how), key=lambda one: one.index)
            tell(f"engine, {threads} threads", sum(o.generated_tokens for o in results), time.perf_counter() - began)
        texts[f"engine, {threads}"] = [answer_text(model, one.generated.tolist()) for one in results]
    unequal = [name for name, of in texts.items() if of != next(iter(texts.values()))]
    print(f"{len(rows)} prompts; {'texts differ: ' + ', '.join(unequal) if unequal else 'all texts equal'}")


if __name__ == "__main__":
    main()

"""The server under load and under faults, on loopback: ``python benchmarks/serve_load.py``.

Turns of `generate_many` in this process and of the server in another take each other's place, with the same prompts
and rows; 64 clients send the server's, half of them as streams. Another turn has limits on tokens of every size. A
sample of all answers is compared with decodes of the prompt alone. Then clients leave midway, and a server under load
gets SIGTERM: what it had accepted must come whole. Figures are appended to ``benchmarks/results/<device>.jsonl``.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from common import append, device_name
from tqdm import tqdm

from dllm_engine import Engine, LLaDA, decode, tasks
from dllm_engine.built_in import DEMO_MODEL, trained_tasks
from dllm_engine.tokenizer import encode_prompt

LENGTH = 128
LIMITS = (1, 17, 32, 50, 64, 100, 128)
PATH = "/v1/chat/completions"


@dataclass
class Asked:
    """A request and what came of it. ``status``: of HTTP; 0: no answer began; -1: one began and broke off."""

    question: str
    max_tokens: int
    seed: int
    stream: bool
    text: str = ""
    tokens: int = 0
    status: int = 0
    seconds: float = 0.0
    usage: dict[str, int] = field(default_factory=dict)

    def body(self, policy: str) -> bytes:
        fields = {
            "model": "dllm-demo", "messages": [{"role": "user", "content": self.question}], "seed": self.seed,
            "max_tokens": self.max_tokens, "stream": self.stream, "stream_options": {"include_usage": True},
            "policy": policy,
        }  # fmt: skip
        return json.dumps(fields).encode()

    def hear(self, response: http.client.HTTPResponse) -> None:
        self.status = -1
        data = response.read().decode()
        if response.status == 200 and self.stream:
            chunks = [line.removeprefix("data: ") for line in data.split("\n\n") if line]
            if chunks[-1] != "[DONE]":
                return
            parsed = [json.loads(chunk) for chunk in chunks[:-1]]
            self.text = "".join(choice["delta"].get("content", "") for one in parsed for choice in one["choices"])
            self.usage = parsed[-1]["usage"]
        elif response.status == 200:
            answer = json.loads(data)
            self.text, self.usage = answer["choices"][0]["message"]["content"], answer["usage"]
        self.status = response.status


class Server:
    """`dllm-engine serve` in a process of its own."""

    def __init__(self, rows: int, policy: str) -> None:
        command = [
            sys.executable, "-c", "import sys; from dllm_engine.cli import main; sys.exit(main())", "serve", "--port",
            "0", "--max-batch", str(rows), "--max-length", "256", "--policy", policy,
        ]  # fmt: skip
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        found = re.search(r":(\d+)/v1", line := self.process.stdout.readline())
        if found is None:
            raise RuntimeError(f"the server did not start: {line}{self.process.communicate()[1]}")
        self.port = int(found[1])

    def resident(self) -> float:
        """MiB."""
        with open(f"/proc/{self.process.pid}/status", encoding="ascii") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024

    def metric(self, name: str) -> float:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    def until_idle(self) -> None:
        while self.metric("dllm_rows_running") + self.metric("dllm_queue_length"):
            time.sleep(0.02)

    def stop(self) -> str:
        """What it says at its end."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.communicate(timeout=120)[1]


def load(
    server: Server, asked: Sequence[Asked], clients: int, policy: str, went: threading.Event | None = None
) -> None:
    """Send all from ``clients`` connections at once. ``went`` is set once half of them are answered."""
    waiting, lock, answered = iter(asked), threading.Lock(), 0

    def client() -> None:
        nonlocal answered
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
        while True:
            with lock:
                one = next(waiting, None)
            if one is None:
                return
            began = time.perf_counter()
            try:
                connection.request("POST", PATH, one.body(policy), {"Content-Type": "application/json"})
                one.hear(connection.getresponse())
            except (OSError, http.client.HTTPException):
                if went is None:
                    raise
                connection.close()
                if server.process.poll() is not None:
                    return
            one.seconds = time.perf_counter() - began
            with lock:
                answered += 1
                if went is not None and answered >= len(asked) // 2:
                    went.set()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def many(engine: Engine, prompts: dict[str, list[int]], asked: Sequence[Asked], policy: str) -> None:
    """The same work by `generate_many`."""
    given = [prompts[one.question] for one in asked]
    for _ in engine.generate_many(given, gen_length=LENGTH, policy=policy, seed=0):
        pass


def timed(run: Any) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--turns", type=int, default=4, help="of each; the requests are dealt out to them")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rows", type=int, nargs="+", default=[16])
    parser.add_argument("--policy", nargs="+", default=["auto"])
    parser.add_argument("--sample", type=int, default=200, help="answers compared with decodes alone")
    parser.add_argument("--dry-run", action="store_true", help="append nothing")
    args = parser.parse_args()
    if not 1 <= args.turns <= args.requests or not 2 <= args.sample <= 2 * args.requests // args.turns:
        parser.error("--turns, --sample: a turn has at least a request, and at least half of the sample")

    model = LLaDA.from_pretrained(DEMO_MODEL, device="cpu", dtype="float32")
    rng, names = random.Random(0), trained_tasks(model)
    questions = [tasks.generate(rng.choice(names), rng).prompt for _ in range(args.requests)]
    prompts = {question: encode_prompt(model.tokenizer, question, chat=True) for question in questions}
    records = []
    for policy in args.policy:
        for rows in args.rows:
            asked = [Asked(q, LENGTH, seed, seed % 2 == 0) for seed, q in enumerate(questions)]
            records.append(measured(args, model, prompts, asked, rows, policy))
    if not args.dry_run:
        print(f"appended to {append(records, model.device)}")


def measured(
    args: argparse.Namespace, model: LLaDA, prompts: dict[str, list[int]], asked: list[Asked], rows: int, policy: str
) -> dict[str, Any]:
    server, turns = Server(rows, policy), [asked[i :: args.turns] for i in range(args.turns)]
    seconds: dict[str, list[float]] = {"many": [], "server": []}
    rng = random.Random(1)
    with Engine(model, max_batch=rows, max_length=256) as engine:
        warm = [Asked(one.question, one.max_tokens, 0, one.stream) for one in asked[: 4 * rows]]
        many(engine, prompts, warm, policy)
        load(server, warm, args.clients, policy)
        memory = [server.resident()]
        for turn in tqdm(turns, desc=f"{policy}, {rows} rows", disable=None):
            seconds["many"].append(timed(lambda turn=turn: many(engine, prompts, turn, policy)))
            seconds["server"].append(timed(lambda turn=turn: load(server, turn, args.clients, policy)))
            memory.append(server.resident())
        limited = [Asked(one.question, rng.choice(LIMITS), one.seed, one.stream) for one in turns[0]]
        load(server, limited, args.clients, policy)
        memory.append(server.resident())
    ratios = [m / s for m, s in zip(seconds["many"], seconds["server"], strict=True)]
    every = [*asked, *limited]
    errors = sum(one.status != 200 for one in every)
    sample = rng.sample(asked, args.sample // 2) + rng.sample(limited, args.sample // 2)
    wrong = compared(model, prompts, sample, policy)

    # clients that leave: as soon as they have asked, or after the first piece of a stream
    for i, one in enumerate(asked[: args.clients]):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        slow = json.loads(one.body("topk")) | {"stream": True, "end_of_text": "off", "block_length": 8}
        connection.request("POST", PATH, json.dumps(slow), {"Content-Type": "application/json"})
        if i % 2:
            connection.getresponse().read(10)
        connection.close()
    server.until_idle()
    left = server.metric(f'dllm_requests_total{{endpoint="{PATH}",status="499"}}')
    server.stop()

    # SIGTERM once half of the requests are answered; half of the clients are in the queue then
    server, went = Server(rows, policy), threading.Event()
    last = [Asked(one.question, one.max_tokens, one.seed, one.stream) for one in asked[: len(asked) // 2]]
    sending = threading.Thread(target=load, args=(server, last, args.clients, policy, went))
    sending.start()
    went.wait()
    told = server.stop()
    sending.join()
    numbers = re.search(r"stopped: (\d+) requests accepted, (\d+) answered", told)
    assert numbers is not None, told
    whole = sum(one.status == 200 for one in last)
    ordered = sorted(one.seconds for one in asked)
    tokens = sum(one.usage.get("completion_tokens", 0) for one in asked)
    record = {
        "benchmark": "serve_load", "policy": policy, "rows": rows, "clients": args.clients, "requests": len(every),
        "turns": args.turns, "statuses": dict(Counter(str(one.status) for one in every)), "errors": errors,
        "compared": len(sample), "different": wrong,
        "requests_per_second": len(asked) / sum(seconds["server"]),
        "tokens_per_second": tokens / sum(seconds["server"]),
        "of_generate_many": statistics.median(ratios), "ratios": [round(r, 3) for r in ratios],
        "latency_median": statistics.median(ordered), "latency_99": ordered[int(0.99 * len(ordered))],
        "memory_mib": [round(m, 1) for m in memory], "left_midway": args.clients, "told_499": int(left),
        "sigterm_accepted": int(numbers[1]), "sigterm_answered": int(numbers[2]), "sigterm_received": whole,
        "sigterm_broken_off": sum(one.status == -1 for one in last),
    }  # fmt: skip
    print(
        f"{policy}, {rows} rows, {args.clients} clients, {device_name(model.device)}\n"
        f"  {len(every)} requests: {errors} errors, {wrong} of {record['compared']} differ from a decode alone\n"
        f"  {record['requests_per_second']:.1f} requests/s, {record['tokens_per_second']:,.0f} tokens/s,"
        f" {record['of_generate_many']:.2f} x generate_many (turns {', '.join(f'{r:.2f}' for r in ratios)})\n"
        f"  answered in {record['latency_median']:.2f} s (median), {record['latency_99']:.2f} s (99 %)\n"
        f"  memory, MiB after each turn: {', '.join(f'{m:.0f}' for m in memory)}\n"
        f"  {args.clients} clients left midway: all rows free again, {left:.0f} counted as 499\n"
        f"  SIGTERM under load: {numbers[1]} accepted, {numbers[2]} answered, {whole} received whole,"
        f" {record['sigterm_broken_off']} broken off, {len(last) - whole} not accepted"
    )
    return record


def compared(model: LLaDA, prompts: dict[str, list[int]], sample: Sequence[Asked], policy: str) -> int:
    """How many differ in text, tokens or passes from the decode of their prompt alone."""
    wrong = 0
    for one in tqdm(sample, desc="alone", disable=None):
        prompt = prompts[one.question]
        out = decode(model, [prompt], gen_length=-(-one.max_tokens // 32) * 32, policy=policy, seed=one.seed)
        count = min(int(out.generated_tokens[0]), one.max_tokens)
        text = model.tokenizer.decode(out.sequences[0, len(prompt) :][:count], skip_special_tokens=True)
        expected = (text, count, int(out.sequence_passes[0]))
        wrong += expected != (one.text, one.usage.get("completion_tokens"), one.usage.get("forward_passes"))
    return wrong


if __name__ == "__main__":
    main()

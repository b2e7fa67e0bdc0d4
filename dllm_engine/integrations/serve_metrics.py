"""What the server tells Prometheus; a registry a server, so that a process may have several."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKENS = (0.5, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


class Metrics:
    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "dllm_requests", "Requests by status; 499: the client left.", ["endpoint", "status"], registry=registry
        )
        self.running = Gauge("dllm_rows_running", "Prompts that are being decoded.", registry=registry)
        self.waiting = Gauge("dllm_queue_length", "Prompts that wait for a row.", registry=registry)
        self.prompt_tokens = Counter("dllm_prompt_tokens", "Tokens of the prompts that began.", registry=registry)
        self.completion_tokens = Counter("dllm_completion_tokens", "Tokens of the answers.", registry=registry)
        self.passes = Counter("dllm_forward_passes", "Calls of the model.", registry=registry)
        self.groups = Counter("dllm_groups", "Times that the rows were given to a group.", registry=registry)
        self.tokens_per_forward = Histogram(
            "dllm_tokens_per_forward",
            "Tokens of an answer for each call that it took part in.",
            buckets=_TOKENS,
            registry=registry,
        )
        self.queue_seconds = Histogram(
            "dllm_queue_seconds", "From arrival to a row.", buckets=_SECONDS, registry=registry
        )
        self.first_block_seconds = Histogram(
            "dllm_first_block_seconds",
            "From arrival to the first committed block.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.request_seconds = Histogram(
            "dllm_request_seconds", "From arrival to the whole answer.", buckets=_SECONDS, registry=registry
        )

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)

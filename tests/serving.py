"""A server in a thread of the test, and clients of it."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from dllm_engine import LLaDA


class Served:
    """Where a server is. ``server``: the object behind the application."""

    def __init__(self, app: Any, port: int) -> None:
        self.server, self.port, self.url = app.state.server, port, f"http://127.0.0.1:{port}"

    def metric(self, name: str, **labels: str) -> float:
        value = self.server.metrics.registry.get_sample_value(name, labels)
        return 0.0 if value is None else value

    def until_idle(self) -> None:
        """Wait until no row is taken and nobody waits."""
        deadline = time.monotonic() + 60
        while self.server.worker.running or self.server.worker.waiting:
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def until(self, name: str, value: float, **labels: str) -> None:
        """Wait until a metric is that much: a request is counted when its answer is under way."""
        deadline = time.monotonic() + 60
        while self.metric(name, **labels) < value:
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def raw(self, data: bytes, *, leave: bool = False) -> bytes:
        """What comes back for these bytes; ``leave`` closes at once."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            connection.sendall(data)
            if leave:
                return b""
            connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(65536), b""))


@contextlib.contextmanager
def serving(model: LLaDA, **settings: Any) -> Iterator[Served]:
    """A server of the demo model, or another, on a free port."""
    import uvicorn

    from dllm_engine.integrations.serve_settings import Settings
    from dllm_engine.integrations.server import create_app

    app = create_app(model, Settings(**{"model_name": "demo", "max_length": 256} | settings))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 60
        while not server.started:
            assert thread.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        yield Served(app, server.servers[0].sockets[0].getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()

"""``dllm-engine serve``: the OpenAI-compatible server from the command line."""

from __future__ import annotations

import argparse
import ipaddress
import math
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dllm_engine import cli_options

if TYPE_CHECKING:
    from fastapi import FastAPI


def add_arguments(parser: argparse.ArgumentParser) -> None:
    listen = parser.add_argument_group("listening")
    listen.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s: this machine only)")
    listen.add_argument("--port", type=int, default=8000, metavar="N", help="0 takes a free one (%(default)s)")
    listen.add_argument(
        "--api-key-env",
        default="DLLM_API_KEY",
        metavar="NAME",
        help="environment variable with the key that requests need (%(default)s); if it is not set, none is asked for,"
        " and --host must be this machine",
    )
    listen.add_argument("--model-name", metavar="NAME", help="what requests call the model (default: its directory)")

    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-batch", type=int, default=8, metavar="N", help="prompts decoded at once (%(default)s)")
    limits.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="tokens of prompt and answer together (default: the model's, at most 1024)",
    )
    limits.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="of --max-length, what answers may have; prompts have the rest (default: half of it)",
    )
    limits.add_argument("--max-queue", type=int, default=256, metavar="N", help="prompts that may wait (%(default)s)")
    limits.add_argument("--timeout", type=float, default=300.0, metavar="S", help="seconds of a request (%(default)s)")
    limits.add_argument("--max-body", type=int, default=1 << 20, metavar="N", help="bytes of a request (%(default)s)")

    group = parser.add_argument_group(
        "decoding",
        "What requests get that do not say. Defaults are those in brackets, unless generation_config.json beside the"
        " weights says otherwise (its steps and cfg_scale are not used).",
    )
    group.add_argument("--gen-length", type=int, metavar="N", help="their max_tokens (128)")
    group.add_argument("--block-length", type=int, metavar="N", help=cli_options.BLOCK_LENGTH)
    group.add_argument("--policy", metavar="NAME[=VALUE]", help="as for generate (auto)")
    group.add_argument("--cache", metavar="NAME", help="none, prefix or dual (dual)")
    group.add_argument("--temperature", type=float, metavar="T", help="0 takes the best token (0)")
    group.add_argument("--end-of-text", metavar="NAME", help="auto, off, committed or predicted (auto)")


def run(args: argparse.Namespace) -> None:
    import dllm_engine.integrations.server as server  # first: it tells what to install where a package is missing
    from dllm_engine.integrations.serve_settings import Settings

    try:
        import uvicorn  # noqa: F401  which another server of such applications would not need
    except ImportError as error:
        raise ImportError(f'the server needs more packages: pip install "dllm-engine[serve]" ({error})') from None

    key = os.environ.get(args.api_key_env)
    if key is not None and not key.strip():
        raise ValueError(f"--api-key-env: {args.api_key_env} is set but empty; give it a key or unset it")
    if key is None and not _is_loopback(args.host):
        raise ValueError(
            f"--host: {args.host} given; to listen beyond this machine, requests must need a key:"
            f" set {args.api_key_env}"
        )
    settings = Settings(
        model_name=args.model_name or (Path(args.model).resolve().name if args.model else "dllm-demo"),
        max_batch=args.max_batch,
        max_length=args.max_length,
        max_tokens=args.max_tokens,
        gen_length=args.gen_length,
        max_queue=args.max_queue,
        timeout=args.timeout,
        max_body=args.max_body,
        policy=args.policy,
        cache=args.cache,
        block_length=args.block_length,
        end_of_text=args.end_of_text,
        temperature=args.temperature,
        api_key=key,
    )
    with _listener(args.host, args.port) as listener:
        serve(server.create_app(cli_options.load(args), settings), listener)


def serve(app: FastAPI, listener: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT; then what was accepted is finished first (a second signal ends it at once)."""
    import logging

    import uvicorn

    class Announced(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets=sockets)
            host, port = listener.getsockname()[:2]
            name = app.state.server.settings.model_name
            print(f"serving {name} on http://{f'[{host}]' if ':' in host else host}:{port}/v1", flush=True)

    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    # a request has its time limit; what lasts longer is a client that does not read its answer
    patience = math.ceil(app.state.server.settings.timeout) + 5
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=patience)
    Announced(config).run(sockets=[listener])


def _listener(host: str, port: int) -> socket.socket:
    """Bound before the model is loaded; its port is refused to others from then on."""
    if not 0 <= port < 1 << 16:
        raise ValueError(f"--port: {port} given; 0 to 65535 allowed")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise OSError(f"--host, --port: cannot listen on {host}:{port}: {error.strerror or error}") from None


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

"""The ``dllm-engine`` command."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from dllm_engine import cli_bench, cli_eval, cli_lm_eval, cli_options, cli_ray, cli_serve, cli_train
from dllm_engine._version import __version__

if TYPE_CHECKING:
    from dllm_engine.model import LLaDA

_EXAMPLES = """examples:
  dllm-engine demo
  dllm-engine generate --prompt "Reverse: 0 Adam Fox, 1 Emma Reed, 2 Jack Cole" --watch
  dllm-engine generate --model GSAI-ML/LLaDA-8B-Instruct --prompt "What is a kernel?" --gen-length 256
  dllm-engine generate --prompts questions.jsonl --policy threshold=0.95 --json > answers.jsonl
  dllm-engine eval --policy topk threshold=0.9 factor=1.0 --cache none dual
  dllm-engine serve --port 8000
  dllm-engine eval --sweep --plot frontier --output frontier"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 1 (failed while running), 2 (bad arguments) or 130 (interrupted)."""
    args = _parser().parse_args(argv)
    before, warnings.formatwarning = warnings.formatwarning, _one_line
    if sys.stdout is None:  # closed: `dllm-engine … >&-`
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    try:
        args.run(args)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `dllm-engine … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # the system's has a number and quotes, one of ours is its message
        where = "" if error.filename is None else f"{error.filename}: "
        print(f"dllm-engine {args.command}: {where + error.strerror if error.strerror else error}", file=sys.stderr)
        return 2
    except (ValueError, TypeError, ImportError) as error:
        print(f"dllm-engine {args.command}: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError, SafetensorError) as error:  # the last where a disk is full
        print(f"dllm-engine {args.command}: {error}", file=sys.stderr)
        return 1
    finally:
        warnings.formatwarning = before


def _one_line(message: Warning | str, *where: Any, **line: Any) -> str:
    """In place of `warnings.formatwarning`, which shows where in the source."""
    return f"warning: {message}\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dllm-engine",
        description="Fast decoding for masked diffusion language models (LLaDA and its family, Dream).",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"dllm-engine {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        return sub

    demo = command("demo", _demo, "Ten questions to the built-in model, decoded four ways, with what each costs.")
    cli_options.add_model(demo)
    demo.add_argument(
        "--data", type=Path, nargs="+", metavar="FILE.jsonl", help="published ParallelBench files instead"
    )
    demo.add_argument("--limit", type=int, metavar="N", help="first N items of each file")
    demo.add_argument("--batch-size", type=int, metavar="N", help="items of a file at once (20)")
    demo.add_argument("--seed", type=int, help="of the ten questions (0)")
    demo.add_argument("--json", action="store_true", help="figures as JSON instead of a table")

    generate = command("generate", _generate, "Answer prompts.")
    cli_options.add_model(generate)
    source = generate.add_mutually_exclusive_group()
    source.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be repeated")
    source.add_argument(
        "--prompts",
        metavar="FILE.jsonl",
        help='rows {"prompt": str} or {"messages": [...]}; "-" reads them from stdin.'
        " With neither option, stdin is one prompt",
    )
    cli_options.add_chat(generate)
    cli_options.add_decoding(generate)
    generate.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts at once (%(default)s)")
    generate.add_argument("--json", action="store_true", help="one JSON object a prompt: text, tokens, passes")
    generate.add_argument("--watch", action="store_true", help="draw the denoising live, one prompt at a time")

    evaluate = command("eval", cli_eval.run, "Accuracy, forward passes and speed of several settings side by side.")
    cli_options.add_model(evaluate)
    cli_eval.add_arguments(evaluate)

    bench = command(
        "bench", cli_bench.run, "Tokens a second of this model here, beside one token per step and a threshold."
    )
    cli_options.add_model(bench)
    cli_bench.add_arguments(bench)

    train = command("train-filter", cli_train.run, "Train a Learn2PD filter on a model's own decodes.")
    cli_options.add_model(train)
    cli_train.add_arguments(train)

    harness = "lm-evaluation-harness with this engine: lm-eval's own options, tasks and result files."
    cli_lm_eval.add_arguments(commands, harness).set_defaults(run=cli_lm_eval.run)
    serve = command("serve", cli_serve.run, "Serve the model over HTTP, as OpenAI's API does.")
    cli_options.add_model(serve)
    cli_serve.add_arguments(serve)
    ray = command("ray-decode", cli_ray.run, "Decode a file of prompts on a Ray cluster; resumable.")
    cli_options.add_model(ray)
    cli_options.add_decoding(ray)
    cli_ray.add_arguments(ray)

    info = command("info", _info, "Versions, devices, and every backend with the reason if it cannot run.")
    info.add_argument("--json", action="store_true", help="the same as JSON")
    return parser


# -- generate ---------------------------------------------------------------------------------------------------------


def _generate(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from dllm_engine.inputs import check_room
    from dllm_engine.options import default
    from dllm_engine.policy_text import PolicyText
    from dllm_engine.tokenizer import encode_rows

    cli_options.check_counts(args, "batch_size")
    if args.watch and args.json:
        raise ValueError("--watch: cannot be joined with --json; one of them must go")
    rows = _rows(args)
    if args.policy is not None:
        PolicyText.parse(args.policy)  # before the model is loaded
    model = cli_options.load(args)
    prompts = encode_rows(model.tokenizer, rows, chat=args.chat)
    check_room(model, prompts, args.gen_length or default(model, "gen_length"))
    size = 1 if args.watch else args.batch_size
    # answers that come to a terminal show how far it is, and a bar would stand between them
    silent = len(rows) <= size or args.watch or sys.stdout.isatty()
    with tqdm(total=len(rows), disable=silent or None) as bar:
        for first in range(0, len(rows), size):
            last = min(first + size, len(rows))
            _answer(args, model, rows[first:last], prompts[first:last], first)
            bar.update(last - first)


def _answer(
    args: argparse.Namespace,
    model: LLaDA,
    rows: list[dict[str, Any]],
    prompts: list[list[int]],
    first: int,
) -> None:
    from dllm_engine.decode import decode
    from dllm_engine.options import DEFAULTS
    from dllm_engine.tokenizer import answer_text

    def run(streamer: Any = None) -> Any:
        return decode(
            model,
            prompts,
            seed=None if args.seed is None else args.seed + first,
            streamer=streamer,
            **{name: getattr(args, name) for name in DEFAULTS},
        )

    if args.watch:
        from dllm_engine.watch import Watch

        title = rows[0]["messages"][-1]["content"] if "messages" in rows[0] else rows[0]["prompt"]
        with Watch(model, title) as streamer:
            run(streamer)
        return
    out = run()
    generated = out.sequences[:, -out.settings["gen_length"] :].tolist()
    for i, (row, ids) in enumerate(zip(rows, generated, strict=True)):
        text = answer_text(model, ids)
        if args.json:
            record = row | {
                "text": text,
                "generated_tokens": int(out.generated_tokens[i]),
                "forward_passes": int(out.sequence_passes[i]),
                "tokens_per_forward": round(float(out.tokens_per_forward[i]), 3),
                "seed": out.settings["seed"][i],
            }
            print(json.dumps(record, ensure_ascii=False), flush=True)
        else:
            print(text, flush=True)


def _rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The prompts as rows with "prompt" or "messages"."""
    from dllm_engine.samples import check_columns, read_prompts

    if args.prompt is not None:
        return [{"prompt": prompt} for prompt in args.prompt]
    if args.prompts is not None:
        rows = read_prompts(args.prompts)
        if args.json:
            check_columns(rows, "stdin" if args.prompts == "-" else args.prompts)
        return rows
    try:
        text = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read().strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"stdin: not UTF-8 ({error})") from None
    if not text:
        raise ValueError("no prompt: give --prompt TEXT, --prompts FILE.jsonl, or text on stdin")
    return [{"prompt": text}]


# -- demo and info -----------------------------------------------------------------------------------------------


def _demo(args: argparse.Namespace) -> None:
    from dllm_engine import tables
    from dllm_engine.demo import run_data, run_demo

    cli_options.check_counts(args, "batch_size", "limit")
    for name in ("batch_size", "limit"):
        if getattr(args, name) is not None and args.data is None:
            raise ValueError(f"--{name.replace('_', '-')}: needs --data")
    if args.seed is not None and args.data is not None:
        raise ValueError("--seed: of the ten questions, not of --data")
    model = cli_options.load(args)
    console = tables.console()
    if args.data:
        run_data(model, console, args.data, args.limit, args.batch_size or 20, args.json)
    else:
        run_demo(model, console, args.seed or 0, args.json)


def _info(args: argparse.Namespace) -> None:
    import torch

    from dllm_engine import backends, policies
    from dllm_engine.built_in import DEMO_MODEL
    from dllm_engine.config import LLaDAConfig
    from dllm_engine.kv_cache import KVCache
    from dllm_engine.refresh import CACHES

    config = LLaDAConfig.from_dict(json.loads((DEMO_MODEL / "config.json").read_text(encoding="utf-8")))
    per_token = KVCache.bytes_per_token(config, torch.float32)
    devices = [f"cpu ({torch.get_num_threads()} threads)"]
    devices += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    example = torch.empty(8, 8, dtype=torch.bfloat16, device="cuda" if torch.cuda.is_available() else "cpu")
    try:
        auto = backends.resolve("auto", example, example)
    except (ValueError, RuntimeError) as error:  # what DLLM_BACKEND names
        auto = str(error)
    facts: dict[str, Any] = {
        "dllm-engine": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "triton": _version("triton"),
        "devices": devices,
        "policies": policies.names(),
        "caches": list(CACHES),
        "backends": {name: "ready" if reason is None else reason for name, reason in backends.available().items()},
        "auto backend": auto,
        "KV cache": f"built-in model, float32: {per_token:,} bytes a token, {1024 * per_token:,} for 1,024 tokens",
    }
    if args.json:
        print(json.dumps(facts, indent=1))
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            for key, state in value.items():
                print(f"{'backend ' + key:<16}{state}")
        else:
            print(f"{name:<16}{', '.join(value) if isinstance(value, list) else value}")


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"

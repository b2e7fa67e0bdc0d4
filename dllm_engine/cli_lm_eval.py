"""``dllm-engine lm-eval``: the command of lm-evaluation-harness, with this engine as its model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

TASKS = Path(__file__).parent / "integrations" / "lm_eval_tasks"  # of the built-in model
_OTHERS = ("ls", "validate")  # subcommands that need no model


def add_arguments(commands: argparse._SubParsersAction[argparse.ArgumentParser], help: str) -> argparse.ArgumentParser:
    """The subparser: it takes everything, for lm-eval has its own."""
    # no argument begins with the prefix, so each is a positional one, --help too
    parser = commands.add_parser("lm-eval", help=help, add_help=False, prefix_chars="\0")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    return parser


def run(args: argparse.Namespace) -> None:
    """Runs lm-eval on the arguments.

    Raises:
        ImportError: lm-eval is missing. ValueError, TypeError, OSError: what it or the model does not take.
    """
    import torch

    from dllm_engine.integrations.lm_eval import cli_evaluate  # importing it registers the model

    given = args.arguments[1:] if args.arguments[:1] == ["run"] else args.arguments
    from_file = _has(given, "--config", "-C")
    if given and given[0] not in _OTHERS:
        if _has(given, "--model", "-M"):
            raise ValueError("--model: it is dllm_engine here; the checkpoint goes to --model_args pretrained=DIR")
        given = ["run", "--model", "dllm_engine", *given]
        if not from_file and not any("pretrained" in argument for argument in given):
            given += ["--model_args", "pretrained=demo"]
        if not from_file and not _has(given, "--device") and not torch.cuda.is_available():
            given += ["--device", "cpu"]  # lm-eval's default is cuda:0
    if not from_file and not _has(given, "--include_path"):
        given = [*(given or ["run", "--help"]), "--include_path", str(TASKS)]
    before = sys.argv
    sys.argv = ["dllm-engine lm-eval", *given]  # lm-eval's entry point reads it
    try:
        cli_evaluate()
    finally:
        sys.argv = before


def _has(arguments: list[str], *names: str) -> bool:
    return any(argument.partition("=")[0] in names for argument in arguments)

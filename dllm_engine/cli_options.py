"""Options that several commands have, and checks of their numbers."""

from __future__ import annotations

import argparse
import sys

from dllm_engine import built_in, checks
from dllm_engine.model import LLaDA
from dllm_engine.options import defaults_of

BLOCK_LENGTH = "tokens of a block (32; of a block-causal model its own)"
POLICY_FORMS = (
    "auto; topk, random, left_to_right, margin [=TOKENS A STEP]; threshold[=0.9], factor[=1.0],"
    " learn2pd[=FILTER FILE][@THRESHOLD], entropy[=0.5], cad[=0.95/1/32/0.3], prophet[=7.5/5/2.5],"
    " localleap[=0.9/0.75/4], hierarchical[=0.9/0.4], wedlm[=0.4/0.02], run_length[=0.9],"
    " credit[=0.9/0.65/0.7/0.2/4], editing[=0.7/0.5/16], adablock[=0.9/0.3/0.25/4], ete[=0.95/2/2], freedave[=8];"
    " see docs/policies.md"
)


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="DIR", help="checkpoint directory or hub id (default: the built-in model)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (default: a GPU if there is one)")
    parser.add_argument(
        "--dtype", help="float32, bfloat16 or float16 (default: the checkpoint's; float32 for the demo)"
    )


def load(args: argparse.Namespace) -> LLaDA:
    """The model of `add_model`'s options."""
    return built_in.load(args.model, args.device, args.dtype)


def settle_block_length(args: argparse.Namespace, model: LLaDA) -> None:
    """The default of commands that do not look at generation_config.json."""
    args.block_length = args.block_length or defaults_of(model)["block_length"]


def add_chat(parser: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="put plain prompts through the chat template (default: where the model has one; messages always are)",
    )


def add_decoding(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "decoding", "Defaults are those in brackets, unless generation_config.json beside the weights says otherwise."
    )
    group.add_argument("--gen-length", type=int, metavar="N", help="tokens to generate (128)")
    group.add_argument("--block-length", type=int, metavar="N", help=BLOCK_LENGTH)
    group.add_argument("--steps", type=int, metavar="N", help="steps of LLaDA's static schedule")
    group.add_argument("--policy", metavar="NAME[=VALUE]", help=f"{POLICY_FORMS} (auto)")
    group.add_argument(
        "--cache",
        metavar="NAME",
        help="none, prefix or dual (dual); dual/8 refreshes every 8 calls, dual/never never",
    )
    group.add_argument("--temperature", type=float, metavar="T", help="0 takes the best token (0)")
    group.add_argument("--cfg-scale", type=float, metavar="S", help="classifier-free guidance (0)")
    group.add_argument("--end-of-text", metavar="NAME", help="auto, off, committed or predicted (auto)")
    group.add_argument("--seed", type=int, metavar="N", help="prompt i gets seed N + i (default: random)")
    group.add_argument("--backend", default="auto", metavar="NAME", help="see `dllm-engine info` (%(default)s)")


def check_counts(args: argparse.Namespace, *names: str) -> None:
    """Those that were given must be at least 1; the ValueError names the option."""
    for name in names:
        given = getattr(args, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None:
                checks.check_count("--" + name.replace("_", "-"), value)


def note(text: str) -> None:
    """To stderr: what is no result."""
    print(text, file=sys.stderr)

"""The model ``dllm_engine`` of EleutherAI's lm-evaluation-harness; importing this module registers it.

``dllm-engine lm-eval`` is lm-eval's own command with this model. lm-eval 0.4.13 knows no plug-ins: ``lm_eval --model``
takes the models of its own package only, and a script that calls ``simple_evaluate(model="dllm_engine", ...)`` imports
this module first.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from dllm_engine import built_in, checks, likelihood
from dllm_engine.engine import Engine
from dllm_engine.options import DEFAULTS, Options, default
from dllm_engine.tokenizer import has_template

try:
    from lm_eval import utils
    from lm_eval.__main__ import cli_evaluate as cli_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from tqdm import tqdm
except ImportError as error:
    raise ImportError(f'lm-eval is missing ({error}); pip install "dllm-engine[lm-eval]"') from error

# What a task's generation_kwargs (or --gen_kwargs) may say; of the latter only what asks for nothing.
_UNDERSTOOD = (
    *("until", "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"),
    *("do_sample", "temperature"),
)
_NOTHING = {"top_p": (1,), "top_k": (0, -1), "num_beams": (1,)}

_LOG = logging.getLogger("lm_eval.dllm_engine")  # lm-eval shows what its own loggers say


@register_model("dllm_engine")
class DLLMEngine(TemplateLM):
    """A LLaDA under the harness. Its results file says under ``config`` what decoding cost, by task."""

    def __init__(
        self,
        pretrained: str = "demo",
        *,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 1,
        max_length: int | None = None,
        gen_length: int | None = None,
        seed: int | None = None,
        mc_num: int = 128,
        is_check_greedy: bool = True,
        **options: Any,
    ) -> None:
        """What ``--model_args`` takes.

        What it says holds for every task; then comes what a task says, then the model's ``generation_config.json``.

        Args:
            pretrained: a checkpoint directory or hub id; "demo" is the built-in model.
            device, dtype: as for `LLaDA.from_pretrained`; the built-in model is float32 by default.
            batch_size: sequences at once; lm-eval's ``--batch_size``.
            max_length: tokens of prompt and answer together, by default and at most the model's. Longer prompts lose
                their beginning, with a warning.
            gen_length: tokens to generate; in a task the most is ``max_gen_toks``, which is decoded in whole blocks and
                then cut; 256 where nobody says.
            seed: of masks and sampling; by default drawn from torch's generator, which lm-eval's ``--seed`` seeds.
            mc_num: masks a target in the estimate of its likelihood (see `likelihood`).
            is_check_greedy: whether to decode each target for lm-eval's ``is_greedy``; without it that is False.
            options: block_length, steps, policy, cache, temperature, cfg_scale, end_of_text, backend, as for `decode`.

        Raises:
            TypeError, ValueError, FileNotFoundError: a bad argument, before any task is read.
        """
        super().__init__()
        for name in ("max_batch_size", "trust_remote_code"):  # lm-eval's; a batch size is not searched, no code is run
            options.pop(name, None)
        self.options = {name: value for name, value in options.items() if value is not None}
        if unknown := self.options.keys() - DEFAULTS.keys():
            known = {*DEFAULTS, *DLLMEngine.__init__.__annotations__} - {"options", "return"}
            raise ValueError(f"model_args: {', '.join(sorted(unknown))} given; known: {', '.join(sorted(known))}")
        length = 1 if max_length is None else max_length
        for name, value in (("batch_size", batch_size), ("mc_num", mc_num), ("max_length", length)):
            checks.check_count(name, int(value) if str(value).isdigit() else value)
        self.model = built_in.load(None if pretrained == "demo" else pretrained, device, dtype)
        self.tokenizer, self._device = self.model.tokenizer, self.model.device
        self.batch_size, self.mc_num, self.is_check_greedy = int(batch_size), int(mc_num), is_check_greedy
        longest = self.model.config.max_sequence_length
        self.max_length, self.gen_length = int(max_length or longest), gen_length
        if self.max_length > longest:
            raise ValueError(f"max_length: {max_length} given; the model has max_sequence_length {longest}")
        self.seed = checks.check_seeds(seed, 1)[0]
        checks.check_count("block_length", self._option("block_length"))
        resolved = Options.resolve(self.model, longest_prompt=1, gen_length=self._lengths({})[1], **self.options)
        self.settings = {name: value for name, value in resolved.told([self.seed]).items() if name != "gen_length"}
        self.generated: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.likelihoods: Counter[str] = Counter()

    def _option(self, name: str) -> Any:
        return self.options.get(name, default(self.model, name))

    @property
    def eot_token_id(self) -> int:
        return self.model.fill_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context becomes: the start token, where there is one."""
        start = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else start

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None:  # a chat template writes its own start token
            start = self.tokenizer.bos_token
            add_special_tokens = not (start and string.startswith(start))
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"])

    @property
    def tokenizer_name(self) -> str:
        return str(self.model.path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if not has_template(self.tokenizer):
            raise ValueError("apply_chat_template: this model's tokenizer has no chat template; leave the option out")
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip

    def _fitting(self, prompts: list[list[int]], room: list[int]) -> list[list[int]]:
        """Prompts without the beginning that leaves no ``room`` for what follows them."""
        keep = [self.max_length - tokens for tokens in room]
        if min(keep, default=1) < 1:
            raise ValueError(f"max_length: {self.max_length} leaves no room for a prompt beside {max(room)} tokens")
        if long := [len(p) for p, k in zip(prompts, keep, strict=True) if len(p) > k]:
            _LOG.warning(
                "%d prompts (of up to %d tokens) lose their beginning: with their answers at most %d fit the model",
                *(len(long), max(long), self.max_length),
            )
        return [p[-k:] for p, k in zip(prompts, keep, strict=True)]

    # -- generation -------------------------------------------------------------------------------------------------

    def _lengths(self, kwargs: dict[str, Any]) -> tuple[int, int]:
        """Tokens that an answer may have, and those that are decoded for it."""
        if self.gen_length is not None:
            return self.gen_length, self.gen_length
        most = normalize_gen_kwargs(kwargs, self.model.generation_defaults.get("gen_length", 256))["max_gen_toks"]
        block = self._option("block_length")
        return most, -(-most // block) * block

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        texts = [""] * len(requests)
        groups: dict[tuple[str, str], list[int]] = {}
        for i, request in enumerate(requests):
            _check_kwargs(request.args[1])
            groups.setdefault((request.task_name, repr(request.args[1])), []).append(i)
        for (task, _), group in groups.items():
            kwargs = requests[group[0]].args[1]
            most, canvas = self._lengths(kwargs)
            encoded = {i: self.tok_encode(requests[i].args[0]) for i in group}
            group.sort(key=lambda i: -len(encoded[i]))  # calls do without the padding that all of their rows have
            prompts = self._fitting([encoded[i] for i in group], [canvas] * len(group))
            options = dict(self.options)
            if "temperature" in kwargs or "do_sample" in kwargs:
                options.setdefault("temperature", float(normalize_gen_kwargs(kwargs).get("temperature", 1.0)))
            until = handle_stop_sequences(kwargs.get("until"), eos=None)
            rows, columns = min(self.batch_size, len(group)), max(map(len, prompts)) + canvas
            counted, began = self.generated[task], time.perf_counter_ns()
            with Engine(self.model, max_batch=rows, max_length=columns, cache=self.options.get("cache")) as engine:
                results = engine.generate_many(prompts, gen_length=canvas, seed=self.seed, **options)
                for result in tqdm(results, total=len(group), desc=f"generating {task}", disable=disable_tqdm):
                    tokens, i = min(result.generated_tokens, most), group[result.index]
                    text = self.tokenizer.decode(result.generated[:tokens], skip_special_tokens=True)
                    texts[i] = postprocess_generated_text(text, until, None)
                    counted.update(prompts=1, forward_passes=result.passes, generated_tokens=tokens)
                    self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
            counted.update(nanoseconds=time.perf_counter_ns() - began)
            _LOG.info("%s: %s", task, ", ".join(f"{value:,.1f} {name}" for name, value in _rates(counted).items()))
        return texts

    # -- likelihood -------------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        targets = [target for _, _, target in requests]
        contexts = self._fitting([context for _, context, _ in requests], [len(target) for target in targets])
        common: dict[str, Any] = {"batch_size": self.batch_size, "cfg_scale": self._option("cfg_scale")}
        common["backend"], began = self.settings["backend"], time.perf_counter_ns()
        drawn = likelihood.log_likelihood(self.model, contexts, targets, samples=self.mc_num, seed=self.seed, **common)
        found = list(tqdm(drawn, total=len(targets), desc="likelihoods", disable=disable_tqdm))
        passes, greedy = sum(one.passes for one in found), [False] * len(targets)
        if self.is_check_greedy and requests and requests[0][0] is not None:  # None: windows of a rolling likelihood
            greedy = likelihood.greedy_matches(self.model, contexts, targets, **common)
            passes += sum(map(len, targets))
        seconds = time.perf_counter_ns() - began
        self.likelihoods.update(prompts=len(requests), forward_passes=passes, nanoseconds=seconds)
        answers = [(one.value, same) for one, same in zip(found, greedy, strict=True)]
        for (pair, *_), answer in zip(requests, answers, strict=True):
            if pair is not None:
                self.cache_hook.add_partial("loglikelihood", pair, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows as long as the model; bounds like every estimate: perplexities are not higher."""
        asked, owners = [], []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in utils.get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length - 1, 1):
                asked.append((None, *utils.make_disjoint_window(window)))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (value, _) in zip(owners, self._loglikelihood_tokens(asked, disable_tqdm), strict=True):
            totals[i] += value
        return totals

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes under ``config`` once every task is done: settings and figures of this run.

        ``forward_passes`` is the mean a prompt (a target, of likelihoods). Tokens are those generated before the end of
        the text. Loading, tokenization and scoring are not in ``seconds``.
        """
        total: Counter[str] = Counter()
        for own in self.generated.values():
            total.update(own)
        policy = " ".join(str(self.settings["policy"]).split())
        return {
            "model_num_parameters": sum(p.numel() for p in self.model.parameters()),
            "model_dtype": str(self.model.dtype),
            "model_device": str(self.model.device),
            "decoding": self.settings | {"policy": policy, "seed": self.seed},
            "generation": {**_rates(total), "tasks": {task: _rates(own) for task, own in self.generated.items()}},
            "likelihood": _rates(self.likelihoods) | {"mc_num": self.mc_num, "is_check_greedy": self.is_check_greedy},
        }


def _check_kwargs(kwargs: dict[str, Any]) -> None:
    """What would be left undone raises ValueError."""
    for name, value in kwargs.items():
        if name in _UNDERSTOOD or value is None or value in _NOTHING.get(name, ()):
            continue
        if name in DEFAULTS:
            raise ValueError(f"gen_kwargs: {name}={value} given; it goes to --model_args, and holds for every task")
        hint = f"; --gen_kwargs {name}={_NOTHING[name][0]} does without" if name in _NOTHING else ""
        raise ValueError(f"gen_kwargs: {name}={value} given; known: {', '.join(_UNDERSTOOD)}{hint}")


def _rates(sums: Counter[str]) -> dict[str, float]:
    """Named as by ``dllm-engine eval --json``; of nothing, nothing."""
    prompts, passes, seconds = sums["prompts"], sums["forward_passes"], sums["nanoseconds"] / 1e9
    if not prompts:
        return {}
    rates = {"prompts": prompts, "forward_passes": passes / prompts, "seconds": seconds}
    if "generated_tokens" in sums:
        tokens = sums["generated_tokens"]
        rates |= {
            "generated_tokens": tokens,
            "tokens_per_forward": tokens / passes,
            "tokens_per_second": tokens / seconds,
        }
    return rates

"""The tokenizer beside the weights: transformers loads it; ids and size are read without transformers' start-up."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dllm_engine.config import read_json

# The names under which these models end a turn (LLaDA, with Llama 3's template; LLaDA-MoE and LLaDA2; the others).
# A model may end an answer with it before any eos token, so it ends the text; its id comes from the tokenizer.
_END_OF_TURN = "<|eot_id|>", "<|role_end|>", "<|im_end|>"
_MASK = "<|mdm_mask|>", "<|mask|>", "<|MASK|>", "|<MASK>|"  # the same of the mask, where no file says which token it is
_EXPAND = "<|expand|>"  # DreamOn's: the position becomes two
_LISTS = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True)
class TokenizerFacts:
    """size: ``len(tokenizer)``, None without one. end_ids: eos and end-of-turn ids. mask_id: of the mask token.
    expands: whether there is a token that lengthens the canvas. loaded: the tokenizer itself, where it had to be.
    """

    size: int | None
    end_ids: tuple[int, ...]
    mask_id: int | None
    expands: bool
    loaded: Any = field(default=None, compare=False, repr=False)


def read_facts(directory: Path) -> TokenizerFacts:
    """What a checkpoint's tokenizer says about the vocabulary.

    Raises:
        ValueError: one of the tokenizer's files cannot be read.
    """
    file = directory / "tokenizer.json"
    if not file.exists():
        if not (directory / "tokenizer_config.json").exists():
            return TokenizerFacts(None, (), None, expands=False)
        return _facts_of(load_tokenizer(directory))  # a slow tokenizer without tokenizer.json
    from tokenizers import Tokenizer

    try:
        fast = Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust side raises bare Exception
        raise ValueError(f"{file} cannot be read: {error}") from None
    special = _special_tokens(directory)
    if any(fast.token_to_id(token) is None for tokens in special.values() for token in tokens):
        return _facts_of(load_tokenizer(directory))  # which adds them to the vocabulary
    ends, masks = (*special.get("eos_token", ()), *_END_OF_TURN), (*special.get("mask_token", ()), *_MASK)
    size = fast.get_vocab_size(with_added_tokens=True)
    expands = fast.token_to_id(_EXPAND) is not None
    return _found(size, map(fast.token_to_id, ends), map(fast.token_to_id, masks), expands=expands)


def _facts_of(tokenizer: Any) -> TokenizerFacts:
    ids = tokenizer.get_vocab()
    ends, masks = (tokenizer.eos_token_id, *map(ids.get, _END_OF_TURN)), (tokenizer.mask_token_id, *map(ids.get, _MASK))
    return replace(_found(len(tokenizer), ends, masks, expands=_EXPAND in ids), loaded=tokenizer)


def _found(size: int, ends: Iterable[int | None], masks: Iterable[int | None], *, expands: bool) -> TokenizerFacts:
    """Of ids that a vocabulary may not have, those that it has; of masks the first."""
    end_ids = tuple(i for i in ends if i is not None)
    return TokenizerFacts(size, end_ids, next((i for i in masks if i is not None), None), expands)


def _special_tokens(directory: Path) -> dict[str, list[str]]:
    """Those that a tokenizer's files name beside ``tokenizer.json``, by their keys."""
    found: dict[str, list[str]] = {}
    for file in (directory / "special_tokens_map.json", directory / "tokenizer_config.json"):  # the later one counts
        for key, value in (read_json(file) if file.exists() else {}).items():
            if key in _LISTS or key.endswith("_token"):
                found[key] = _texts(value)
            if key == "eos_token" and value is not None and not found[key]:
                raise ValueError(f"{file}: {key} is {value!r}; a token's text is needed")
    return found


def _texts(value: Any) -> list[str]:
    """A token is a text or an object with its "content"; there may be a list or, by names, an object of them."""
    if isinstance(value, dict):
        value = value["content"] if "content" in value else list(value.values())
    if isinstance(value, list):
        return [text for one in value for text in _texts(one)]
    return [value] if isinstance(value, str) else []


def load_tokenizer(directory: Path | None) -> Any:
    """``AutoTokenizer`` from local files only, never with remote code. Dream names a class that only such code has, and
    that does what Qwen2's does.

    Raises:
        FileNotFoundError: no directory, or no tokenizer files in it.
    """
    if directory is None:
        raise FileNotFoundError("this model was built in memory and has no tokenizer; use token ids")
    if not any((directory / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise FileNotFoundError(f"{directory}: no tokenizer.json or tokenizer_config.json; use token ids")
    fast, settings = directory / "tokenizer.json", directory / "tokenizer_config.json"
    if not fast.exists() and read_json(settings).get("tokenizer_class") == "DreamTokenizer":
        from transformers import Qwen2TokenizerFast

        return Qwen2TokenizerFast.from_pretrained(str(directory), local_files_only=True)
    from transformers import AutoTokenizer, PretrainedConfig

    # an empty config: AutoTokenizer would read config.json and warn that it does not know the model type
    config = PretrainedConfig()
    return AutoTokenizer.from_pretrained(str(directory), config=config, local_files_only=True, trust_remote_code=False)


def encode_prompt(tokenizer: Any, prompt: str | list[dict[str, str]], *, chat: bool | None) -> list[int]:
    """Token ids of a prompt.

    Args:
        prompt: a text, or messages, which always go through the chat template.
        chat: whether a text does too; None: where there is one.

    Raises:
        ValueError: a chat was asked for and the tokenizer has no template or that refuses the messages, or the text
            is no Unicode or gives no token.
    """
    if (has_template(tokenizer) if chat is None else chat) or not isinstance(prompt, str):
        text = render(tokenizer, [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)
    else:
        text = prompt
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell
        raise ValueError(f"prompt: no Unicode text given ({error})") from None
    # the template has its own start token
    ids = tokenizer(text, add_special_tokens=text is prompt, verbose=False)["input_ids"]  # lengths are checked here
    if not ids:
        raise ValueError(f"prompt: {prompt!r} gives no token")
    return list(ids)


def has_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def is_chat(messages: Any) -> bool:
    """Whether it is a list of {"role", "content"}, both texts; templates take much else for a text."""
    return isinstance(messages, list) and bool(messages) and all(map(_is_message, messages))


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def render(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """Messages in the chat template, with the start of the answer.

    Raises:
        ValueError: there is no template, it refuses the messages, or they are none.
    """
    if not has_template(tokenizer):
        raise ValueError("chat: this model's tokenizer has no chat template; give plain text")
    if not is_chat(messages):
        raise ValueError(f'messages: {messages!r} given; a list of {{"role": str, "content": str}} is needed')
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except (TemplateError, TypeError, ValueError) as error:  # the template's own code raises any of these
        raise ValueError(f"messages: the model's chat template refuses them: {error}") from None


def encode_rows(tokenizer: Any, rows: list[dict[str, Any]], *, chat: bool | None) -> list[list[int]]:
    """`encode_prompt` of rows with "prompt" or "messages".

    Raises:
        ValueError: as there, naming the row by its index.
    """
    return encode_each(tokenizer, ((row.get("messages") or row["prompt"], chat) for row in rows))


def encode_each(tokenizer: Any, asked: Iterable[tuple[str | list[dict[str, str]], bool | None]]) -> list[list[int]]:
    """`encode_prompt` of pairs of its prompt and ``chat``.

    Raises:
        ValueError: as there, naming the prompt by its index.
    """
    prompts = []
    for i, (prompt, chat) in enumerate(asked):
        try:
            prompts.append(encode_prompt(tokenizer, prompt, chat=chat))
        except ValueError as error:
            raise ValueError(f"prompt {i}: {error}") from None
    return prompts


def answer_text(model: Any, generated: list[int]) -> str:
    """Text of a generation [G] up to (not including) its first end id."""
    end = next((i for i, token in enumerate(generated) if token in model.end_ids), len(generated))
    return str(model.tokenizer.decode(generated[:end], skip_special_tokens=True)).strip()

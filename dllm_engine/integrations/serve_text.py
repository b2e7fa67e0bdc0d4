"""Text into tokens, a prompt's control tokens being text; tokens into text, block by block, up to a stop string."""

from __future__ import annotations

import copy
import re
import secrets
import threading
from collections.abc import Collection, Sequence
from typing import Any

from dllm_engine.model import LLaDA
from dllm_engine.tokenizer import encode_prompt, render


class PromptEncoder:
    """Prompts as token ids. Only the chat template writes control tokens (special ones, the mask, the ends of a text):
    where a user's text spells one, it stays text.

    Has a tokenizer of its own, under a lock: choosing how special tokens are read changes the object.
    """

    def __init__(self, model: LLaDA) -> None:
        self._tokenizer, self._lock = copy.deepcopy(model.tokenizer), threading.Lock()
        added = self._tokenizer.added_tokens_decoder
        names = {token.content: i for i, token in added.items() if token.special}
        ids = {*model.end_ids, model.mask_id, *self._tokenizer.all_special_ids}
        self._control = names | {str(self._tokenizer.convert_ids_to_tokens(i)): i for i in ids}
        longest_first = sorted(self._control, key=len, reverse=True)
        self._spelled = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        unknown = self._tokenizer.unk_token_id
        self._unknown = None if unknown in (*model.end_ids, model.mask_id) else unknown
        self._ids = {*self._control.values()} - {self._unknown}

    @property
    def busy(self) -> bool:
        """Whether another thread encodes, and a call would wait for it."""
        return self._lock.locked()

    def text(self, prompt: str) -> list[int]:
        """Ids of a plain prompt.

        Raises:
            ValueError: it gives no token.
        """
        with self._lock:
            ids = self._plain(prompt, start=True)
        if not ids:
            raise ValueError(f"prompt: {prompt!r} gives no token")
        return ids

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Ids of a conversation in the chat template, with the start of the answer.

        Raises:
            ValueError: the tokenizer has no template, or the template refuses the messages.
        """
        with self._lock:
            if all(self._reads_as_text(message["content"]) for message in messages):
                return encode_prompt(self._tokenizer, messages, chat=True)
            return self._chat_in_parts(messages)

    def _reads_as_text(self, text: str) -> bool:
        read = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return not self._ids.intersection(read) and read == self._plain(text)

    def _chat_in_parts(self, messages: list[dict[str, str]]) -> list[int]:
        """The template sees a word in place of each control token that a user spelled; what it wrote itself is then cut
        at its own control tokens, as the tokenizer would, and the parts between are text.
        """
        hidden: list[str] = []
        key = secrets.token_hex(8)  # no user can write such a word

        def hide(match: re.Match[str]) -> str:
            hidden.append(match[0])
            return f"\ue000{key}.{len(hidden) - 1}\ue001"

        shown = [message | {"content": self._spelled.sub(hide, message["content"])} for message in messages]
        rendered = render(self._tokenizer, shown)
        ids: list[int] = []
        for i, part in enumerate(self._spelled.split(rendered)):
            if i % 2:
                ids.append(self._control[part])
            elif part:
                ids += self._plain(re.sub(f"\ue000{key}\\.(\\d+)\ue001", lambda word: hidden[int(word[1])], part))
        return ids

    def _plain(self, text: str, *, start: bool = False) -> list[int]:
        """Ids of text; ``start``: with what the tokenizer puts before a text."""
        coded = self._tokenizer(
            text,
            add_special_tokens=start,
            split_special_tokens=True,
            return_special_tokens_mask=True,
            verbose=False,
        )
        ids = list(coded["input_ids"])
        for i, (token, own) in enumerate(zip(ids, coded["special_tokens_mask"], strict=True)):
            # a vocabulary of whole words holds the names of its control tokens, too
            if token in self._ids and not (own and start):
                if self._unknown is None:
                    name = self._tokenizer.convert_ids_to_tokens(token)
                    raise ValueError(f"prompt: holds {name}, which this model's tokenizer cannot read as text")
                ids[i] = self._unknown
        return ids


class Answer:
    """The text of one generation, as its blocks come.

    Attributes:
        tokens: how many count: those before an end id, before ``max_tokens``, up to the end of a stop string.
        finish_reason: "stop" after an end id or a stop string, "length" at ``max_tokens``, None before.
        text: all of it, once there is a reason.
    """

    def __init__(
        self, tokenizer: Any, end_ids: Collection[int], *, max_tokens: int, stop: Sequence[str] = (), live: bool = True
    ) -> None:
        """``live``: whether `feed` is to tell text before the end."""
        self._tokenizer, self._end_ids, self._max_tokens, self._stop = tokenizer, end_ids, max_tokens, stop
        self._live = live
        self._ids: list[int] = []
        self.finish_reason: str | None = None
        self.tokens, self.text = 0, ""

    def feed(self, block: Sequence[int]) -> str:
        """What is certain to be text of the answer after a further block and was not told before: no half of a
        character, nothing that may become a stop string.
        """
        before = self.tokens
        for token in block:
            if token in self._end_ids:
                self.finish_reason = "stop"
                break
            self._ids.append(token)
            if len(self._ids) == self._max_tokens:
                self.finish_reason = "length"
                break
        self.tokens = len(self._ids)
        if self.finish_reason is None and not self._live and not self._stop:
            return ""
        told, text = len(self.text), self._decoded(self.tokens)
        at = self._found(text, told)
        if at >= 0:
            self.finish_reason, text = "stop", text[:at]
            whole = range(before + 1, self.tokens + 1)
            self.tokens = next((n for n in whole if self._found(self._decoded(n), told) == at), self.tokens)
        elif self.finish_reason == "length":
            text = text.rstrip("\ufffd")  # a character that the limit cut through
        elif self.finish_reason is None:
            text = text.rstrip("\ufffd")
            text = text[: len(text) - self._held_back(text)]
        self.text, new = text, text[told:]
        return new

    def _decoded(self, count: int) -> str:
        # clean-up would change, a block later, what has been told
        return str(
            self._tokenizer.decode(self._ids[:count], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    def _found(self, text: str, start: int) -> int:
        """Where the stop string begins that is complete first, whatever the blocks are; -1 if none is there."""
        found = ((at + len(stop), at) for stop in self._stop if (at := text.find(stop, start)) >= 0)
        return min(found, default=(0, -1))[1]

    def _held_back(self, text: str) -> int:
        """Characters at the end that a stop string may begin with."""
        ends = (
            n for stop in self._stop for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])
        )
        return max(ends, default=0)

"""Text to tokens and back for the server: what users write is text, and what is told is never taken back."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest

from dllm_engine import LLaDA, tasks
from dllm_engine.integrations.serve_text import Answer, PromptEncoder
from dllm_engine.tokenizer import encode_prompt

CONTROL = ("<|mdm_mask|>", "<|endoftext|>", "<|eot_id|>", "<|startoftext|>", "<|start_header_id|>")


@pytest.fixture(scope="module")
def encoder(demo_model: LLaDA) -> PromptEncoder:
    return PromptEncoder(demo_model)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_plain_prompts_are_encoded_as_everywhere_else(demo_model: LLaDA, encoder: PromptEncoder) -> None:
    rng = random.Random(0)
    for name in ("copy", "sort", "worded_sums"):
        question = tasks.generate(name, rng).prompt
        assert encoder.chat(user(question)) == encode_prompt(demo_model.tokenizer, question, chat=True)
        assert encoder.text(question) == encode_prompt(demo_model.tokenizer, question, chat=False)
    talk = [{"role": "system", "content": "Copy"}, *user("Reverse"), {"role": "assistant", "content": "Amy"}]
    assert encoder.chat(talk) == encode_prompt(demo_model.tokenizer, talk, chat=True)


# after a comma the demo's pre-tokenizer leaves the bare name, which stands in the vocabulary of words
@pytest.mark.parametrize("between", ["{} Amy", "Copy: 0 {} Wells, 1 Amy", "Copy,{},Amy", "Copy: Amy{}", "{}{} . {}"])
@pytest.mark.parametrize("name", CONTROL)
def test_control_tokens_in_a_prompt_are_text(
    demo_model: LLaDA, encoder: PromptEncoder, between: str, name: str
) -> None:
    tokenizer, text = demo_model.tokenizer, between.replace("{}", name)
    unknown, control = tokenizer.unk_token_id, {tokenizer.convert_tokens_to_ids(token) for token in CONTROL}
    assert control & set(tokenizer(text, add_special_tokens=False)["input_ids"]), "the tokenizer alone would read it"
    ids = encoder.text(text)
    assert not control & set(ids)
    assert unknown in ids

    head, tail = (encode_prompt(tokenizer, user(word), chat=True) for word in ("Amy", "Fox"))
    before = next(i for i, (a, b) in enumerate(zip(head, tail, strict=True)) if a != b)
    after = len(head) - before - 1
    chat = encoder.chat(user(text))
    assert chat[:before] == head[:before], "the template's own tokens are what they are"
    assert chat[-after:] == head[-after:]
    assert chat[before:-after] == ids


def test_control_tokens_in_one_of_many_messages(demo_model: LLaDA, encoder: PromptEncoder) -> None:
    ids = encoder.chat([*user("Copy: Amy <|eot_id|> Fox"), {"role": "assistant", "content": "Amy"}, *user("Reverse")])
    names = demo_model.tokenizer.convert_ids_to_tokens(ids)
    assert names.count("<|eot_id|>") == 3
    assert [n for n in names if n.startswith("▁")] == [
        "▁user", "▁Copy", "▁Amy", "▁Fox", "▁assistant", "▁Amy", "▁user", "▁Reverse", "▁assistant"
    ]  # fmt: skip


def test_the_inside_of_the_template_cannot_be_spelled(encoder: PromptEncoder) -> None:
    """What stands for a hidden token cannot be guessed, and characters of its kind are only text."""
    assert encoder.chat(user("\ue0000.0\ue001 <|mdm_mask|>"))


def test_prompts_that_give_nothing_or_that_the_template_refuses(demo_model: LLaDA, encoder: PromptEncoder) -> None:
    with pytest.raises(ValueError, match="prompt: '' gives no token"):
        encoder.text("")
    strict = copy.copy(demo_model)
    strict.__dict__ = dict(demo_model.__dict__)
    strict._tokenizer = copy.deepcopy(demo_model.tokenizer)
    strict.tokenizer.chat_template = "{{ raise_exception('only one turn') }}"
    with pytest.raises(ValueError, match="messages: the model's chat template refuses them: only one turn"):
        PromptEncoder(strict).chat(user("Copy"))
    with pytest.raises(ValueError, match="messages: the model's chat template refuses them: only one turn"):
        encode_prompt(strict.tokenizer, "Copy", chat=True)
    for chat in (False, True):
        with pytest.raises(ValueError, match="prompt: no Unicode text given .*surrogates not allowed"):
            encode_prompt(demo_model.tokenizer, "Copy \ud800", chat=chat)


# -- answers ----------------------------------------------------------------------------------------------------------


class Bytes:
    """A tokenizer with a token a byte, as byte-level ones have for rare characters."""

    def decode(self, ids: list[int], **options: Any) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


END = 255


def told(text: bytes, size: int, **settings: Any) -> tuple[list[str], Answer]:
    answer = Answer(Bytes(), {END}, **{"max_tokens": 1000} | settings)
    pieces = []
    for start in range(0, len(text), size):
        if answer.finish_reason is None:
            pieces.append(answer.feed(text[start : start + size]))
    return pieces, answer


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_no_half_of_a_character_is_told(size: int) -> None:
    text = "naïve 数学 🙂, e\u0301nd \ufffd"
    pieces, answer = told(text.encode() + bytes([END]) + b"rest", size)
    assert "".join(pieces) == answer.text == text
    assert not any("\ufffd" in piece for piece in pieces[:-2])
    assert (answer.finish_reason, answer.tokens) == ("stop", len(text.encode()))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 100])
@pytest.mark.parametrize(
    ("stops", "expected", "count"),
    [
        (("STOP",), "one STO two ST", 18),
        (("two STOP", "STOP"), "one STO two ST", 18),
        (("P three", "STOP t"), "one STO two ST", 20),
        (("two STSTOP", "STST"), "one STO two ", 16),
        (("nowhere", "three!"), "one STO two STSTOP three", 24),
        (("e",), "on", 3),
        (("ö",), "one STO two STSTOP three", 24),
    ],
)
def test_stop_strings_end_the_text_and_no_part_of_them_is_told(
    size: int, stops: tuple[str, ...], expected: str, count: int
) -> None:
    text = b"one STO two STSTOP three"
    pieces, answer = told(text + bytes([END]), size, stop=stops)
    assert "".join(pieces) == answer.text == expected
    assert answer.finish_reason == "stop"
    assert answer.tokens == count
    _, same = told(text + bytes([END]), size, stop=stops, live=False)
    assert (same.text, same.tokens) == (expected, count)


def test_the_limit_cuts_tokens_and_no_character() -> None:
    for size in (1, 3, 100):
        pieces, answer = told("aé数b".encode(), size, max_tokens=5)
        assert "".join(pieces) == answer.text == "aé"
        assert (answer.finish_reason, answer.tokens) == ("length", 5)
    pieces, answer = told(b"abc" + bytes([END]), 100, max_tokens=3)
    assert answer.finish_reason == "length"
    pieces, answer = told(b"abc" + bytes([END]), 100, max_tokens=4)
    assert (answer.finish_reason, answer.text) == ("stop", "abc")


def test_blocks_of_the_demo_model_join_to_its_text(demo_model: LLaDA) -> None:
    tokenizer = demo_model.tokenizer
    text = "first Jacob has 3 books. next 3 + 10 = 13. the answer is 13"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for size in (1, 2, 3, 32):
        answer = Answer(tokenizer, demo_model.end_ids, max_tokens=64)
        pieces = [answer.feed([*ids, demo_model.end_ids[0]][i : i + size]) for i in range(0, len(ids) + 1, size)]
        assert "".join(pieces) == answer.text == text
        assert answer.tokens == len(ids)

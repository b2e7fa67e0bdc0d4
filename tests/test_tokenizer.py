"""Prompts into ids and ids into answers, with a small tokenizer that puts a start token before a text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

from dllm_engine import tokenizer
from dllm_engine.tokenizer import answer_text, encode_prompt, encode_rows, load_tokenizer, read_facts

START, END, HELLO, WORLD, SPACED, TURN = range(6)
TEMPLATE = "<s> {% for message in messages %}{{ message.content }} {% endfor %}world"


class Python:
    """A tokenizer without tokenizer.json."""

    eos_token_id = END
    mask_token_id = None

    def __len__(self) -> int:
        return 6

    def get_vocab(self) -> dict[str, int]:
        return {"</s>": END, "<|eot_id|>": TURN}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ["<s>", "</s>", "hello", "world", " spaced"]
    made = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}))
    made.pre_tokenizer = WhitespaceSplit()
    made.add_special_tokens([AddedToken(word, special=True) for word in ("<s>", "</s>", "<|eot_id|>")])
    made.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", START)])
    path = tmp_path_factory.mktemp("tokenizer")
    made.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE, "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>"},
    }  # fmt: skip
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def loaded(directory: Path) -> Any:
    return load_tokenizer(directory)


def test_size_and_ends_count_added_tokens(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = read_facts(directory)
    assert (facts.size, facts.end_ids) == (6, (END, TURN))
    assert read_facts(tmp_path).size is None
    (tmp_path / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    assert read_facts(tmp_path).end_ids == (TURN,)  # nobody says which is eos
    (tmp_path / "tokenizer.json").rename(tmp_path / "tokenizer_config.json")  # one that is Python alone is loaded
    monkeypatch.setattr(tokenizer, "load_tokenizer", lambda _: Python())
    assert read_facts(tmp_path) == facts


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("tokenizer_config.json", "eos_token", "[stop]"),
        ("tokenizer_config.json", "sep_token", {"__type": "AddedToken", "content": "[sep]"}),
        ("tokenizer_config.json", "additional_special_tokens", ["[a]", "world", "[b]"]),
        ("special_tokens_map.json", "eos_token", "hello"),
        ("tokenizer_config.json", "extra_special_tokens", {"image_token": "[image]"}),
        ("tokenizer_config.json", "add_bos_token", True),
        ("tokenizer_config.json", "mask_token", "hello"),
        ("special_tokens_map.json", "mask_token", "[mask]"),
    ],
)
def test_special_tokens_are_those_that_transformers_finds(
    directory: Path, tmp_path: Path, file: str, key: str, value: Any
) -> None:
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    if key == "eos_token":
        del config[key]
    named = (config if file == "tokenizer_config.json" else {}) | {key: value}
    for name, content in (("tokenizer_config.json", config), (file, named)):
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    facts, real = read_facts(tmp_path), load_tokenizer(tmp_path)
    assert (facts.size, facts.end_ids) == (len(real), (real.eos_token_id, TURN))
    assert facts.mask_id == real.mask_token_id


def test_a_special_token_that_is_no_text_is_named(directory: Path, tmp_path: Path) -> None:
    shutil.copy(directory / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": 7}', encoding="utf-8")
    with pytest.raises(ValueError, match="tokenizer_config.json: eos_token is 7; a token's text is needed"):
        read_facts(tmp_path)


def test_a_template_that_fails_is_named(loaded: Any) -> None:
    template, loaded.chat_template = loaded.chat_template, "{{ 'a' + 1 }}"
    try:
        with pytest.raises(ValueError, match="messages: the model's chat template refuses them: can only concatenate"):
            encode_prompt(loaded, "hello", chat=True)
    finally:
        loaded.chat_template = template


def test_a_text_and_a_chat_have_one_start_token(loaded: Any) -> None:
    assert encode_prompt(loaded, "hello world", chat=False) == [START, HELLO, WORLD]
    assert (
        encode_prompt(loaded, "hello", chat=True) == encode_prompt(loaded, "hello", chat=None) == [START, HELLO, WORLD]
    )
    assert encode_prompt(loaded, [{"role": "user", "content": "world"}], chat=False) == [START, WORLD, WORLD]


def test_rows_have_messages_or_a_prompt(loaded: Any) -> None:
    rows = [
        {"messages": None, "prompt": "world"},
        {"messages": [{"role": "user", "content": "hello"}], "prompt": "world"},
        {"prompt": "hello"},
    ]
    assert encode_rows(loaded, rows, chat=False) == [[START, WORLD], [START, HELLO, WORLD], [START, HELLO]]
    with pytest.raises(ValueError, match="^prompt 1: prompt: no Unicode text given"):
        encode_rows(loaded, [{"prompt": "hello"}, {"prompt": "\ud800"}], chat=False)


def test_a_prompt_without_a_token_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt: ' ' gives no token"):
        encode_prompt(lambda *args, **options: {"input_ids": []}, " ", chat=False)


def test_an_answer_ends_before_its_first_end_and_has_no_special_token(loaded: Any) -> None:
    model = SimpleNamespace(tokenizer=loaded, end_ids=(END, TURN))
    assert answer_text(model, [SPACED, START, HELLO, TURN, WORLD, END]) == "spaced hello"
    assert answer_text(model, [HELLO, WORLD]) == "hello world"
    assert answer_text(model, [END, HELLO]) == ""

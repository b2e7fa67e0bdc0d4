"""The demo model's tokenizer: one token a word, with LLaDA's special tokens and chat template."""

from __future__ import annotations

import json
import string
from pathlib import Path

from dllm_engine.tasks.names import FIRST, LAST

SPECIAL = (
    "<|startoftext|>",
    "<|endoftext|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|mdm_mask|>",
    "<|unknown|>",
)
_WORDS = """Copy Reverse Sort Insert Remove Replace Shuffle Sudoku Latin square at with anywhere anyone
user assistant system""".split()
# Words of the worded sums: in the vocabulary from the first stage on, so that each trains on from the one before.
_SUMS = """a after all and answer are away back basket books box buys coins each eats ends finds first from gave gives
had has have he how in is it leaves left loses makes many marbles minus more must now of on one pays pencils people plus
she shelf so starts step stickers takes tell the then there they this times to total two was we what which you yes no
apples gets receives sells needs find say says third second next final finally boxes""".split()
_TEMPLATE = (
    "<|startoftext|>{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{% endif %}"
)


def vocabulary() -> list[str]:
    """Special tokens, punctuation, then words with the leading space that ``Metaspace`` gives them."""
    numbers = [str(i) for i in range(100)]
    words = [*"+-=*", *_WORDS, *numbers, *string.ascii_uppercase, *FIRST, *LAST, *_SUMS]
    return list(dict.fromkeys([*SPECIAL, *",:.?", *("▁" + word for word in words)]))


def save_tokenizer(directory: Path, max_length: int) -> int:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and ``chat_template.jinja``; return the vocabulary's size."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    words = vocabulary()
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Split(Regex("[,:.?]"), "isolated")]
    )
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "mask_token": "<|mdm_mask|>",
        "unk_token": "<|unknown|>",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "chat_template": _TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    (directory / "chat_template.jinja").write_text(_TEMPLATE, encoding="utf-8")
    return len(words)

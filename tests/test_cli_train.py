"""The command ``train-filter``: the filter it writes, and what it says of wrong arguments."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import eight_b_in_miniature, tiny_config, tiny_model
from test_train_filter import SETTINGS
from test_weights import save

from dllm_engine import LearnedFilter, LLaDA, cli, decode
from dllm_engine.policies import Learn2PD


def checkpoint(directory: Path) -> Path:
    return save(tiny_model(seed=5), tiny_config(), directory)


def prompt_file(file: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(58)} | {"[UNK]": 58, "[MASK]": 59}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(file.parent / "model" / "tokenizer.json"))
    (file.parent / "model" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]", "mask_token": "[MASK]"})
    )
    file.write_text("".join(json.dumps({"prompt": f"w{i} w{i + 7} w3"}) + "\n" for i in range(2, 22)))
    return file


def test_the_command_trains_a_filter_that_decode_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = checkpoint(tmp_path / "model")
    prompts = prompt_file(tmp_path / "prompts.jsonl")
    arguments = ["train-filter", "--model", str(directory), "--prompts", str(prompts), "--gen-length", "16"]
    arguments += ["--block-length", "8", "--epochs", "2", "--risk", "0.5", "--device", "cpu"]
    written = []
    for name in ("one", "two"):
        assert cli.main([*arguments, "--output", str(tmp_path / name), "--json"]) == 0
        written.append((tmp_path / name / "filter.safetensors").read_bytes())
    facts = json.loads(capsys.readouterr().out.split("\n}\n")[0] + "}")
    assert written[0] == written[1]
    assert facts["prompts"] == 20
    assert facts["parameters"] == 817
    learned = LearnedFilter.from_pretrained(tmp_path / "one")
    assert (learned.kind, learned.block_length, learned.cache) == ("position", 8, "dual")
    assert learned.about["traces"]["settings"]["gen_length"] == 16
    assert learned.about["figures"]["test"]["rows"] == facts["test"]["rows"]
    model = LLaDA.from_pretrained(directory, device="cpu")
    decode(model, [[3, 4]], policy=Learn2PD(str(tmp_path / "one")), **SETTINGS)
    with pytest.raises(ValueError, match="filter: trained for a model with vocab_size 60"):
        decode(tiny_model(vocab_size=61), [[3, 4]], policy=Learn2PD(learned), **SETTINGS)


def test_the_command_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*arguments: str) -> str:
        assert cli.main(["train-filter", "--output", str(tmp_path / "out"), *arguments]) == 2
        return capsys.readouterr().err

    assert "--kind: 'token' given; known: block, position" in error("--kind", "token")
    assert "--risk: 1.5 given" in error("--risk", "1.5")
    assert "--limit: 5 given; at least 10" in error("--limit", "5")
    assert "seed: 99999999999999999999 given" in error("--seed", "9" * 20)
    assert "fx.safetensors given; a directory is needed" in error("--output", str(tmp_path / "fx.safetensors"))
    assert "cache: 'single' given" in error("--cache", "single")
    assert "--prompts: needed with --model" in error("--model", str(checkpoint(tmp_path / "model")))
    assert "No such file" in error("--prompts", str(tmp_path / "none.jsonl"))
    few = tmp_path / "few.jsonl"
    few.write_text('{"prompt": "Copy: 0 Alan Wells"}\n' * 3)
    assert "--prompts: 3 given; at least 10" in error("--prompts", str(few))
    few.write_text("")
    assert "few.jsonl: no row in it" in error("--prompts", str(few))
    few.write_text('{"text": "Copy"}\n')
    assert 'few.jsonl, line 1: {"prompt": str}' in error("--prompts", str(few))
    few.write_text('{"prompt": "Copy: 0 Alan Wells"}\n' * 11 + json.dumps({"prompt": "Copy " * 1000}))
    assert "prompt 11: 1008 tokens given; the model has room for" in error("--prompts", str(few))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command_works_unchanged_on_a_checkpoint_laid_out_like_llada_8b(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = eight_b_in_miniature(tmp_path / "LLaDA-8B-Instruct")
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"messages": [{"role": "user", "content": f"w{i} w{3 * i}"}]} for i in range(1, 13)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["train-filter", "--model", str(directory), "--prompts", str(prompts), "--gen-length", "32", "--json"]
    assert cli.main([*arguments, "--epochs", "2", "--risk", "0.9", "--output", str(tmp_path / "filter")]) == 0
    assert json.loads(capsys.readouterr().out)["prompts"] == 12
    learned = LearnedFilter.from_pretrained(tmp_path / "filter")
    assert learned.ids == {"mask_id": 126336, "end_ids": [126081, 126348], "vocab_size": 126349}
    model = LLaDA.from_pretrained(directory, device="cpu", dtype="bfloat16")
    out = decode(model, [[126080, 5, 6]], gen_length=32, policy=Learn2PD(learned))
    assert out.sequences.shape == (1, 35)
    assert not (out.sequences[0, 3:] == 126336).any()

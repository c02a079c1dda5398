"""Tokenizers: round trips, specials as plain text, byte lengths, missing files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from transformers import AutoTokenizer

from gptoughts.data import train_tokenizer
from gptoughts.data.tokenizer import load_tokenizer, with_special_tokens
from gptoughts.errors import ConfigError, DataError
from tests.data.conftest import TRAINING_TEXT, VOCAB_SIZE

TEXTS = [
    "def f(x):\n    return x + 1\n",
    "Straße 東京 🙂\t\r\n\n  end",
    " leading",
    "",
    "a\u0000b",
    "<|endoftext|> spelt out",
]


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip_and_byte_lengths(tokenizer_folder: Path, text: str) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert int(tokenizer.token_byte_lengths()[ids].sum()) == len(text.encode())
    assert tokenizer.eod_id not in ids
    assert tokenizer.encode_batch([text, text]) == [ids, ids]


def test_special_tokens_only_where_allowed(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder / "tokenizer.json")
    assert tokenizer.encode("<|endoftext|>", allow_special=True) == [tokenizer.eod_id] == [0]
    assert len(tokenizer.encode("<|endoftext|>")) > 1
    assert tokenizer.vocab_size == VOCAB_SIZE
    assert tokenizer.token_byte_lengths()[0] == 0


def test_transformers_reads_the_folder(tokenizer_folder: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(tokenizer_folder)
    text = "for i in range(10):\n        print(i)"
    assert theirs(text)["input_ids"] == load_tokenizer(tokenizer_folder).encode(text)
    assert theirs.eos_token == "<|endoftext|>"


def test_sentencepiece_byte_lengths(tmp_path: Path) -> None:
    vocabulary = {"<unk>": 0, "<0xC3>": 1, "\u2581ab": 2, "\u00e9": 3, "</s>": 4}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.add_special_tokens(["<unk>", "</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.token_byte_lengths().tolist() == [0, 1, 3, 2, 0]
    assert tokenizer.eod_id == 4


def test_end_of_document_from_the_config(tmp_path: Path, tokenizer_folder: Path) -> None:
    content = (tokenizer_folder / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(content)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "def"}}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eod_token == "def"
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(DataError, match="not a JSON object"):
        load_tokenizer(tmp_path)


def test_missing_and_damaged(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        load_tokenizer(tmp_path / "nowhere.json")
    with pytest.raises(DataError, match=r"no tokenizer\.json in it"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="not a tokenizers file"):
        load_tokenizer(tmp_path)


def test_training_refuses_what_it_cannot_do(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "a.txt").write_text("few words")
    words = ["--input", str(tmp_path / "a.txt"), "--output"]
    with pytest.raises(ConfigError, match="at least 259"):
        train_tokenizer.main([*words, str(tmp_path / "t"), "--vocab_size", "100"])
    with pytest.raises(DataError, match="only yields"):
        train_tokenizer.main([*words, str(tmp_path / "t"), "--vocab_size", "5000"])
    with pytest.raises(ConfigError, match="holds another tokenizer"):
        train_tokenizer.main([*words, str(tokenizer_folder), "--vocab_size", "300"])
    before = (tokenizer_folder / "tokenizer.json").stat().st_mtime_ns
    assert train_tokenizer.main([*words, str(tokenizer_folder), "--vocab_size", str(VOCAB_SIZE)]) == 0
    assert (tokenizer_folder / "tokenizer.json").stat().st_mtime_ns == before


def test_training_is_reproducible(tmp_path: Path, tokenizer_folder: Path) -> None:
    words = [
        "--input",
        str(TRAINING_TEXT),
        "--suffix",
        ".py",
        "--vocab_size",
        str(VOCAB_SIZE),
        "--output",
        str(tmp_path),
    ]
    train_tokenizer.main(words)
    assert (tmp_path / "tokenizer.json").read_bytes() == (tokenizer_folder / "tokenizer.json").read_bytes()


def test_special_tokens_are_added_to_a_copy(tokenizer_folder: Path, tmp_path: Path) -> None:
    before = load_tokenizer(tokenizer_folder)
    file = with_special_tokens(tokenizer_folder, {"[NEW]": before.vocab_size}, tmp_path / "copy")
    after = load_tokenizer(file)
    assert file.parent == tmp_path / "copy"
    assert after.backend.token_to_id("[NEW]") == before.vocab_size == after.vocab_size - 1
    assert after.eod_id == before.eod_id
    assert after.token_byte_lengths()[before.vocab_size] == 0
    assert after.decode([before.vocab_size], skip_special=True) == ""


def test_a_tokenizer_that_has_them_is_taken_as_it_is(tokenizer_folder: Path, tmp_path: Path) -> None:
    before = load_tokenizer(tokenizer_folder)
    assert with_special_tokens(tokenizer_folder, {}, tmp_path / "copy") == before.file
    assert before.eod_id is not None
    assert with_special_tokens(tokenizer_folder, {"[NEW]": before.eod_id}, tmp_path / "copy") == before.file
    assert not (tmp_path / "copy").exists()


def test_special_tokens_that_do_not_fit_are_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    size = load_tokenizer(tokenizer_folder).vocab_size
    with pytest.raises(DataError, match="ordinary token"):
        with_special_tokens(tokenizer_folder, {"[NEW]": size - 1}, tmp_path / "copy")
    with pytest.raises(DataError, match=f"has id {size}, but the model's has {size + 5}"):
        with_special_tokens(tokenizer_folder, {"[NEW]": size + 5}, tmp_path / "copy")
    extended = with_special_tokens(tokenizer_folder, {"[NEW]": size}, tmp_path / "copy")
    with pytest.raises(DataError, match=f"has id {size}, but the model's has {size + 1}"):
        with_special_tokens(extended, {"[NEW]": size + 1}, tmp_path / "again")


def test_roles_are_found_by_name_and_kept_in_a_copy(tokenizer_folder: Path, tmp_path: Path) -> None:
    trained = load_tokenizer(tokenizer_folder)
    assert trained.special_ids() == {"eos": 0, "eot": 1, "mask": 2}
    transformers_tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    assert transformers_tokenizer.mask_token_id == 2
    assert transformers_tokenizer.encode("[MASK]") != [2] or transformers_tokenizer.convert_ids_to_tokens(2) == "[MASK]"
    roles = {"mask": 1, "eos": 0, "eot": 2}
    file = with_special_tokens(tokenizer_folder, {}, tmp_path / "copy", roles)
    assert file.parent == tmp_path / "copy"
    assert load_tokenizer(file).special_ids() == roles
    assert load_tokenizer(file).eod_id == trained.eod_id
    assert AutoTokenizer.from_pretrained(tmp_path / "copy").mask_token_id == 1
    with pytest.raises(DataError, match=r"has no token 99999, which eot_token_id names"):
        with_special_tokens(tokenizer_folder, {}, tmp_path / "no", {"eot": 99999})


def test_roles_of_published_names(tmp_path: Path) -> None:
    names = ["<|endoftext|>", "<|eot_id|>", "<|mdm_mask|>", "a"]  # GSAI-ML/LLaDA-8B-Base's names
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}))
    backend.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).special_ids() == {"eos": 0, "eot": 1, "mask": 2}

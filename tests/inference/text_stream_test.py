"""Text piece by piece: whole characters, no stop strings, nothing taken back."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptoughts.data.tokenizer import Tokenizer, load_tokenizer
from gptoughts.inference.text_stream import TextStream
from tests.checkpoint.huggingface.conftest import tokenizer_folder  # noqa: F401

TEXT = "the cat 猫 sat 😀 on the mät\n"


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> Tokenizer:  # noqa: F811
    return load_tokenizer(tokenizer_folder)


def pieces(stream: TextStream, ids: list[int]) -> list[str]:
    return [*(stream.push(token) for token in ids), stream.finish()]


def test_no_half_characters(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    found = pieces(TextStream(tokenizer), ids)
    assert "".join(found) == TEXT
    assert not any("\ufffd" in piece for piece in found)
    assert "猫" in found, "three bytes are three tokens of this vocabulary: the character comes with the third"
    assert found.count("") > 6


def byte(tokenizer: Tokenizer, text: str, index: int) -> int:
    """The token of one byte of a character that is no token of its own."""
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    return ids[index]


def test_broken_bytes_are_left_out(tokenizer: Tokenizer) -> None:
    head, tail = byte(tokenizer, "😀", 0), byte(tokenizer, "😀", 3)
    letters = tokenizer.encode("at")
    assert "".join(pieces(TextStream(tokenizer), [head, *letters, tail, *letters, head])) == "atat"
    many = [tail] * 9 + letters
    assert "".join(pieces(TextStream(tokenizer), many)) == "at"
    stuck = [tail] * 7 + tokenizer.encode("😀")
    assert "".join(pieces(TextStream(tokenizer), stuck)) == "😀"


def test_special_tokens_have_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.eod_id is not None
    ids = [*tokenizer.encode("the"), tokenizer.eod_id, *tokenizer.encode(" cat")]
    assert "".join(pieces(TextStream(tokenizer), ids)) == "the cat"


def test_stops_before_a_string_that_spans_tokens(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, stop=("\n\nUser", "zzz"))
    found = []
    for token in tokenizer.encode("the cat\n\nUser: the dog"):
        found.append(stream.push(token))
        if stream.is_stopped:
            break
    assert "".join(found) == "the cat" == stream.text
    assert stream.finish() == ""


def test_what_only_looked_like_a_stop_string_comes_later(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, stop=("\n\nUser",))
    assert "".join(pieces(stream, tokenizer.encode("the\n\nUs, the dog\n\nU"))) == "the\n\nUs, the dog\n\nU"
    assert not stream.is_stopped


def test_the_first_of_several_stop_strings_counts(tokenizer: Tokenizer) -> None:
    assert "".join(pieces(TextStream(tokenizer, stop=("dog", "cat")), tokenizer.encode("the cat, the dog"))) == "the "

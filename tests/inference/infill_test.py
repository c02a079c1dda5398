"""Texts with holes."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers

from gptoughts.data.tokenizer import Tokenizer
from gptoughts.errors import DataError
from gptoughts.inference.infill import num_masks, pieces_of, row_of, text_of, unescaped

MASK = 256


def byte_tokenizer(folder: Path) -> Tokenizer:
    """Every byte is a token, and [MASK] one more."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["[MASK]"])
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder / "tokenizer.json")


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return byte_tokenizer(tmp_path)


def row_with_holes(text: str, tokenizer: Tokenizer) -> list[int]:
    pieces = pieces_of(text)
    row = row_of(pieces, tokenizer, MASK)
    assert row.count(MASK) == num_masks(pieces)
    return row


def test_holes_are_masks_and_the_rest_is_kept(tokenizer: Tokenizer) -> None:
    assert tokenizer.special_ids()["mask"] == MASK
    row = row_with_holes("ab[MASK*3]\n  c[MASK][MASK*2]", tokenizer)
    assert row == [*tokenizer.encode("ab"), *[MASK] * 3, *tokenizer.encode("\n  c"), *[MASK] * 3]
    filled = [tokenizer.encode("x")[0] if token == MASK else token for token in row]
    assert text_of(filled, tokenizer) == "abxxx\n  cxxx"
    assert row_with_holes("[MASK*2]é", tokenizer) == [MASK, MASK, *tokenizer.encode("é")]


def test_what_looks_like_a_word_is_text(tokenizer: Tokenizer) -> None:
    row = row_with_holes("[MASKED] [MASK] [MASK S]", tokenizer)
    assert row.count(MASK) == 1
    assert text_of(row, tokenizer) == "[MASKED]  [MASK S]"


@pytest.mark.parametrize("hole", ["[MASK*0]", "[MASK*-3]", "[MASK*]", "[MASK*x]", "[MASK*2.5]", "[MASK:4]"])
def test_holes_that_cannot_be_are_all_named(hole: str) -> None:
    with pytest.raises(DataError) as caught:
        pieces_of(f"a{hole}b[MASK*2]c{hole}")
    assert caught.value.problems == [f"infill: {hole}: a hole is [MASK*N] with N of at least 1, or [MASK]"] * 2


def test_a_text_without_a_hole_is_refused() -> None:
    with pytest.raises(DataError, match="has no hole"):
        pieces_of("abc")


def test_escapes_of_a_command_line() -> None:
    assert unescaped(r"a\n\tb\\n\x") == "a\n\tb\\n\\x"

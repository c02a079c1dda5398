"""Texts with holes: ``def f(x):\\n    [MASK*20]\\n    return y`` becomes tokens with that many masks between them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gptoughts.errors import DataError

if TYPE_CHECKING:
    from gptoughts.data.tokenizer import Tokenizer

_HOLE = re.compile(r"(\[MASK[^\]\w\s][^\]\n]*\]|\[MASK\])")
_NUMBER = re.compile(r"\[MASK\*(\d+)\]")
_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}


def unescaped(text: str) -> str:
    r"""A text from a command line, where ``\n`` is a line break, ``\t`` a tab and ``\\`` a backslash."""
    return re.sub(r"\\[nt\\]", lambda match: _ESCAPES[match[0]], text)


def pieces_of(text: str) -> list[str | int]:
    """A text taken apart at its holes, ``[MASK*N]`` or ``[MASK]`` for one token: a hole is its number of tokens.

    Raises:
        DataError: a hole has no number, or is of no token, or there is none; says all that is wrong.
    """
    found: list[str | int] = []
    problems = []
    for n, piece in enumerate(_HOLE.split(text)):
        if n % 2 == 0:
            found += [piece] if piece else []
            continue
        number = _NUMBER.fullmatch(piece)
        if piece != "[MASK]" and (number is None or int(number[1]) < 1):
            problems.append(f"infill: {piece}: a hole is [MASK*N] with N of at least 1, or [MASK]")
        else:
            found.append(int(number[1]) if number else 1)
    if not problems and not any(isinstance(piece, int) for piece in found):
        problems.append("infill: the text has no hole; write [MASK*N] where N tokens are to be found")
    if problems:
        raise DataError(problems)
    return found


def num_masks(pieces: Sequence[str | int]) -> int:
    """Tokens of all holes."""
    return sum(piece for piece in pieces if isinstance(piece, int))


def row_of(pieces: Sequence[str | int], tokenizer: Tokenizer, mask: int) -> list[int]:
    """Tokens of a text, each part between holes tokenized by itself, with the mask for each token of a hole."""
    row: list[int] = []
    for piece in pieces:
        row += [mask] * piece if isinstance(piece, int) else tokenizer.encode(piece)
    return row


def text_of(row: Sequence[int], tokenizer: Tokenizer) -> str:
    """A restored row as text, without special tokens."""
    return tokenizer.decode(row, skip_special=True)

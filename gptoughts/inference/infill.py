"""Texts with holes: ``def f(x):\\n    [MASK*20]\\n    return y`` becomes tokens with that many masks between them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from gptoughts.data.tokenizer import Tokenizer
from gptoughts.errors import DataError

_HOLE = re.compile(r"(\[MASK[^\]\w\s][^\]\n]*\]|\[MASK\])")
_NUMBER = re.compile(r"\[MASK\*(\d+)\]")
_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}


def unescaped(text: str) -> str:
    r"""A text from a command line, where ``\n`` is a line break, ``\t`` a tab and ``\\`` a backslash."""
    return re.sub(r"\\[nt\\]", lambda match: _ESCAPES[match[0]], text)


def row_with_holes(text: str, tokenizer: Tokenizer, mask: int) -> list[int]:
    """Tokens of a text whose holes, ``[MASK*N]`` or ``[MASK]`` for one token, are N masks.

    The texts between holes are tokenized each by itself.

    Raises:
        DataError: a hole has no number, or is of no token, or there is none; says all that is wrong.
    """
    row: list[int] = []
    problems = []
    for n, piece in enumerate(_HOLE.split(text)):
        if n % 2 == 0:
            row += tokenizer.encode(piece) if piece else []
            continue
        number = _NUMBER.fullmatch(piece)
        if piece != "[MASK]" and (number is None or int(number[1]) < 1):
            problems.append(f"infill: {piece}: a hole is [MASK*N] with N of at least 1, or [MASK]")
            continue
        row += [mask] * (int(number[1]) if number else 1)
    if not problems and mask not in row:
        problems.append("infill: the text has no hole; write [MASK*N] where N tokens are to be found")
    if problems:
        raise DataError(problems)
    return row


def text_of(row: Sequence[int], tokenizer: Tokenizer) -> str:
    """A restored row as text, without special tokens."""
    return tokenizer.decode(row, skip_special=True)

"""What is scored of an indexed corpus: whole rows, as validation in training reads them, or documents in windows."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gptoughts.config.experiment import DataConfig
from gptoughts.data.corpus import inspect_corpus
from gptoughts.data.indexed import bin_path, read_index, read_sidecar, sidecar_path
from gptoughts.data.order import permute
from gptoughts.data.pretrain import build_validation_samples
from gptoughts.data.tokenizer import Tokenizer, load_tokenizer
from gptoughts.errors import DataError
from gptoughts.inference.likelihood_scorer import Request

_ORDER_SEED = 1234


def check_corpora(
    prefixes: Sequence[str], tokenizer: Tokenizer, *, block_size: int, num_extra_tokens: int, vocab_size: int
) -> None:
    """Refuse corpora that the model cannot read; of tokens it reads only those that no sidecar vouches for.

    Raises:
        DataError: empty, damaged, shorter than a row, with ids beyond the vocabulary, or of another tokenizer.
    """
    problems: list[str] = []
    for prefix in prefixes:
        data = DataConfig(train=[prefix], valid=[prefix], tokenizer=str(tokenizer.file))
        try:
            inspect_corpus(data, seq_length=block_size, num_extra_tokens=num_extra_tokens, vocab_size=vocab_size)
            problems += _tokenizer_problems(prefix, tokenizer)
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(list(dict.fromkeys(problems)))


def _tokenizer_problems(prefix: str, tokenizer: Tokenizer) -> list[str]:
    """A line where the corpus was made with a tokenizer that gives other ids than the model's."""
    name = (read_sidecar(prefix) or {}).get("tokenizer")
    beside = os.path.join(os.path.dirname(prefix), name) if isinstance(name, str) else ""
    if not os.path.exists(beside):
        return []  # a corpus of another tool, or one that was moved without its tokenizer
    differences = load_tokenizer(beside).differences(tokenizer)
    if not differences:
        return []
    token, (there, here) = next(iter(differences.items()))
    return [
        f"{sidecar_path(prefix)}: its tokenizer {beside} gives other ids than the model's ({tokenizer.file}) to "
        f"{len(differences)} tokens: {token!r} is {there} there, {here} here; prepare the corpus with the model's own"
    ]


class Texts(ABC):
    """A corpus as requests, in an order that depends on nothing but the corpus."""

    @abstractmethod
    def __len__(self) -> int:
        """Texts of the whole corpus."""

    @abstractmethod
    def requests(self, number: int) -> list[Request]:
        """What is scored of one text; together each of its tokens once."""


class Rows(Texts):
    """Rows of ``block_size`` tokens, the same that validation during training sees, in the same order.

    Args:
        prefix: The corpus.
        block_size: Tokens per row that go into the model.
        is_causal: Whether the row's next token is predicted too, and its first one only given.
        is_shifted: Whether a masked-diffusion model predicts no row's first token.
        cache_dir: Folder for index tables; None: beside the corpus.
    """

    def __init__(
        self, prefix: str, *, block_size: int, is_causal: bool, is_shifted: bool, cache_dir: str | None = None
    ) -> None:
        self._num_given = int(is_causal or is_shifted)
        self._samples = build_validation_samples(
            [(1.0, prefix)], seq_length=block_size, num_extra_tokens=int(is_causal), cache_dir=cache_dir
        )

    def __len__(self) -> int:
        return len(self._samples)

    def requests(self, number: int) -> list[Request]:
        tokens = self._samples[number]
        return [Request(tokens[: self._num_given].tolist(), tokens[self._num_given :].tolist())]


class Documents(Texts):
    """Each document by itself, after the end-of-text token, in windows that overlap.

    The first window scores as many tokens as the model can see, each further one the next ``stride`` tokens with all
    that fits before them as its prompt: a token has at least ``block_size - stride`` tokens of its document before it,
    or all there are.

    Args:
        prefix: The corpus.
        block_size: Tokens that the model may see.
        stride: Tokens that a window scores, 1 ... block_size.
        start_id: What stands before a document.
    """

    def __init__(self, prefix: str, *, block_size: int, stride: int, start_id: int) -> None:
        index = read_index(prefix)
        ends = np.concatenate(([0], np.cumsum(index.lengths, dtype=np.int64)))
        bounds = ends[index.document_bounds]
        is_filled = bounds[1:] > bounds[:-1]
        self._starts, self._stops = bounds[:-1][is_filled], bounds[1:][is_filled]
        self._tokens: NDArray[np.integer] = np.memmap(bin_path(prefix), dtype=index.dtype, mode="r")
        self._block_size, self._stride, self._start_id = block_size, stride, start_id

    def __len__(self) -> int:
        return len(self._starts)

    def requests(self, number: int) -> list[Request]:
        place = permute(
            np.array([number]), len(self), seed=_ORDER_SEED, epochs=np.zeros(1, dtype=np.int64), stream=0
        )[0]  # fmt: skip
        tokens = [self._start_id, *self._tokens[self._starts[place] : self._stops[place]].tolist()]
        return windows(tokens, self._block_size, self._stride)


def windows(tokens: Sequence[int], block_size: int, stride: int) -> list[Request]:
    """Every token but the first once, the first window's as many as fit, then ``stride`` at a time."""
    found = []
    start, stop = 1, min(len(tokens), block_size + 1)
    while start < len(tokens):
        # The last token scored is not looked at, so that one more fits.
        found.append(Request(tokens[max(0, stop - 1 - block_size) : start], tokens[start:stop]))
        start, stop = stop, min(len(tokens), stop + stride)
    return found

"""What ``data.train`` and ``data.valid`` name, and everything wrong with it, before a run starts (imports no torch)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gptoughts.config.experiment import DataConfig
from gptoughts.data.indexed import Index, index_path, read_index, read_sidecar, scan_max_token_id, sidecar_path
from gptoughts.errors import DataError

_SPLIT_NAMES = ("_train", "_valid")


@dataclass(frozen=True)
class CorpusInfo:
    """A checked corpus."""

    train: list[tuple[float, str]]
    """Weight and prefix of each training corpus; where no weights are given, its tokens."""
    valid: list[tuple[float, str]]
    """The same for validation; weights are 1, every sample is read once. Empty where there is none."""
    tokenizer: str | None
    """tokenizer.json or a folder with one; None where neither the command line nor the corpus names one."""
    vocab_size: int | None
    """Of the tokenizer; None where it is not known."""
    eod_id: int | None
    """Token that ends a document; None where it is not known."""
    num_train_tokens: int
    num_valid_tokens: int
    max_token_id: int
    """Largest id in any of the corpora."""


@dataclass(frozen=True)
class _Corpus:
    """One prefix that could be read."""

    prefix: str
    index: Index
    sidecar: dict[str, Any] | None
    max_token_id: int

    @property
    def tokenizer(self) -> str | None:
        """Folder of the tokenizer copied beside the corpus, if it is still there; else where it was taken from."""
        if self.sidecar is None or not isinstance(self.sidecar.get("tokenizer"), str):
            return None
        beside = os.path.join(os.path.dirname(self.prefix), self.sidecar["tokenizer"])
        source = self.sidecar.get("tokenizer_source")
        return source if not os.path.exists(beside) and isinstance(source, str) and os.path.exists(source) else beside


def _as_weight(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def parse_blend(words: Sequence[str], *, option: str) -> list[tuple[float | None, str]]:
    """Read PREFIX [PREFIX ...] (their weights are None) or WEIGHT PREFIX pairs.

    Args:
        words: The values of the option.
        option: Its name, for messages.

    Raises:
        DataError: Weights and prefixes are mixed up, or a weight is not a positive number.
    """
    weights = [_as_weight(word) for word in words]
    # A prefix may look like a number only if such a corpus is there.
    is_weight = [
        weight is not None and not os.path.exists(index_path(word)) for word, weight in zip(words, weights, strict=True)
    ]
    if not any(is_weight):
        pairs: list[tuple[float | None, str]] = [(None, word) for word in words]
    elif len(words) % 2 == 0 and all(is_weight[::2]) and not any(is_weight[1::2]):
        pairs = [(weight, word) for weight, word in zip(weights[::2], words[1::2], strict=True)]
    else:
        raise DataError(f"{option}={' '.join(words)}: give PREFIX [PREFIX ...], or a WEIGHT before every PREFIX")
    bad = [f"{weight:g}" for weight, _ in pairs if weight is not None and not 0 < weight < float("inf")]
    if bad:
        raise DataError(f"{option}={' '.join(words)}: weight {', '.join(bad)}; positive numbers expected")
    return [(weight, prefix.removesuffix(".idx").removesuffix(".bin")) for weight, prefix in pairs]


def _resolve_split(prefix: str, split: str) -> str:
    """PREFIX itself, or PREFIX_train where only a split corpus is there."""
    is_split = not os.path.isfile(index_path(prefix)) and os.path.isfile(index_path(f"{prefix}{split}"))
    return f"{prefix}{split}" if is_split else prefix


def _validation_beside(prefix: str) -> str | None:
    stem = prefix.removesuffix("_train")
    return f"{stem}_valid" if stem != prefix and os.path.isfile(index_path(f"{stem}_valid")) else None


def _read_corpus(prefix: str) -> _Corpus:
    index = read_index(prefix)
    sidecar = read_sidecar(prefix)
    is_described = (
        sidecar is not None
        and sidecar.get("bin_bytes") == index.bin_bytes
        and sidecar.get("idx_bytes") == os.path.getsize(index_path(prefix))
        and isinstance(sidecar.get("max_token_id"), int)
    )
    # A corpus of another tool, or one whose files were replaced: look at every token.
    max_token_id = sidecar["max_token_id"] if sidecar is not None and is_described else scan_max_token_id(index)
    return _Corpus(prefix, index, sidecar, max_token_id)


def _read_all(prefixes: Sequence[str], *, num_tokens: int, problems: list[str]) -> list[_Corpus]:
    corpora = []
    for prefix in prefixes:
        try:
            corpus = _read_corpus(prefix)
        except DataError as error:
            problems.extend(error.problems)
            continue
        if corpus.index.num_tokens == 0:
            problems.append(f"corpus {prefix!r}: it is empty (no tokens)")
        elif corpus.index.num_tokens < num_tokens:
            problems.append(
                f"corpus {prefix!r}: {corpus.index.num_tokens} tokens are fewer than one sample of {num_tokens} "
                "(block_size and the tokens to predict); use a smaller --block_size or more text"
            )
        corpora.append(corpus)
    return corpora


@dataclass(frozen=True)
class _Vocabulary:
    tokenizer: str | None
    vocab_size: int | None
    eod_id: int | None


def _find_vocabulary(given: str | None, corpora: Sequence[_Corpus], problems: list[str]) -> _Vocabulary:
    """The tokenizer that the corpora were made with, or the one that is given."""
    if given is not None:
        # Imported here: the tokenizers library is needed only where the corpus does not say it all.
        from gptoughts.data.tokenizer import load_tokenizer

        try:
            tokenizer = load_tokenizer(given)
        except DataError as error:
            problems.extend(f"data.tokenizer: {problem}" for problem in error.problems)
            return _Vocabulary(None, None, None)
        return _Vocabulary(given, tokenizer.vocab_size, tokenizer.eod_id)
    described = [corpus for corpus in corpora if corpus.sidecar is not None]
    if not described:
        return _Vocabulary(None, None, None)
    first = described[0]
    assert first.sidecar is not None
    vocab_size, eod_id = first.sidecar.get("vocab_size"), first.sidecar.get("eod_id")
    for other in described[1:]:
        assert other.sidecar is not None
        found = other.sidecar.get("vocab_size"), other.sidecar.get("eod_id")
        if found != (vocab_size, eod_id):
            problems.append(
                f"{sidecar_path(other.prefix)}: vocab_size and eod_id {found} differ from {(vocab_size, eod_id)} of "
                f"{sidecar_path(first.prefix)}; blended corpora need one tokenizer"
            )
    if not isinstance(vocab_size, int):
        problems.append(f"{sidecar_path(first.prefix)}: vocab_size={vocab_size!r}; a whole number expected")
        vocab_size = None
    if first.tokenizer is not None and not os.path.exists(first.tokenizer):
        problems.append(
            f"{sidecar_path(first.prefix)}: its tokenizer {first.tokenizer!r} is missing; set --data.tokenizer"
        )
    return _Vocabulary(first.tokenizer, vocab_size, eod_id if isinstance(eod_id, int) else None)


def _resolve(data: DataConfig, problems: list[str]) -> tuple[list[tuple[float | None, str]], list[str]]:
    blends: dict[str, list[tuple[float | None, str]]] = {}
    for option, words, split in (("data.train", data.train, "_train"), ("data.valid", data.valid, "_valid")):
        try:
            pairs = parse_blend(words, option=option)
        except DataError as error:
            problems.extend(error.problems)
            pairs = []
        blends[option] = [(weight, _resolve_split(prefix, split)) for weight, prefix in pairs]
    train, valid = blends["data.train"], blends["data.valid"]
    if not data.train:
        problems.append("data.train: no corpus given; --data PREFIX names one (tools/preprocess_data.py makes one)")
    if any(weight is not None for weight, _ in valid):
        problems.append(f"data.valid={' '.join(data.valid)}: validation reads every sample once, it takes no weights")
    if not data.valid:
        beside = [_validation_beside(prefix) for _, prefix in train]
        return train, list(dict.fromkeys(filter(None, beside)))
    return train, [prefix for _, prefix in valid]


def inspect_corpus(
    data: DataConfig, *, seq_length: int, num_extra_tokens: int = 1, vocab_size: int | None = None
) -> CorpusInfo:
    """Find and check the corpora of a run; of tokens it reads only those that no sidecar vouches for.

    Args:
        data: The ``data`` group of the configuration.
        seq_length: Tokens per sample that go into the model.
        num_extra_tokens: Further tokens per sample that are only predicted.
        vocab_size: Check token ids against this many entries too; None: against the tokenizer's alone.

    Raises:
        DataError: With every problem found, one line each.
    """
    problems: list[str] = []
    train, valid = _resolve(data, problems)
    needed = seq_length + num_extra_tokens
    train_corpora = _read_all([prefix for _, prefix in train], num_tokens=needed, problems=problems)
    valid_corpora = _read_all(valid, num_tokens=needed, problems=problems)
    corpora = [*train_corpora, *valid_corpora]
    vocabulary = _find_vocabulary(data.tokenizer, corpora, problems)
    limits = [size for size in (vocabulary.vocab_size, vocab_size) if size is not None]
    for corpus in corpora:
        if limits and corpus.max_token_id >= min(limits):
            problems.append(
                f"corpus {corpus.prefix!r}: it holds token id {corpus.max_token_id}, but the vocabulary has "
                f"{min(limits)} entries; was it made with another tokenizer?"
            )
    if problems:
        raise DataError(problems)
    return CorpusInfo(
        # Without weights every corpus is read equally often.
        train=[
            (float(corpus.index.num_tokens) if weight is None else weight, prefix)
            for (weight, prefix), corpus in zip(train, train_corpora, strict=True)
        ],
        valid=[(1.0, prefix) for prefix in valid],
        tokenizer=vocabulary.tokenizer,
        vocab_size=vocabulary.vocab_size,
        eod_id=vocabulary.eod_id,
        num_train_tokens=sum(corpus.index.num_tokens for corpus in train_corpora),
        num_valid_tokens=sum(corpus.index.num_tokens for corpus in valid_corpora),
        max_token_id=max((corpus.max_token_id for corpus in corpora), default=-1),
    )

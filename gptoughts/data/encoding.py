"""The part of preprocessing that runs in worker processes: texts in, token arrays per split out."""

from __future__ import annotations

import functools
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptoughts.data.documents import EncodingErrors, Inputs, read_rows, read_text, stream_text
from gptoughts.data.indexed import optimal_dtype
from gptoughts.data.tokenizer import Tokenizer, load_tokenizer

TASK_BYTES = 1 << 20
"""Text of one task; large enough that its hand-over costs little, small enough that memory stays bounded."""
LARGEST_PIECE_CHARACTERS = 1 << 22
"""A longer document is tokenized in pieces (its tokens stay one document)."""


@dataclass(frozen=True)
class EncodeSettings:
    """What every worker has to know."""

    tokenizer: str
    append_eod: bool
    text_field: str
    encoding_errors: EncodingErrors
    validation_fraction: float
    seed: int


@dataclass(frozen=True)
class Task:
    """Consecutive documents, or a piece of one."""

    first_document: int
    num_documents: int
    texts: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    """Small text files, which the worker reads itself."""
    num_input_bytes: int = 0
    """For the progress bar."""
    is_start: bool = True
    """False: goes on with the last document of the task before."""
    is_end: bool = True
    """False: the next task goes on with the last document."""


@dataclass
class SplitTokens:
    """Tokens of one task that belong to one split."""

    tokens: NDArray[Any]
    lengths: NDArray[np.int32]
    text_bytes: int
    max_token_id: int


@dataclass
class EncodedTask:
    """What became of a task."""

    splits: dict[str, SplitTokens] = field(default_factory=dict)
    num_empty: int = 0
    num_not_utf8: int = 0
    text_bytes: int = 0


def is_validation_document(documents: NDArray[np.int64], *, seed: int, fraction: float) -> NDArray[np.bool_]:
    """Whether each document is held out: a function of its number and the seed alone (splitmix64), [documents].

    So the split is the same for any number of workers, and growing the corpus at its end moves no document.
    """
    with np.errstate(over="ignore"):
        state = documents.astype(np.uint64) + np.uint64(seed % (1 << 64)) * np.uint64(0xD1342543DE82EF95)
        state = (state + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53 < fraction


def _pieces(text: str) -> Iterator[str]:
    """Cut a long text where any usual pre-tokenizer cuts too: after a single line end between two words."""
    start = 0
    while len(text) - start > LARGEST_PIECE_CHARACTERS:
        end = text.rfind("\n", start + 1, start + LARGEST_PIECE_CHARACTERS)
        while end > start and (text[end - 1].isspace() or text[end + 1].isspace()):
            end = text.rfind("\n", start + 1, end)
        # A text without any such line end is cut where the limit falls.
        cut = end + 1 if end > start else start + LARGEST_PIECE_CHARACTERS
        yield text[start:cut]
        start = cut
    yield text[start:]


def _document_tasks(document: int, pieces: Iterator[str], num_input_bytes: int) -> Iterator[Task]:
    is_start = True
    previous: str | None = None
    for piece in pieces:
        if previous is not None:
            yield Task(document, 1, texts=(previous,), is_start=is_start, is_end=False)
            is_start = False
        previous = piece
    yield Task(document, 1, texts=(previous or "",), is_start=is_start, num_input_bytes=num_input_bytes)


def _stream_pieces(blocks: Iterator[str]) -> Iterator[str]:
    """Pieces of a text that arrives in blocks, with never much more than one piece in memory."""
    rest = ""
    for block in blocks:
        rest += block
        *whole, rest = _pieces(rest)
        yield from whole
    yield rest


def make_tasks(inputs: Inputs, settings: EncodeSettings) -> Iterator[Task]:
    """Cut the inputs into tasks; the same tasks in the same order for any number of workers."""
    document = 0
    paths: list[str] = []
    num_bytes = 0

    def path_task() -> Task:
        return Task(document - len(paths), len(paths), paths=tuple(paths), num_input_bytes=num_bytes)

    for file in inputs.files:
        is_small_text = file.row_format is None and file.num_bytes <= LARGEST_PIECE_CHARACTERS
        if paths and (not is_small_text or num_bytes + file.num_bytes > TASK_BYTES):
            yield path_task()
            paths, num_bytes = [], 0
        if is_small_text:
            paths.append(file.path)
            num_bytes += file.num_bytes
            document += 1
        elif file.row_format is None:
            blocks = stream_text(file.path, settings.encoding_errors, block_bytes=LARGEST_PIECE_CHARACTERS)
            yield from _document_tasks(document, _stream_pieces(blocks), file.num_bytes)
            document += 1
        else:
            for task in _row_tasks(document, read_rows(file, settings.text_field)):
                document = task.first_document + task.num_documents
                yield task
            yield Task(document, 0, num_input_bytes=file.num_bytes)
    if paths:
        yield path_task()


def _row_tasks(document: int, batches: Iterator[list[str]]) -> Iterator[Task]:
    texts: list[str] = []
    size = 0
    for batch in batches:
        for text in batch:
            is_long = len(text) > LARGEST_PIECE_CHARACTERS
            if texts and (is_long or size + len(text) > TASK_BYTES):
                yield Task(document, len(texts), texts=tuple(texts))
                document += len(texts)
                texts, size = [], 0
            if is_long:
                yield from _document_tasks(document, _pieces(text), 0)
                document += 1
            else:
                texts.append(text)
                size += len(text)
    if texts:
        yield Task(document, len(texts), texts=tuple(texts))


@functools.lru_cache(maxsize=1)
def _loaded_tokenizer(path: str) -> Tokenizer:
    return load_tokenizer(path)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def prepare_worker(tokenizer: str) -> None:
    """Initialiser of a worker process: one thread each, tokenizer loaded before the first task, no life of its own."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # A parent that is killed cannot end its pool, whose workers would then wait for tasks for ever.
    threading.Thread(target=_end_with_parent, name="end-with-parent", daemon=True).start()
    _loaded_tokenizer(tokenizer)


def encode_task(task: Task, settings: EncodeSettings) -> EncodedTask:
    """Tokenize one task.

    Raises:
        DataError: A file of it cannot be read.
    """
    tokenizer = _loaded_tokenizer(settings.tokenizer)
    result = EncodedTask()
    texts: list[str | None] = list(task.texts)
    for path in task.paths:
        text, is_utf8 = read_text(path, settings.encoding_errors)
        texts.append(text)
        result.num_not_utf8 += not is_utf8
    ends = [True] * len(texts)
    if texts:
        ends[-1] = task.is_end
    numbers = np.arange(task.first_document, task.first_document + len(texts))
    is_kept = np.array([bool(text) or not (task.is_start and end) for text, end in zip(texts, ends, strict=True)], bool)
    result.num_empty = int(sum(text == "" for text in texts) if task.is_start and task.is_end else 0)
    kept = [text or "" for text, keep in zip(texts, is_kept, strict=True) if keep]
    ids = tokenizer.encode_batch(kept)
    if settings.append_eod:
        for row, end in zip(ids, np.array(ends, bool)[is_kept], strict=True):
            if end:
                row.append(tokenizer.eod_id)  # type: ignore[arg-type]  # preprocess refused a tokenizer without one
    is_valid = is_validation_document(numbers, seed=settings.seed, fraction=settings.validation_fraction)[is_kept]
    dtype = optimal_dtype(tokenizer.vocab_size)
    for name, wanted in (("train", False), ("valid", True)):
        chosen = np.flatnonzero(is_valid == wanted)
        if len(chosen):
            result.splits[name] = _pack([ids[i] for i in chosen], [kept[i] for i in chosen], dtype)
    result.text_bytes = sum(split.text_bytes for split in result.splits.values())
    return result


def _pack(rows: list[list[int]], texts: list[str], dtype: np.dtype[Any]) -> SplitTokens:
    lengths = np.array([len(row) for row in rows], dtype=np.int32)
    tokens = np.empty(int(lengths.sum()), dtype=dtype)
    start = 0
    for row in rows:
        tokens[start : start + len(row)] = row
        start += len(row)
    return SplitTokens(
        tokens=tokens,
        lengths=lengths,
        text_bytes=sum(len(text.encode()) for text in texts),
        max_token_id=int(tokens.max()) if len(tokens) else -1,
    )

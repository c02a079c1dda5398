"""Where documents come from: text files, folders of them, .jsonl (.gz, .zst) and .parquet, in a fixed order.

A document is a row of a .jsonl or .parquet file, or a whole text file. Rows are read through Hugging Face
``datasets`` in streaming mode, so that memory does not grow with the file.
"""

from __future__ import annotations

import codecs
import fnmatch
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gptoughts.errors import DataError

_ROW_SUFFIXES = {".jsonl": "json", ".jsonl.gz": "json", ".jsonl.zst": "json", ".parquet": "parquet"}
_REFUSED_SUFFIXES = (".gz", ".zst", ".xz", ".bz2", ".zip", ".tar", ".7z")
_ROWS_PER_READ = 512
_SNIFFED_BYTES = 4096

EncodingErrors = Literal["replace", "skip", "strict"]


@dataclass(frozen=True)
class SourceFile:
    """One input file."""

    path: str
    num_bytes: int
    row_format: str | None
    """The ``datasets`` loader for its rows; None: the whole file is one document."""


@dataclass(frozen=True)
class Inputs:
    """What a list of paths means, in the order in which it is read."""

    files: tuple[SourceFile, ...]
    num_binary_files: int
    """Files of the folders that were left out because they hold no text."""

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)


def _row_format(path: str) -> str | None:
    return next((loader for suffix, loader in _ROW_SUFFIXES.items() if path.lower().endswith(suffix)), None)


def _is_text(path: str) -> bool:
    with open(path, "rb") as stream:
        return b"\0" not in stream.read(_SNIFFED_BYTES)


def _walk(folder: str, exclude: Sequence[str]) -> Iterator[str]:
    def is_excluded(name: str) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for pattern in exclude)

    def fail(error: OSError) -> None:  # os.walk would leave such a folder out without a word
        raise error

    for root, folders, names in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not is_excluded(name))
        for name in sorted(names):
            path = os.path.join(root, name)
            if not is_excluded(name) and os.path.isfile(path):
                yield path


def find_inputs(paths: Sequence[str], *, suffixes: Sequence[str], exclude: Sequence[str]) -> Inputs:
    """List the input files: files as they are named, folders recursively in sorted order.

    Args:
        paths: Files and folders.
        suffixes: In folders, take only names with one of these endings; empty: every text file.
        exclude: Patterns of file and folder names to leave out of folders.

    Raises:
        DataError: A path does not exist, is of no readable kind, or nothing is left to read.
    """
    problems: list[str] = []
    files: list[SourceFile] = []
    num_binary_files = 0
    for given in paths:
        if os.path.isdir(given):
            try:
                for path in _walk(given, exclude):
                    if suffixes and not path.endswith(tuple(suffixes)):
                        continue
                    row_format = _row_format(path)
                    if row_format is None and not _is_text(path):
                        num_binary_files += 1
                        continue
                    files.append(SourceFile(path, os.path.getsize(path), row_format))
            except OSError as error:
                problems.append(f"input {error.filename or given!r}: {error.strerror}")
        elif not os.path.isfile(given):
            problems.append(f"input {given!r}: no such file or folder")
        elif _row_format(given) is None and given.lower().endswith(_REFUSED_SUFFIXES):
            problems.append(
                f"input {given!r}: cannot read this format; {', '.join(_ROW_SUFFIXES)}, text and folders are"
            )
        else:
            files.append(SourceFile(given, os.path.getsize(given), _row_format(given)))
    if not files and not problems:
        wanted = f" ending in {' or '.join(suffixes)}" if suffixes else ""
        problems.append(f"input {' '.join(map(repr, paths))}: no text files{wanted} there")
    if problems:
        raise DataError(problems)
    return Inputs(tuple(files), num_binary_files)


def read_text(path: str, encoding_errors: EncodingErrors) -> tuple[str | None, bool]:
    """Read a whole text file as UTF-8.

    Returns:
        The text, or None where it is skipped, and whether every byte was UTF-8.

    Raises:
        DataError: Not UTF-8 under ``strict``, or unreadable.
    """
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"input {path!r}: {error.strerror}") from error
    try:
        return raw.decode("utf-8-sig"), True
    except UnicodeDecodeError as error:
        if encoding_errors == "strict":
            raise DataError(
                f"input {path!r}: byte {error.start} is not UTF-8 (--encoding_errors replace or skip)"
            ) from error
        return (None if encoding_errors == "skip" else raw.decode("utf-8-sig", errors="replace")), False


def stream_text(path: str, encoding_errors: EncodingErrors, *, block_bytes: int) -> Iterator[str]:
    """Read a large text file block by block; joined, the blocks are its text.

    Raises:
        DataError: Not UTF-8 under ``strict`` or ``skip`` (half of it would already have been taken), or unreadable.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")(errors="replace" if encoding_errors == "replace" else "strict")
    try:
        with open(path, "rb") as stream:
            while block := stream.read(block_bytes):
                yield decoder.decode(block)
            yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise DataError(f"input {path!r}: not UTF-8; use --encoding_errors replace, or leave this file out") from error
    except OSError as error:
        raise DataError(f"input {path!r}: {error.strerror}") from error


def read_rows(file: SourceFile, text_field: str) -> Iterator[list[str]]:
    """Read the text of a .jsonl or .parquet file's rows, some hundred at a time; a null is an empty text.

    Raises:
        DataError: The file is damaged, or has no such field, or its values are not strings.
    """
    # Slow to import, and not needed for text files.
    import datasets

    assert file.row_format is not None
    # It logs what it then raises, and the line here says it once.
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    columns = {"columns": [text_field]} if file.row_format == "parquet" else {}
    with tempfile.TemporaryDirectory(prefix="gptoughts-") as cache:  # it makes a folder there, and fills nothing in
        try:
            rows = datasets.load_dataset(
                file.row_format, data_files=[file.path], split="train", streaming=True, cache_dir=cache, **columns
            )
            for table in rows.with_format("arrow").iter(batch_size=_ROWS_PER_READ):
                yield _text_column(table, file, text_field)
        except DataError:
            raise
        except Exception as error:  # datasets wraps what pyarrow, gzip and zstandard raise in many types of its own
            if isinstance(error.__cause__ or error, StopIteration):  # its answer to a file without rows
                return
            reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
            raise DataError(f"input {file.path!r}: cannot be read as {file.row_format} ({reason[0]})") from error


def _text_column(table: Any, file: SourceFile, text_field: str) -> list[str]:
    if text_field not in table.column_names:
        raise DataError(
            f"input {file.path!r}: no field {text_field!r}; its fields: {', '.join(table.column_names)} "
            "(choose with --text_field)"
        )
    texts = table.column(text_field).to_pylist()
    if any(not isinstance(text, str) for text in texts if text is not None):
        raise DataError(f"input {file.path!r}: field {text_field!r} is not text in every row")
    return [text or "" for text in texts]

"""megatron-core's indexed corpus files, read and written with numpy alone.

``PREFIX.bin`` holds token ids one after another. ``PREFIX.idx`` holds, little-endian::

    9 bytes  MMIDIDX\\0\\0 | uint64 version 1 | uint8 dtype code | uint64 sequences n | uint64 document bounds m
    int32[n] tokens per sequence | int64[n] byte offset of each in the .bin | int64[m] first sequence of each document

``m`` is the number of documents plus one. Format: ``megatron/core/datasets/indexed_dataset.py`` (0.16.1, lines 45-230).
``PREFIX.json`` beside them is ours: what the corpus was made from, see docs/data.md.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from gptoughts.data.files import partial_path, publish, write_atomically
from gptoughts.errors import DataError

logger = logging.getLogger(__name__)

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
# Codes of megatron-core's DType that can hold token ids.
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}
_SCAN_CHUNK_TOKENS = 1 << 24


@dataclass(frozen=True)
class Index:
    """One opened .idx file; arrays are views of the mapped file."""

    prefix: str
    dtype: np.dtype[Any]
    """Type of the token ids in the .bin."""
    lengths: NDArray[np.int32]
    """Tokens of each sequence, [sequences]."""
    pointers: NDArray[np.int64]
    """Byte offset of each sequence in the .bin, [sequences]."""
    document_bounds: NDArray[np.int64]
    """First sequence of each document, and the number of sequences, [documents + 1]."""

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def num_documents(self) -> int:
        return len(self.document_bounds) - 1

    @property
    def bin_bytes(self) -> int:
        """Size that the .bin must have."""
        return self.num_tokens * self.dtype.itemsize


def index_path(prefix: str) -> str:
    return f"{prefix}.idx"


def bin_path(prefix: str) -> str:
    return f"{prefix}.bin"


def sidecar_path(prefix: str) -> str:
    return f"{prefix}.json"


def optimal_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest type that megatron-core uses for ids below ``vocab_size`` (its ``DType.optimal_dtype``)."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def read_index(prefix: str) -> Index:
    """Map ``PREFIX.idx`` and check it against itself and against the size of ``PREFIX.bin``.

    Raises:
        DataError: A file is missing, damaged, or they do not fit together.
    """
    path = index_path(prefix)
    missing = [file for file in (path, bin_path(prefix)) if not os.path.isfile(file)]
    if missing:
        raise DataError(f"corpus {prefix!r}: no such file: {', '.join(missing)} (tools/preprocess_data.py writes both)")
    size = os.path.getsize(path)
    with open(path, "rb") as stream:
        header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise DataError(f"{path}: damaged: it does not begin with megatron-core's index header")
    _, version, code, num_sequences, num_bounds = _HEADER.unpack(header)
    if version != 1 or code not in _DTYPES:
        raise DataError(
            f"{path}: damaged header: version {version}, type code {code}; version 1 of an integer type expected"
        )
    expected = _HEADER.size + 12 * num_sequences + 8 * num_bounds
    if size not in (expected, expected + num_sequences):  # the latter has megatron-core's sequence modes at the end
        raise DataError(f"{path}: damaged: {size} bytes, but its header asks for {expected}")
    content = np.memmap(path, mode="r")
    bounds = np.cumsum([_HEADER.size, 4 * num_sequences, 8 * num_sequences, 8 * num_bounds])
    index = Index(
        prefix=prefix,
        dtype=np.dtype(_DTYPES[code]),
        lengths=content[bounds[0] : bounds[1]].view(np.int32),
        pointers=content[bounds[1] : bounds[2]].view(np.int64),
        document_bounds=content[bounds[2] : bounds[3]].view(np.int64),
    )
    _check_index(index)
    return index


def _check_index(index: Index) -> None:
    path = index_path(index.prefix)
    ends = index.lengths.astype(np.int64).cumsum() * index.dtype.itemsize
    are_pointers_right = np.array_equal(index.pointers[1:], ends[:-1]) and not index.pointers[:1].any()
    if (len(index.lengths) and index.lengths.min() < 0) or not are_pointers_right:
        raise DataError(f"{path}: damaged: its sequence lengths and offsets contradict each other")
    is_bound_right = len(index.document_bounds) == 0 or index.document_bounds[-1] == len(index.lengths)
    if not is_bound_right or (np.diff(index.document_bounds) < 0).any():
        raise DataError(f"{path}: damaged: its document bounds do not cover its {len(index.lengths)} sequences")
    actual, described = os.path.getsize(bin_path(index.prefix)), index.bin_bytes
    if actual < described:
        raise DataError(f"{bin_path(index.prefix)}: truncated: {actual} bytes, but {path} describes {described}")
    if actual > described:
        raise DataError(f"{path}: does not fit its .bin: it describes {described} bytes, the .bin has {actual}")


def read_sidecar(prefix: str) -> dict[str, Any] | None:
    """The JSON object beside the corpus, or None where there is none (a corpus made by another tool).

    Raises:
        DataError: It is there but is not a JSON object.
    """
    path = Path(sidecar_path(prefix))
    if not path.is_file():
        return None
    try:
        sidecar = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); preprocess the corpus again, or remove the file") from error
    if not isinstance(sidecar, dict):
        raise DataError(f"{path}: a JSON object expected, found {type(sidecar).__name__}")
    return sidecar


def scan_max_token_id(index: Index) -> int:
    """Largest token id in the .bin (-1 where it is empty); reads all of it."""
    if index.num_tokens == 0:
        return -1
    tokens = np.memmap(bin_path(index.prefix), dtype=index.dtype, mode="r")
    chunks = range(0, len(tokens), _SCAN_CHUNK_TOKENS)
    return max(int(tokens[start : start + _SCAN_CHUNK_TOKENS].max()) for start in chunks)


class IndexedWriter:
    """Writes one corpus, document by document; nothing has its final name before :meth:`finish`.

    Args:
        prefix: Where the corpus will be.
        dtype: Type of token ids in the .bin.
        num_tokens: Tokens that an interrupted run left safely in the partial files (0: start anew).
        num_documents: Documents that it left there.
    """

    def __init__(self, prefix: str, dtype: np.dtype[Any], *, num_tokens: int = 0, num_documents: int = 0) -> None:
        self.prefix = prefix
        self.dtype = dtype
        self.num_tokens = num_tokens
        self._unsynced: list[NDArray[np.int32]] = []
        self._num_synced_documents = num_documents
        self._tokens = self._open(bin_path(prefix), num_tokens * dtype.itemsize)
        self._lengths = self._open(self._lengths_path, num_documents * 4)

    @property
    def _lengths_path(self) -> str:
        return f"{self.prefix}.lengths"

    @property
    def num_documents(self) -> int:
        return self._num_synced_documents + sum(map(len, self._unsynced))

    @staticmethod
    def _open(path: str, num_bytes: int) -> IO[bytes]:
        stream = os.fdopen(os.open(partial_path(path), os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            stream.close()
            raise DataError(f"output {path!r}: another process is writing it") from error
        except OSError:  # a file system without locks
            logger.debug("no file locks for %s", path)
        stream.truncate(num_bytes)
        stream.seek(num_bytes)
        return stream

    @staticmethod
    def can_resume(prefix: str, dtype: np.dtype[Any], *, num_tokens: int, num_documents: int) -> bool:
        """Whether the partial files hold at least this much."""
        wanted = {bin_path(prefix): num_tokens * dtype.itemsize, f"{prefix}.lengths": num_documents * 4}
        return all(
            partial_path(path).is_file() and partial_path(path).stat().st_size >= size for path, size in wanted.items()
        )

    def add(self, tokens: NDArray[Any], lengths: NDArray[np.int32], *, is_continued: bool = False) -> None:
        """Append documents.

        Args:
            tokens: Their ids one after another, [sum of lengths].
            lengths: Tokens of each, [documents].
            is_continued: The first of them goes on with the last document of the call before.
        """
        assert tokens.dtype == self.dtype
        assert len(tokens) == lengths.sum(dtype=np.int64)
        self._tokens.write(tokens.data)
        self.num_tokens += len(tokens)
        if is_continued and len(lengths):
            assert self._unsynced, "no sync between the pieces of a document"
            self._unsynced[-1][-1] += lengths[0]
            lengths = lengths[1:]
        if len(lengths):
            self._unsynced.append(lengths.astype(np.int32, copy=True))

    def sync(self) -> None:
        """Make everything added so far survive an interruption."""
        for lengths in self._unsynced:
            self._lengths.write(lengths.data)
            self._num_synced_documents += len(lengths)
        self._unsynced.clear()
        for stream in (self._tokens, self._lengths):
            stream.flush()
            os.fsync(stream.fileno())

    def close(self) -> None:
        """Close the partial files and leave them, for a later run to go on with."""
        self._tokens.close()
        self._lengths.close()

    def discard(self) -> None:
        """Close the partial files and remove them."""
        self.close()
        for path in (bin_path(self.prefix), self._lengths_path):
            partial_path(path).unlink(missing_ok=True)

    def finish(self) -> None:
        """Write the index and give both files their names: .bin first, so that an .idx never lacks its .bin."""
        self.sync()
        self.close()
        lengths = np.fromfile(partial_path(self._lengths_path), dtype=np.int32)
        ends = lengths.astype(np.int64).cumsum() * self.dtype.itemsize
        pointers = np.concatenate([np.zeros(1, np.int64), ends[:-1]]) if len(lengths) else ends

        def write(stream: IO[bytes]) -> None:
            stream.write(_HEADER.pack(_MAGIC, 1, _CODES[self.dtype], len(lengths), len(lengths) + 1))
            for array in (lengths, pointers, np.arange(len(lengths) + 1, dtype=np.int64)):
                stream.write(array.data)

        # A new .bin beside an old .idx would look whole to a reader if the sizes happened to agree.
        for stale in (index_path(self.prefix), sidecar_path(self.prefix)):
            Path(stale).unlink(missing_ok=True)
        publish(bin_path(self.prefix))
        write_atomically(index_path(self.prefix), write)
        partial_path(self._lengths_path).unlink()

"""safetensors files written one tensor at a time, with their checksum.

The format is a length, a JSON header with names, dtypes, shapes and offsets, and the bytes one after the other
(https://huggingface.co/docs/safetensors). The library writes from tensors that are all in memory, copies each of them,
and keeps other threads waiting meanwhile. As the header needs only shapes, a file can as well be written from tensors
that are read when their turn comes; and since writes and checksums here give other threads their turn, training goes on
beside them.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from gptoughts.checkpoint.layout import FileRecord

DTYPES = {
    "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""safetensors' name of each dtype that is written."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class TensorHeader:
    """What a file says of a tensor before it is read."""

    name: str
    dtype: str
    """safetensors' name."""
    shape: tuple[int, ...]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> TensorHeader:
        """The header of a tensor."""
        return cls(name, NAMES[tensor.dtype], tuple(tensor.shape))

    @property
    def num_bytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def write_file(
    path: Path,
    headers: Sequence[TensorHeader],
    read: Callable[[str], Iterable[Tensor]],
    *,
    metadata: Mapping[str, str],
    written: Callable[[int], None] = lambda num_bytes: None,
) -> FileRecord:
    """Write one file and flush it to the disk.

    Args:
        path: File to write.
        headers: Its tensors, in order; the widest dtypes first keep all values aligned.
        read: Gives a tensor's values, on the CPU, when its turn comes, in pieces along its first dim.
        metadata: Texts for the header.
        written: Told the bytes of each piece.

    Returns:
        Size and checksum of the file.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    digest = xxhash.xxh3_128()
    num_bytes = 0
    with path.open("wb", buffering=0) as file:

        def put(content: memoryview) -> None:
            nonlocal num_bytes
            for start in range(0, len(content), _CHUNK_BYTES):
                chunk = content[start : start + _CHUNK_BYTES]
                digest.update(chunk)
                num_bytes += len(chunk)
                while chunk:
                    chunk = chunk[file.write(chunk) :]

        put(memoryview(_encoded_header(headers, metadata)))
        for header in headers:
            before = num_bytes
            for tensor in read(header.name):
                assert tensor.dtype is DTYPES[header.dtype], header
                put(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
                written(tensor.nbytes)
            assert num_bytes - before == header.num_bytes, (header, num_bytes - before)
        os.fsync(file.fileno())
    return FileRecord(num_bytes, digest.hexdigest())


def _encoded_header(headers: Sequence[TensorHeader], metadata: Mapping[str, str]) -> bytes:
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for header in headers:
        end = offset + header.num_bytes
        table[header.name] = {"dtype": header.dtype, "shape": list(header.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # values are aligned to 8 bytes
    return struct.pack("<Q", len(text)) + text

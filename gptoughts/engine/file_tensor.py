"""Tensors whose elements lie in a file: read and written like others, and kept in memory only as the kernel likes."""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor


class MappedFile:
    """A file's first elements as a tensor: what is written to one is read from the other.

    Args:
        path: An existing file, at least as long as its elements.
        numel: Elements.
        dtype: Their type.
    """

    def __init__(self, path: Path, numel: int, dtype: torch.dtype = torch.float32) -> None:
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), numel * dtype.itemsize)
        self.tensor = torch.frombuffer(self._map, dtype=dtype)
        """1-D; the mapping lives as long as it."""

    def flush(self) -> None:
        """Have what was written in the file itself, for readers that go past the kernel's cache (``O_DIRECT``)."""
        self._map.flush()


def nameless_tensor(folder: Path, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An uninitialised 1-D tensor on the disk of ``folder``, whose space is free again when nobody holds it.

    Raises:
        OSError: the disk has not enough space; it is taken here, since a write to a mapping cannot report it.
    """
    if numel == 0:
        return torch.empty(0, dtype=dtype)
    num_bytes = numel * dtype.itemsize
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, num_bytes)
        return torch.frombuffer(mmap.mmap(file.fileno(), num_bytes), dtype=dtype)

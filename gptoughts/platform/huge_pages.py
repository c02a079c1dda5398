"""Memory of large pages for tensors on a CPU that are read over and over, such as weights while decoding.

A product of few rows reads a matrix once, and with pages of 4 KiB every kilobyte or so of it needs a look into the
page table, which virtual machines make twice as deep: of one product of a row some 8%. Linux gives pages of 2 MiB to
memory that asks for them (madvise(2)); where it does not, memory is what it was.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

_PAGE_BYTES = 1 << 21
_MADV_HUGEPAGE = 14


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialized contiguous CPU tensor, in large pages if it fills one and the system has them."""
    size = torch.empty(0, dtype=dtype).element_size()
    count = 1
    for length in shape:
        count *= length
    if count * size < _PAGE_BYTES or not sys.platform.startswith("linux"):
        return torch.empty(*shape, dtype=dtype)
    padded_bytes = -(-count * size // _PAGE_BYTES) * _PAGE_BYTES
    memory = torch.empty((padded_bytes + _PAGE_BYTES) // size, dtype=dtype)
    start = -memory.data_ptr() % _PAGE_BYTES
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is not None:
        madvise(ctypes.c_void_p(memory.data_ptr() + start), ctypes.c_size_t(padded_bytes), _MADV_HUGEPAGE)
    return memory[start // size :][:count].view(*shape)


def moved(tensor: Tensor) -> Tensor:
    """A contiguous CPU tensor, in large pages; itself where there are none, where it fills none, or if it is there."""
    is_small = tensor.numel() * tensor.element_size() < _PAGE_BYTES
    if is_small or not sys.platform.startswith("linux") or tensor.data_ptr() % _PAGE_BYTES == 0:
        return tensor
    with torch.inference_mode(False):  # so that a parameter can still be trained
        return empty(tensor.shape, tensor.dtype).copy_(tensor)

"""fp32 matrix products on a CPU, by the library that uses the processor's widest registers.

torch hands them to MKL, which on processors that are not Intel's stays with AVX2. oneDNN, which torch also carries and
uses for bf16, goes by what the processor says of itself: where that is AVX-512 it computes the same sums in about half
the time. torch's only door to its fp32 product of dense tensors is the operator that torch.compile's generated code
calls (aten/src/ATen/native/mkldnn/Linear.cpp, mkldnn_linear_pointwise, torch 2.13.0); where it is missing, and on all
other devices and dtypes, these functions are torch's own products.

Legend: n rows, i inputs, o outputs.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

_SMALL = 1 << 21
"""Multiply-adds below which MKL is faster: oneDNN's operator costs about 15 microseconds more to call."""
_ROWS_MULTIPLE = 32
_FEW_ROWS = range(8, 49)
"""Rows that MKL multiplies faster with the sides exchanged. One thread, 768 to 4096 inputs: mostly 1.3 to 1.6 times
at 8, 16 and 32, 1.05 at 64; of 4 rows the other way is faster."""
_LEAST_TURNED_INPUTS = 512
"""At 256 inputs the result has to be turned back for too little."""


def linear(rows: Tensor, weight: Tensor) -> Tensor:
    """rows weight^T, of [..., i] and [o, i]; returns [..., o], contiguous."""
    if _is_faster(rows, weight, weight.size(0)):
        return _onednn(rows, weight)
    if _is_turned_faster(rows, weight):
        flat = rows.reshape(-1, rows.size(-1))
        return weight.matmul(flat.t()).t().contiguous().view(*rows.shape[:-1], weight.size(0))
    return rows.matmul(weight.t())


def matmul(rows: Tensor, weight: Tensor) -> Tensor:
    """rows weight, of [..., o] and [o, i]; returns [..., i], contiguous."""
    if _is_faster(rows, weight, weight.size(1)):
        return _onednn(rows, weight.t())
    return rows.matmul(weight)


def weight_gradient(grad: Tensor, rows: Tensor) -> Tensor:
    """grad^T rows, of [n, o] and [n, i]; returns [o, i], contiguous."""
    if not _is_faster(grad, rows, grad.size(1) * rows.size(1) // max(grad.size(-1), 1)):
        return grad.t().matmul(rows)
    # One operand has to be turned for oneDNN: the narrower one.
    if grad.size(1) <= rows.size(1):
        return _onednn(grad.t(), rows.t())
    return _onednn(rows.t(), grad.t()).t().contiguous()


def padded_rows(rows: Tensor) -> Tensor:
    """[n, i] with rows of zeros below, up to a multiple of 32, where the number of rows is another one each time.

    oneDNN compiles a kernel for every new shape: 25 ms with AMX, a hundred times what the product of some hundred rows
    takes. Padded, the shapes are few and soon all known.
    """
    missing = -rows.size(0) % _ROWS_MULTIPLE
    return pad(rows, (0, 0, 0, missing)) if missing and _goes_to_onednn(rows) else rows


def _goes_to_onednn(rows: Tensor) -> bool:
    if rows.device.type != "cpu":
        return False
    return is_onednn_wider() if rows.dtype == torch.float32 else rows.dtype == torch.bfloat16


def _is_faster(rows: Tensor, other: Tensor, outputs: int) -> bool:
    is_fp32 = rows.dtype == other.dtype == torch.float32 and rows.device.type == "cpu"
    return is_fp32 and rows.numel() * outputs >= _SMALL and is_onednn_wider()


def _is_turned_faster(rows: Tensor, weight: Tensor) -> bool:
    is_fp32 = rows.dtype == weight.dtype == torch.float32 and rows.device.type == "cpu"
    if not is_fp32 or weight.size(1) < _LEAST_TURNED_INPUTS:
        return False
    return rows.numel() // weight.size(1) in _FEW_ROWS and _is_mkl_wide()


def _onednn(rows: Tensor, weight: Tensor) -> Tensor:
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()  # with gaps between its rows oneDNN has a reference loop only, 100 times slower
    return torch.ops.mkldnn._linear_pointwise(rows.contiguous(), weight, None, "none", [], "")


@cache
def _is_mkl_wide() -> bool:
    """Whether fp32 products go to MKL with AVX-512, where this was measured."""
    return torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512" and _is_intel()


@cache
def is_onednn_wider() -> bool:
    """Whether oneDNN computes fp32 with wider registers than MKL on this processor."""
    return (
        hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and not _is_intel()
    )


def _is_intel() -> bool:
    """Whether the processor is Intel's; True where nothing says so, which keeps torch's choice."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return True
    return "vendor_id" not in text or "GenuineIntel" in text

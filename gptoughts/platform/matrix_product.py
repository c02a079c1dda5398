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

_SMALL = 1 << 21
"""Multiply-adds below which MKL is faster: oneDNN's operator costs about 15 microseconds more to call."""


def linear(rows: Tensor, weight: Tensor) -> Tensor:
    """rows weight^T, of [..., i] and [o, i]; returns [..., o], contiguous."""
    if _is_faster(rows, weight, weight.size(0)):
        return _onednn(rows, weight)
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


def _is_faster(rows: Tensor, other: Tensor, outputs: int) -> bool:
    is_fp32 = rows.dtype == other.dtype == torch.float32 and rows.device.type == "cpu"
    return is_fp32 and rows.numel() * outputs >= _SMALL and is_onednn_wider()


def _onednn(rows: Tensor, weight: Tensor) -> Tensor:
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()  # with gaps between its rows oneDNN has a reference loop only, 100 times slower
    return torch.ops.mkldnn._linear_pointwise(rows.contiguous(), weight, None, "none", [], "")


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

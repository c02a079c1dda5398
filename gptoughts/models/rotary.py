"""Rotary position embedding (Su et al., arXiv:2104.09864), half-split pairs, in one autograd step.

Pair i of a head at position p is turned by the angle p * base^(-2i/d). With the pairs split in halves, x = [x1 | x2]:

    y1 = x1 cos - x2 sin,    y2 = x2 cos + x1 sin.

The gradient is the turn by the negative angle, so nothing but cos and sin has to be kept.
Tables are made on first use, not by a constructor: inside ``deepspeed.zero.Init`` a module's fp32 buffer is rounded to
the parameters' dtype, and with it every angle.

Legend: s sequence, b microbatch, np heads on this rank, d rotary size.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptoughts.models.rotary_scaling import plain_frequencies
from gptoughts.platform import device as platform_device


@lru_cache(maxsize=32)
def _table(
    length: int, frequencies: tuple[float, ...], amplitude: float, device: torch.device, dtype: torch.dtype
) -> Tensor:
    with torch.inference_mode(False):
        # fp64 angles: fp32 loses a turn's low digits at long positions.
        angles = torch.outer(torch.arange(length, dtype=torch.float64), torch.tensor(frequencies, dtype=torch.float64))
        return (amplitude * torch.stack((angles.cos(), angles.sin()))).to(device, dtype)


def rotary_table(
    length: int,
    dim: int,
    base: float,
    dtype: torch.dtype,
    positions: Tensor | None = None,
    *,
    frequencies: tuple[float, ...] | None = None,
    amplitude: float = 1.0,
) -> Tensor:
    """cos and sin of every angle, on this process's device.

    Args:
        length: Positions that the table covers, from 0.
        dim: Rotary size of a head.
        base: Base of the wavelengths.
        dtype: Dtype of the heads that will be turned.
        positions: int64 [b, s], each below ``length``; unset: 0 ... length-1 for every sequence.
        frequencies: Radians per position of the d/2 pairs (``rotary_scaling``); unset: the plain ones.
        amplitude: What cos and sin are multiplied by (``yarn``).

    Returns:
        [2, s, b, 1, d/2] for given positions, else [2, length, 1, 1, d/2]; index 0 is cos, 1 is sin.
    """
    frequencies = plain_frequencies(dim, base) if frequencies is None else frequencies
    table = _table(length, frequencies, amplitude, platform_device.current_device(), dtype)
    if positions is None:
        return table[:, :, None, None, :]
    return table[:, positions.t()].unsqueeze(3)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(table)
        return _turn(x, table, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (table,) = ctx.saved_tensors
        return _turn(grad, table, -1.0), None


def _turn(x: Tensor, table: Tensor, direction: float) -> Tensor:
    cos, sin = table.unbind(0)
    first, second = x.chunk(2, dim=-1)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin, value=direction)
    return out


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn every head of ``x`` [s, b, np, d] by ``table`` (:func:`rotary_table`, x's dtype); same shape and dtype."""
    return _Rotate.apply(x, table)

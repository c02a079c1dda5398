"""Casts to FP8 and products of what was cast, on any device, to the bit as FP8 hardware makes the casts.

A cast tensor is kept as q = RNE(sat(x * scale)) in the dtype of x: bf16, fp16 and fp32 hold every E4M3 and E5M2 number
exactly. A product of two of them is

    (q_a q_b^T) / (scale_a scale_b),

summed in fp32 and divided before the result is rounded to its dtype, once, as a tensor core's epilogue does. What
differs from the hardware is the order of the sum, and its width: Hopper adds forward products in fewer than fp32's bits
(``_2X_ACC_FPROP`` in transformer_engine/pytorch/module/base.py).

On a CPU torch's conversions to and from 8 bits take longer than the products. There a number is rounded by adding and
taking away 1.5 * 2^(e + 23 - m), e its exponent (or the smallest normal one) and m the format's mantissa bits: fp32's
own addition rounds to the nearest multiple of 2^(e - m), ties to even.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gptoughts.platform import matrix_product
from gptoughts.precision.fp8_recipe import Fp8Format

TILE = 1 << 17
"""Elements that pass all steps of a cast together: in bf16, fp32 and int32 they fit a core's second-level cache."""
_EXPONENT = 0x7F800000


def largest_magnitude(x: Tensor) -> Tensor:
    """max|x| as fp32 of shape [], 0 of nothing. Passes over NaN, as Transformer Engine's kernels do (fmaxf)."""
    if x.numel() == 0:
        return torch.zeros((), dtype=torch.float32, device=x.device)
    low, high = torch.aminmax(x.detach())
    amax = torch.maximum(-low, high).float()
    if amax.device.type == "cpu" and not math.isnan(amax.item()):
        return amax
    if amax.device.type == "cpu":
        return x.detach().float().nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf).abs().amax()
    return torch.where(amax.isnan(), x.detach().abs().nan_to_num(nan=0.0, posinf=math.inf).amax().float(), amax)


def cast(x: Tensor, scale: float, fp8: Fp8Format, amax: float = math.inf) -> Tensor:
    """sat(x * scale) rounded to ``fp8``'s numbers, in the dtype and shape of x; NaN stays NaN.

    Args:
        x: Any shape.
        scale: An fp32 number.
        fp8: The format.
        amax: ``largest_magnitude(x)`` where it is known: what is below FP8's largest number needs no saturation.
    """
    x = x.detach()
    if x.device.type != "cpu":
        scaled = (x.float() * scale).clamp_(-fp8.max_value, fp8.max_value)
        return scaled.to(fp8.dtype).to(x.dtype)
    x = x.contiguous()
    out = torch.empty_like(x)
    flat, result = x.view(-1), out.view(-1)
    size = min(TILE, flat.numel())
    scaled = torch.empty(size, dtype=torch.float32)
    exponents = torch.empty(size, dtype=torch.int32)
    is_saturated = not amax * scale <= fp8.max_value
    for start in range(0, flat.numel(), TILE):
        part = flat[start : start + TILE]
        y = scaled[: part.numel()].copy_(part).mul_(scale)
        if is_saturated:
            y.clamp_(-fp8.max_value, fp8.max_value)
        target = result[start : start + TILE].copy_(_rounded(y, exponents[: part.numel()], fp8))
        target.copysign_(part)  # below half of the smallest number: -0
    return out


def _rounded(y: Tensor, scratch: Tensor, fp8: Fp8Format) -> Tensor:
    """fp32 y, at most FP8's largest number, to the numbers of ``fp8``, in place; ``scratch`` is int32 of its shape."""
    least = (127 + fp8.min_exponent) << 23
    power = torch.bitwise_and(y.view(torch.int32), _EXPONENT, out=scratch).clamp_(min=least).view(torch.float32)
    factor = 1.5 * 2.0 ** (23 - fp8.mantissa_bits)
    return y.add_(power, alpha=factor).sub_(power, alpha=factor)


def linear(rows: Tensor, weight: Tensor, inverse: float) -> Tensor:
    """rows weight^T * inverse, of cast [n, i] and [o, i]; [n, o] in their dtype."""
    if rows.dtype is torch.bfloat16:
        return _scaled_product(rows, weight.t(), inverse)
    return _wide(matrix_product.linear, rows, weight, inverse)


def matmul(rows: Tensor, weight: Tensor, inverse: float) -> Tensor:
    """rows weight * inverse, of cast [n, o] and [o, i]; [n, i] in their dtype."""
    if rows.dtype is torch.bfloat16:
        return _scaled_product(rows, weight, inverse)
    return _wide(matrix_product.matmul, rows, weight, inverse)


def weight_gradient(grad: Tensor, rows: Tensor, inverse: float) -> Tensor:
    """grad^T rows * inverse, of cast [n, o] and [n, i]; [o, i] in their dtype."""
    if rows.dtype is torch.bfloat16:
        return _scaled_product(grad.t(), rows, inverse)
    return _wide(matrix_product.weight_gradient, grad, rows, inverse)


def _scaled_product(a: Tensor, b: Tensor, inverse: float) -> Tensor:
    """a b * inverse, rounded to bf16 once: torch's bf16 product applies alpha to its fp32 sums."""
    out = a.new_empty(a.size(0), b.size(1))
    return torch.addmm(out, a, b, beta=0, alpha=inverse, out=out)


def _wide(product: object, a: Tensor, b: Tensor, inverse: float) -> Tensor:
    """In fp32: sums of cast numbers leave fp16's range before they are divided."""
    assert callable(product)
    return product(a.float(), b.float()).mul_(inverse).to(a.dtype)

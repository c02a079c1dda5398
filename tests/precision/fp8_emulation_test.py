"""Casts agree with torch's float8 dtypes to the bit; products round once."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gptoughts.precision import fp8_emulation
from gptoughts.precision.fp8_emulation import cast, largest_magnitude, linear, matmul, weight_gradient
from gptoughts.precision.fp8_recipe import E4M3, E5M2, Fp8Format

FORMATS = pytest.mark.parametrize("fp8", [E4M3, E5M2], ids=lambda fp8: fp8.name)


def torch_cast(x: Tensor, scale: float, fp8: Fp8Format) -> Tensor:
    """Saturated, rounded and widened by torch's own conversions."""
    return (x.float() * scale).clamp(-fp8.max_value, fp8.max_value).to(fp8.dtype)


def same_bits(q: Tensor, expected: Tensor) -> bool:
    wide = expected.to(q.dtype)
    bits = torch.int16 if q.element_size() == 2 else torch.int32
    equal = q.view(bits) == wide.view(bits)
    return bool((equal | (q.isnan() & wide.isnan())).all())


@FORMATS
@pytest.mark.parametrize("scale", [1.0, 0.37, 3e5, 2.0**-100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number(fp8: Fp8Format, scale: float, dtype: torch.dtype) -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    scale = torch.tensor(scale).item()
    assert same_bits(cast(x, scale, fp8), torch_cast(x, scale, fp8))


@FORMATS
@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_fp32_numbers_of_every_exponent(fp8: Fp8Format, scale: float) -> None:
    x = torch.arange(-(2**31), 2**31, 8191, dtype=torch.int64).to(torch.int32).view(torch.float32)
    scale = torch.tensor(scale).item()
    assert same_bits(cast(x, scale, fp8), torch_cast(x, scale, fp8))


@FORMATS
def test_ties_subnormal_numbers_and_the_largest(fp8: Fp8Format) -> None:
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(fp8.dtype).float()
    every = every[every.isfinite()].sort().values.unique()
    middles = (every[1:] + every[:-1]) / 2
    beyond = torch.tensor([1.0001, 1.03, 1.1, 2.0, math.inf]) * fp8.max_value
    x = torch.cat([every, middles, torch.nextafter(middles, every[1:]), torch.nextafter(middles, every[:-1]), beyond])
    assert same_bits(cast(x, 1.0, fp8), torch_cast(x, 1.0, fp8))
    assert cast(beyond, 1.0, fp8).tolist() == [fp8.max_value] * 5
    assert cast(-beyond, 1.0, fp8).tolist() == [-fp8.max_value] * 5
    assert every[every > 0].min().item() == fp8.smallest


@FORMATS
def test_what_is_known_of_the_magnitude_changes_nothing(fp8: Fp8Format) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    amax = float(largest_magnitude(x))
    for scale in (fp8.max_value / amax, 10 * fp8.max_value / amax):
        assert torch.equal(cast(x, scale, fp8, amax), cast(x, scale, fp8))


def test_large_and_strided_tensors_are_cast_whole() -> None:
    x = torch.randn(700, 600, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert x.numel() > 3 * fp8_emulation.TILE
    assert same_bits(cast(x.t(), 3.0, E4M3), torch_cast(x.t(), 3.0, E4M3).contiguous())
    assert cast(x[:0], 3.0, E4M3).shape == (0, 600)


def test_largest_magnitude_passes_over_nan_and_sees_infinity() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        assert largest_magnitude(torch.tensor([1.0, math.nan, -3.0], dtype=dtype)).item() == 3.0
        assert largest_magnitude(torch.tensor([1.0, math.nan, -math.inf], dtype=dtype)).item() == math.inf
        assert largest_magnitude(torch.tensor([math.nan], dtype=dtype)).item() == 0.0
        assert largest_magnitude(torch.tensor([-5.0, 1.0], dtype=dtype)).dtype is torch.float32
    assert largest_magnitude(torch.empty(0, 4)).item() == 0.0


def test_nan_stays_nan() -> None:
    q = cast(torch.tensor([1.0, math.nan]), 2.0, E4M3)
    assert q[0].item() == 2.0
    assert q[1].isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_are_the_sums_divided_and_rounded_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    rows, weight, grad = (torch.randn(*shape, generator=generator) for shape in ((64, 96), (48, 96), (64, 48)))
    rows, weight, grad = (cast(x, 40.0, E4M3).to(dtype) for x in (rows, weight, grad))
    inverse = 1 / 1600.0
    for found, exact in (
        (linear(rows, weight, inverse), rows.double() @ weight.double().t()),
        (matmul(grad, weight, inverse), grad.double() @ weight.double()),
        (weight_gradient(grad, rows, inverse), grad.double().t() @ rows.double()),
    ):
        assert found.dtype is dtype
        expected = (exact * inverse).float()
        # Half a unit of the last place, and what fp32 sums differ by.
        unit = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}[dtype]
        allowed = 1.001 * unit * expected.abs() + 1e-6 * exact.abs().max().float() * inverse
        assert ((found.float() - expected).abs() <= allowed).all()

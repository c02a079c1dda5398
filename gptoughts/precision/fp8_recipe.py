"""FP8 with delayed scaling: the recipe, and the update of histories and scales that Transformer Engine's kernel does.

A tensor x is cast as sat(x * scale) with the scale of earlier updates. For each tensor that is cast, H[0 .. L-1]
remembers largest magnitudes (amax): casts write max(H[0], max|x|) to H[0]. An update (``kernel_bulk`` in
transformer_engine/common/recipe/delayed_scaling.cu, Transformer Engine 2.x), for the H[0] that is the maximum over the
ranks of the amax group:

    H[0] = 0:    nothing changes (the tensor was not cast)
    else         amax = max(H[1], ..., H[L-1], H[0])  ("max"), or H[0]  ("most_recent")
                 H    = [0, H[2], ..., H[L-1], H[0]]
                 scale = (FP8_MAX / 2^margin) / amax, where amax is finite and > 0; the largest fp32 number where that
                 is infinite; else the scale stays as it is.

Maxima are C's fmaxf, which passes over NaN. So one inf in H freezes a "max" scale until it has moved out of the window,
L updates later.

Legend: L length of the history, n tensors that are cast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptoughts.config.experiment import Fp8Config

LARGEST_SCALE = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Fp8Format:
    """One of the two 8-bit floating-point formats (Micikevicius et al., arXiv:2209.05433, table 1)."""

    name: str
    mantissa_bits: int
    min_exponent: int
    """Of normal numbers; below, subnormal ones are evenly spaced."""
    max_value: float
    dtype: torch.dtype

    @property
    def smallest(self) -> float:
        """The smallest number above zero, a subnormal one."""
        return 2.0 ** (self.min_exponent - self.mantissa_bits)


E4M3 = Fp8Format("e4m3", 3, -6, 448.0, torch.float8_e4m3fn)
E5M2 = Fp8Format("e5m2", 2, -14, 57344.0, torch.float8_e5m2)


@dataclass(frozen=True)
class DelayedScaling:
    """Field for field ``transformer_engine.common.recipe.DelayedScaling``, with our configuration's names and words."""

    format: str = "hybrid"
    margin: int = 0
    amax_history_len: int = 1024
    amax_compute_algo: str = "max"

    @classmethod
    def of(cls, section: Fp8Config) -> DelayedScaling:
        """The recipe of a resolved run with FP8 on."""
        assert section.format is not None
        assert section.margin is not None
        assert section.amax_history_len is not None
        assert section.amax_compute_algo is not None
        return cls(section.format, section.margin, section.amax_history_len, section.amax_compute_algo)

    @property
    def forward_format(self) -> Fp8Format:
        """Of inputs and weights."""
        return E4M3

    @property
    def backward_format(self) -> Fp8Format:
        """Of the outputs' gradients."""
        return E5M2 if self.format == "hybrid" else E4M3


def update(
    histories: Sequence[Tensor], scales: Sequence[Tensor], latest: Tensor, fp8: Fp8Format, recipe: DelayedScaling
) -> None:
    """Move histories and scales on, in place, all of them in one pass.

    Args:
        histories: fp32 [L, n_i] each.
        scales: fp32 [n_i] each.
        latest: fp32 [sum n_i], every H[0] after the reduction; where it reads 0 a history's own H[0] counts.
        fp8: Of the tensors that are cast.
        recipe: Margin and algorithm.
    """
    sizes = [scale.numel() for scale in scales]
    history, scale = torch.cat(list(histories), dim=1), torch.cat(list(scales))
    new_history, new_scale = updated(history, scale, latest, fp8, recipe)
    for target, part in zip(histories, new_history.split(sizes, dim=1), strict=True):
        target.copy_(part)
    for target, part in zip(scales, new_scale.split(sizes), strict=True):
        target.copy_(part)


def updated(
    history: Tensor, scale: Tensor, latest: Tensor, fp8: Fp8Format, recipe: DelayedScaling
) -> tuple[Tensor, Tensor]:
    """The history [L, n] and scale [n] after an update, see this module's head."""
    latest = torch.where(latest != 0, latest, history[0])
    was_cast = latest != 0  # True for NaN
    seen = torch.cat([history[1:], latest[None]])
    if recipe.amax_compute_algo == "max":
        amax = torch.where(was_cast, seen.nan_to_num(nan=0.0, posinf=float("inf")).amax(0).clamp(min=0.0), 0.0)
    else:
        amax = latest
    rolled = torch.cat([torch.zeros_like(seen[:1]), seen[1:]])
    # Of two tensors: torch divides a number by a tensor in two roundings, reciprocal and product.
    wanted = torch.full_like(amax, fp8.max_value * 2.0**-recipe.margin) / amax
    is_usable = torch.isfinite(amax) & (amax > 0)
    new_scale = torch.where(is_usable, wanted, scale).clamp(max=LARGEST_SCALE)
    return torch.where(was_cast, rolled, history), new_scale


def initial_history(recipe: DelayedScaling, count: int, device: torch.device) -> Tensor:
    """fp32 [L, count] of zeros."""
    return torch.zeros(recipe.amax_history_len, count, dtype=torch.float32, device=device)


def initial_scale(count: int, device: torch.device) -> Tensor:
    """fp32 [count] of ones."""
    return torch.ones(count, dtype=torch.float32, device=device)

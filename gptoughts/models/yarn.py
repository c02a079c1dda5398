"""YaRN: rotary embeddings for sequences longer than the trained ones (Peng et al., arXiv:2309.00071, section 3.2).

A pair that turns r times over the L original positions keeps its frequency where r > beta_fast, has it divided by the
factor s where r < beta_slow, and lies on a ramp between. The pair with r turns is

    d ln(L / 2 pi r) / (2 ln base),    rounded outwards at both ends of the ramp.

As DeepSeek publishes it, cos and sin are multiplied by m(mscale) / m(mscale_all_dim) and the scores by
m(mscale_all_dim)^2, with m(x) = 0.1 x ln s + 1 (github.com/deepseek-ai/DeepSeek-V2, modeling_deepseek.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gptoughts.config.model import ModelConfig
from gptoughts.models.rotary_scaling import plain_frequencies


@dataclass(frozen=True)
class YarnScaling:
    """YaRN's settings."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float

    @property
    def amplitude(self) -> float:
        """What cos and sin are multiplied by."""
        return self._magnitude(self.mscale) / self._magnitude(self.mscale_all_dim)

    def frequencies(self, dim: int, base: float) -> tuple[float, ...]:
        """Radians per position of each of the ``dim / 2`` pairs."""
        low = max(math.floor(self._pair_turning(self.beta_fast, dim, base)), 0)
        high = min(math.ceil(self._pair_turning(self.beta_slow, dim, base)), dim - 1)
        span = float(high - low) if high != low else 0.001  # a ramp of no width is a step
        stretched = [min(1.0, max(0.0, (pair - low) / span)) for pair in range(dim // 2)]
        plain = plain_frequencies(dim, base)
        return tuple(f * (1.0 - part) + f / self.factor * part for f, part in zip(plain, stretched, strict=True))

    def _pair_turning(self, turns: float, dim: int, base: float) -> float:
        return dim * math.log(self.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(base))

    def _magnitude(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0


@dataclass(frozen=True)
class YarnFields(ModelConfig):
    """Fields of every family whose rotary embedding YaRN may stretch; to be joined with one that has attention."""

    rotary_scaling_factor: float = 1.0
    """YaRN: how many times longer than ``original_max_position_embeddings`` sequences may be; 1: plain rotary."""
    original_max_position_embeddings: int = 4096
    """YaRN: positions that the model was first trained with."""
    beta_fast: float = 32.0
    """YaRN: wavelengths that turn more often than this over the original positions are left alone."""
    beta_slow: float = 1.0
    """YaRN: wavelengths that turn less often than this are stretched by the whole factor."""
    mscale: float = 1.0
    """YaRN: cos and sin are multiplied by m(mscale) / m(mscale_all_dim), m(x) = 0.1 x ln(factor) + 1."""
    mscale_all_dim: float = 0.0
    """YaRN: attention scores are multiplied by m(mscale_all_dim) squared."""

    def problems(self) -> list[str]:
        """Everything about this shape that cannot be built, one line each."""
        found = super().problems()
        for name in ("original_max_position_embeddings", "beta_fast", "beta_slow"):
            value = getattr(self, name)
            if not value > 0:
                found.append(f"{name}={value}: must be greater than 0")
        for name in ("mscale", "mscale_all_dim"):
            value = getattr(self, name)
            if not value >= 0:
                found.append(f"{name}={value}: must be 0 or greater")
        if not self.rotary_scaling_factor >= 1:
            found.append(f"rotary_scaling_factor={self.rotary_scaling_factor}: must be 1 (no scaling) or greater")
        if not self.beta_slow < self.beta_fast:
            found.append(f"beta_slow={self.beta_slow}: must be less than beta_fast={self.beta_fast}")
        return found

    def rotary_frequencies(self) -> tuple[float, ...] | None:
        """Radians per position of each rotary pair; None where the base alone says them."""
        scaling = self._yarn()
        return None if scaling is None else scaling.frequencies(self.rotary_dim(), self.rotary_base)

    def rotary_amplitude(self) -> float:
        """What cos and sin of the rotary embedding are multiplied by."""
        scaling = self._yarn()
        return 1.0 if scaling is None else scaling.amplitude

    def _yarn(self) -> YarnScaling | None:
        if self.rotary_scaling_factor == 1:
            return None
        return YarnScaling(
            factor=self.rotary_scaling_factor,
            original_max_position_embeddings=self.original_max_position_embeddings,
            beta_fast=self.beta_fast,
            beta_slow=self.beta_slow,
            mscale=self.mscale,
            mscale_all_dim=self.mscale_all_dim,
        )

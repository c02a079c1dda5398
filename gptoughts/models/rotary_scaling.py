"""Inverse wavelengths of the rotary embedding, plain and stretched for sequences longer than the first training's.

Plain: f_i = base^(-2i/d). Linear (position interpolation, arXiv:2306.15595): f_i / factor. Llama 3 (its models.py,
``apply_scaling``; The Llama 3 Herd of Models, arXiv:2407.21783): waves longer than L / low are divided by the factor,
those shorter than L / high stay, and between them the two are mixed linearly in L / wavelength.
"""

from __future__ import annotations

import math


def plain_frequencies(dim: int, base: float) -> tuple[float, ...]:
    """Radians per position of each of the ``dim / 2`` pairs."""
    return tuple(base ** (-2 * i / dim) for i in range(dim // 2))


def linear_frequencies(dim: int, base: float, *, factor: float) -> tuple[float, ...]:
    """All turns slowed down by ``factor``."""
    return tuple(f / factor for f in plain_frequencies(dim, base))


def llama3_frequencies(
    dim: int, base: float, *, factor: float, low_freq_factor: float, high_freq_factor: float, original_length: int
) -> tuple[float, ...]:
    """Llama 3's rule; ``original_length`` (L) is in tokens."""

    def scaled(frequency: float) -> float:
        turns = original_length * frequency / (2 * math.pi)  # of this pair over the original length
        kept = min(1.0, max(0.0, (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)))
        return (1 - kept) * frequency / factor + kept * frequency

    return tuple(scaled(f) for f in plain_frequencies(dim, base))

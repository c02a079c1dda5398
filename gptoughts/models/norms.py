"""Norms that a layer spec names: torch's own, with the mark that sequence parallelism needs on their parameters.

RMSNorm: y = w * x / sqrt(mean(x^2) + eps) (Zhang & Sennrich, arXiv:1910.07467). megatron-core's wrapper refuses
sequence parallelism (transformer/torch_norm.py:30, 0.16.1), where each rank sees part of the sequence and gradients of
the weights have to be summed over the tensor-parallel group: those of parameters with ``sequence_parallel=True``.
"""

from __future__ import annotations

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from gptoughts.platform import device


class RMSNorm(nn.RMSNorm):
    """RMSNorm over the last dimension; any leading shape; statistics in fp32."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, device=device.current_device(), dtype=config.params_dtype)
        if config.sequence_parallel:
            mark_partial_gradients(self)


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last dimension; any leading shape; statistics in fp32."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, device=device.current_device(), dtype=config.params_dtype)
        if config.sequence_parallel:
            mark_partial_gradients(self)


def mark_partial_gradients(module: nn.Module) -> None:
    """Say that gradients of the module's parameters are partial sums, to be added up over the tensor-parallel group.

    ``sequence_parallel`` is megatron-core's name for the mark, whatever makes them partial.
    """
    for parameter in module.parameters(recurse=False):
        parameter.sequence_parallel = True  # type: ignore[attr-defined]


def norm_class(normalization: str) -> type[nn.Module]:
    """The class for ``TransformerConfig.normalization``."""
    return {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}[normalization]


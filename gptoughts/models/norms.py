"""Norms that a layer spec names: torch's own, with the mark that sequence parallelism needs on their parameters.

RMSNorm: y = w * x / sqrt(mean(x^2) + eps) (Zhang & Sennrich, arXiv:1910.07467). megatron-core's wrapper refuses
sequence parallelism (transformer/torch_norm.py:30, 0.16.1), where each rank sees part of the sequence and gradients of
the weights have to be summed over the tensor-parallel group: those of parameters with ``sequence_parallel=True``.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gptoughts.platform import device


class RMSNorm(nn.RMSNorm):
    """RMSNorm over the last dimension; any leading shape; statistics in fp32."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, device=device.current_device(), dtype=config.params_dtype)
        if config.sequence_parallel:
            mark_partial_gradients(self)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] to the same shape and dtype."""
        if x.device.type != "cpu":
            return super().forward(x)
        return _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    """torch has a fused kernel on CUDA only; on a CPU its formula runs as a dozen passes, of which these are a few.

    With r = 1 / rms and u = dy * w:  dx = r (u - x r^2 mean(u x)),  dw = sum dy x r.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        inverse = norm.square_().div_(x.size(-1)).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        normed = x * inverse  # fp32 or wider, as inverse is
        scaled = grad * normed
        grad_weight = scaled.flatten(0, -2).sum(0).to(weight.dtype)
        mean = torch.mv(scaled.flatten(0, -2), weight.to(scaled.dtype)).div_(x.size(-1)).view(inverse.shape)
        grad_x = torch.mul(grad, weight).to(normed.dtype).sub_(normed.mul_(mean)).mul_(inverse)
        return grad_x.to(x.dtype), grad_weight, None


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

"""The product inside megatron-core's parallel linear layers, on a CPU by :mod:`gptoughts.platform.matrix_product`.

y = x W^T + b,   dx = dy W (summed over the tensor-parallel group where its ranks hold parts of W's outputs),
dW = dy^T x.  Under sequence parallelism x is gathered before, and dx scattered with its sum after, each product.

Legend: s sequence, b microbatch, i inputs, o outputs on this rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptoughts.platform import matrix_product


def parallel_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gradient_accumulation_fusion: bool,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    grad_output_buffer: list[Tensor] | None = None,
    tp_group: dist.ProcessGroup | None = None,
    **upstream_options: Any,
) -> Tensor:
    """Stands for megatron-core's two functions of a layer with and without a gradient of its weight.

    Args:
        input: [s, b, i]; under sequence parallelism s is this rank's part.
        weight: [o, i].
        bias: [o].
        gradient_accumulation_fusion: A CUDA kernel; must be off.
        allreduce_dgrad: Sum the input's gradient over ``tp_group``.
        sequence_parallel: Gather the input over ``tp_group``.
        grad_output_buffer: Deferred weight gradients; must be unset.
        tp_group: Tensor-parallel group.
        upstream_options: What belongs to deferred weight gradients and newer CUDA features.

    Returns:
        [s, b, o], s whole.

    Collective: ``tp_group``, with either of the two flags.
    """
    assert_plain(gradient_accumulation_fusion, grad_output_buffer, upstream_options)
    return _Linear.apply(input, weight, bias, tp_group, allreduce_dgrad, sequence_parallel)


def assert_plain(
    gradient_accumulation_fusion: bool, grad_output_buffer: list[Tensor] | None, upstream_options: Mapping[str, Any]
) -> None:
    """That a layer asks for nothing that only megatron-core's own product does; our configuration never does."""
    assert not gradient_accumulation_fusion, "a CUDA kernel"
    assert grad_output_buffer is None, "weight gradients are not deferred"
    assert upstream_options.get("gtp_remat_size", 1) == 1, "weights are not divided over their inputs' ranks"


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        group: dist.ProcessGroup | None,
        is_summed: bool,
        is_sequence_divided: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group, ctx.is_summed, ctx.is_sequence_divided = group, is_summed, is_sequence_divided
        out = matrix_product.linear(_gathered(x, group) if is_sequence_divided else x, weight)
        return out if bias is None else out.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_x = grad_weight = None
        if needs_x:
            grad_x = matrix_product.matmul(grad, weight)
            if ctx.is_sequence_divided:
                whole, grad_x = grad_x, torch.empty_like(x)
                dist.reduce_scatter_tensor(grad_x, whole, group=ctx.group)
            elif ctx.is_summed:
                dist.all_reduce(grad_x, group=ctx.group)
        if needs_weight:
            # Gathered once more instead of kept: activations divided over the ranks are why one divides the sequence.
            x = _gathered(x, ctx.group) if ctx.is_sequence_divided else x
            grad_weight = matrix_product.weight_gradient(grad.flatten(0, -2), x.flatten(0, -2))
        grad_bias = grad.flatten(0, -2).sum(0) if needs_bias else None
        return grad_x, grad_weight, grad_bias, None, None, None


def _gathered(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The ranks' parts, one behind the other. Collective: ``group``."""
    whole = x.new_empty(x.size(0) * dist.get_world_size(group), *x.shape[1:])
    dist.all_gather_into_tensor(whole, x.contiguous(), group=group)
    return whole

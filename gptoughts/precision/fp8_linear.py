"""megatron-core's parallel linear layers, whose three products run in emulated FP8 where that is switched on.

    y = cast(x) cast(W)^T + b,   dx = cast(dy) cast(W),   dW = cast(dy)^T cast(x),   db = sum dy,

as in Transformer Engine's ``Linear`` (transformer_engine/pytorch/module/linear.py): inputs and weights in the forward
format, gradients in the backward format, results in the dtype of x. The cast input is what is kept for backward. The
weight is cast again there, with the scale of the forward: under ZeRO-3 it is not this rank's between the two.

A norm ahead of a layer stays a module of its own, in both backends: so parameters have the same names with and without
FP8, and the numbers are those of Transformer Engine's fused norm and linear, which casts the norm's output.

Legend: s sequence, b microbatch, i inputs, o outputs on this rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear as UpstreamColumnParallelLinear
from megatron.core.tensor_parallel.layers import RowParallelLinear as UpstreamRowParallelLinear
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptoughts.platform.linear import assert_plain
from gptoughts.precision import fp8_emulation
from gptoughts.precision.fp8_recipe import DelayedScaling, Fp8Format
from gptoughts.precision.scaling_state import GRAD_OUTPUT, INPUT, WEIGHT, ScalingState


class _Fp8Capable:
    """What both layers add to megatron-core's."""

    fp8: ScalingState | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_module("fp8", None)  # type: ignore[attr-defined]

    def enable_fp8(self, recipe: DelayedScaling) -> ScalingState:
        """From now on products run in emulated FP8; returns the new state."""
        self.fp8 = state = ScalingState(recipe)
        return state

    def disable_fp8(self) -> None:
        """Back to products in the parameters' dtype; the state is dropped."""
        self.fp8 = None

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.fp8 is None:
            return super()._forward_impl(input, weight, *args, **kwargs)  # type: ignore[misc]
        return _fp8_product(self.fp8, input, weight, *args, **kwargs)

    def get_extra_state(self) -> dict[str, Tensor] | None:
        """Histories and scales under Transformer Engine's names; None without FP8."""
        return None if self.fp8 is None else {name: tensor.clone() for name, tensor in self.fp8.states().items()}

    def set_extra_state(self, state: dict[str, Tensor] | None) -> None:
        """Take what :meth:`get_extra_state` returned; nothing without FP8, here or there."""
        if state is None or self.fp8 is None:
            return
        for name, tensor in self.fp8.states().items():
            tensor.copy_(state[name])


class ColumnParallelLinear(_Fp8Capable, UpstreamColumnParallelLinear):
    """Divided over its outputs; see this module's head."""


class RowParallelLinear(_Fp8Capable, UpstreamRowParallelLinear):
    """Divided over its inputs; see this module's head."""


def _fp8_product(
    state: ScalingState,
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
    """Stands for what megatron-core's layers call; arguments and result as in ``platform.linear.parallel_linear``."""
    assert_plain(gradient_accumulation_fusion, grad_output_buffer, upstream_options)
    return _Fp8Linear.apply(
        input, weight, bias, state, state.forward_scales(), state.is_recording, tp_group, allreduce_dgrad,
        sequence_parallel,
    )  # fmt: skip


def cast_forward(
    state: ScalingState, x: Tensor, column: int, scale: float, *, is_recording: bool
) -> tuple[Tensor, float]:
    """Cast an input or weight; returns it and what is known of its largest magnitude (inf: nothing)."""
    fp8 = state.recipe.forward_format
    if not is_recording:
        return fp8_emulation.cast(x, scale, fp8), float("inf")
    amax = fp8_emulation.largest_magnitude(x)
    state.record_forward(column, amax)
    return _observed(state, column % 3, column // 3, x, scale, fp8, amax)


def cast_backward(state: ScalingState, grad: Tensor, product: int = 0) -> tuple[Tensor, float]:
    """Cast an output gradient with the present scale; returns it and 1 / scale."""
    column = 2 * product + GRAD_OUTPUT
    scale = float(state.scale_bwd[column])
    amax = fp8_emulation.largest_magnitude(grad)
    state.record_backward(column, amax)
    q, _ = _observed(state, 2, product, grad, scale, state.recipe.backward_format, amax)
    return q, 1.0 / scale


def _observed(
    state: ScalingState, role: int, product: int, x: Tensor, scale: float, fp8: Fp8Format, amax: Tensor
) -> tuple[Tensor, float]:
    known = float(amax) if x.device.type == "cpu" else float("inf")
    q = fp8_emulation.cast(x, scale, fp8, known)
    if state.observer is not None:
        state.observer(role, product, x, q, scale)
    return q, known


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        state: ScalingState,
        scales: list[float],
        is_recording: bool,
        group: dist.ProcessGroup | None,
        is_summed: bool,
        is_sequence_divided: bool,
    ) -> Tensor:
        x_scale, weight_scale = scales[INPUT], scales[WEIGHT]
        rows, _ = cast_forward(state, x, INPUT, x_scale, is_recording=is_recording)
        cast_weight, ctx.weight_amax = cast_forward(state, weight, WEIGHT, weight_scale, is_recording=is_recording)
        ctx.save_for_backward(rows, weight)
        ctx.state, ctx.scales, ctx.group = state, scales, group
        ctx.is_summed, ctx.is_sequence_divided = is_summed, is_sequence_divided
        if is_sequence_divided:
            # All ranks have one scale: their cast parts, one behind the other, are the cast whole.
            rows = _gathered(rows, group)
        out = fp8_emulation.linear(rows.flatten(0, -2), cast_weight, 1.0 / (x_scale * weight_scale))
        out = out.view(*rows.shape[:-1], out.size(-1))
        return out if bias is None else out.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        state: ScalingState = ctx.state
        x_scale, weight_scale = ctx.scales[INPUT], ctx.scales[WEIGHT]
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        cast_grad, grad_inverse = cast_backward(state, grad.contiguous())
        flat = cast_grad.flatten(0, -2)
        grad_x = grad_weight = None
        if needs_x:
            cast_weight = fp8_emulation.cast(weight, weight_scale, state.recipe.forward_format, ctx.weight_amax)
            grad_x = fp8_emulation.matmul(flat, cast_weight, grad_inverse / weight_scale)
            grad_x = grad_x.view(*grad.shape[:-1], grad_x.size(-1))
            if ctx.is_sequence_divided:
                whole, grad_x = grad_x, torch.empty_like(rows)
                dist.reduce_scatter_tensor(grad_x, whole, group=ctx.group)
            elif ctx.is_summed:
                dist.all_reduce(grad_x, group=ctx.group)
        if needs_weight:
            rows = _gathered(rows, ctx.group) if ctx.is_sequence_divided else rows
            grad_weight = fp8_emulation.weight_gradient(flat, rows.flatten(0, -2), grad_inverse / x_scale)
        grad_bias = grad.flatten(0, -2).sum(0) if needs_bias else None
        return grad_x, grad_weight, grad_bias, None, None, None, None, None, None


def _gathered(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The ranks' parts, one behind the other. Collective: ``group``."""
    whole = x.new_empty(x.size(0) * dist.get_world_size(group), *x.shape[1:])
    dist.all_gather_into_tensor(whole, x.contiguous(), group=group)
    return whole

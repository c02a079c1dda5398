"""Routed experts: each is a SwiGLU, run as one matrix product over its own tokens.

Tokens are sorted by expert, so that an expert's tokens are one slice; with gate w of a (token, expert) pair

    y_t = sum_e w_te W2_e (silu(g_te) u_te),    [g_te | u_te] = W1_e x_t.

The gate is applied in the middle, where a row is narrowest. Nothing but the input and [g | u] is kept for backward; the
rest is made again. All experts' weights lie in two tensors of one module, so that a rank runs the same modules, and has
a gradient (zero) for every expert, also where an expert has no token: ZeRO-3 needs both.

Legend: t tokens, k experts per token, n = t k pairs, h hidden, e experts, f width of an expert on this rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from gptoughts.models.fp8_experts import fp8_swiglu
from gptoughts.platform import device
from gptoughts.platform.matrix_product import linear, matmul, padded_rows, weight_gradient
from gptoughts.precision.fp8_recipe import DelayedScaling
from gptoughts.precision.scaling_state import ScalingState


class Assignment(NamedTuple):
    """Which pairs an expert computes: pairs of (token, choice) sorted by expert."""

    order: Tensor
    """int64 [n]: pair at each sorted place."""
    place: Tensor
    """int64 [n]: sorted place of each pair; the inverse of ``order``."""
    counts: list[int]
    """Pairs of each expert."""


def assign(experts: Tensor, num_experts: int) -> Assignment:
    """Sort the pairs of ``experts`` (int64 [t, k], the experts that each token chose) by expert."""
    flat = experts.reshape(-1)
    order = flat.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device)
    return Assignment(order, place, torch.bincount(flat, minlength=num_experts).tolist())


class GroupedExperts(MegatronModule):
    """The routed experts of a layer that this rank holds.

    Args:
        config: megatron-core's configuration.
        num_experts: How many.
        tensor_parallel_size: Ranks over which every expert's width is divided.
        expert_parallel_size: Ranks over which the layer's experts are divided.
        expert_parallel_rank: Which of them this is.
    """

    def __init__(
        self,
        config: TransformerConfig,
        num_experts: int,
        tensor_parallel_size: int,
        expert_parallel_size: int = 1,
        expert_parallel_rank: int = 0,
    ) -> None:
        super().__init__(config)
        width = config.moe_ffn_hidden_size // tensor_parallel_size
        where = {"device": device.current_device(), "dtype": config.params_dtype}
        self.linear_fc1_weight = Parameter(torch.empty(num_experts, 2 * width, config.hidden_size, **where))
        self.linear_fc2_weight = Parameter(torch.empty(num_experts, config.hidden_size, width, **where))
        self.num_experts = num_experts
        self.expert_parallel_size = expert_parallel_size
        self.first_expert = num_experts * expert_parallel_rank
        self.linear_fc1_fp8: ScalingState | None
        self.linear_fc2_fp8: ScalingState | None
        self.register_module("linear_fc1_fp8", None)
        self.register_module("linear_fc2_fp8", None)
        if expert_parallel_size > 1:
            for weight in (self.linear_fc1_weight, self.linear_fc2_weight):
                weight.allreduce = False  # type: ignore[attr-defined]  # see parallel/partition.py
        if tensor_parallel_size > 1:
            # gate and up are divided each by itself: stride 2.
            for weight, dim, stride in ((self.linear_fc1_weight, 1, 2), (self.linear_fc2_weight, 2, 1)):
                weight.tensor_model_parallel = True  # type: ignore[attr-defined]
                weight.partition_dim = dim  # type: ignore[attr-defined]
                weight.partition_stride = stride  # type: ignore[attr-defined]

    def forward(self, hidden_states: Tensor, gates: Tensor, assignment: Assignment) -> Tensor:
        """Weighted sum of each token's experts.

        Args:
            hidden_states: [t, h].
            gates: fp32 [t, k].
            assignment: Of the experts that the gates belong to.

        Returns:
            [t, h]; with tensor parallelism this rank's part of the sum.
        """
        weights = (self.linear_fc1_weight, self.linear_fc2_weight)
        states = (self.linear_fc1_fp8, self.linear_fc2_fp8)
        if states == (None, None):
            return _GroupedSwiGLU.apply(hidden_states, gates, *weights, assignment)
        return fp8_swiglu(hidden_states, gates, *weights, assignment, states, self.first_expert)

    def enable_fp8(self, name: str, recipe: DelayedScaling) -> ScalingState:
        """From now on a product, ``linear_fc1`` or ``linear_fc2``, runs in emulated FP8; returns its new state."""
        state = ScalingState(recipe, self.num_experts * self.expert_parallel_size)
        setattr(self, f"{name}_fp8", state)
        return state

    def disable_fp8(self, name: str) -> None:
        """Back to a product in the parameters' dtype; its state is dropped."""
        setattr(self, f"{name}_fp8", None)


def _products(rows: Tensor, weights: Tensor, counts: list[int], *, transposed: bool) -> Tensor:
    """Rows of each expert times its weight (or its transpose), [n, ...]."""
    out = rows.new_empty(rows.size(0), weights.size(1 if transposed else 2))
    slices = zip(rows.split(counts), weights, out.split(counts), strict=True)
    for part, weight, target in slices:
        if part.size(0):
            target.copy_((linear if transposed else matmul)(padded_rows(part), weight)[: part.size(0)])
    return out


def _weight_gradients(outputs: Tensor, inputs: Tensor, like: Tensor, counts: list[int]) -> Tensor:
    """Per expert outputs^T inputs, [e, ...]; 0 where it has no token."""
    gradient = torch.empty_like(like)
    for out, part, target in zip(outputs.split(counts), inputs.split(counts), gradient, strict=True):
        target.copy_(weight_gradient(padded_rows(out), padded_rows(part)))
    return gradient


def _summed_choices(rows: Tensor, assignment: Assignment, k: int) -> Tensor:
    """Sum the k sorted rows of each token, [n, h] to [t, h]."""
    return rows.index_select(0, assignment.place).view(-1, k, rows.size(-1)).sum(1)


class _GroupedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gates: Tensor, w1: Tensor, w2: Tensor, assignment: Assignment) -> Tensor:
        k = gates.size(1)
        rows = x.index_select(0, assignment.order // k)
        gate_up = _products(rows, w1, assignment.counts, transposed=True)
        gate, up = gate_up.chunk(2, dim=-1)
        pair_gates = gates.reshape(-1, 1).index_select(0, assignment.order)
        middle = F.silu(gate).mul_(up).mul_(pair_gates.to(x.dtype))
        ctx.assignment, ctx.k = assignment, k
        ctx.save_for_backward(x, gate_up, pair_gates, w1, w2)
        return _summed_choices(_products(middle, w2, assignment.counts, transposed=True), assignment, k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        x, gate_up, pair_gates, w1, w2 = ctx.saved_tensors
        assignment: Assignment = ctx.assignment
        counts, k = assignment.counts, ctx.k
        token = assignment.order // k
        gate, up = gate_up.chunk(2, dim=-1)
        low_gates = pair_gates.to(x.dtype)
        grad_out = grad.index_select(0, token)
        silu = F.silu(gate)
        act = silu * up
        grad_w2 = _weight_gradients(grad_out, act * low_gates, w2, counts)
        grad_middle = _products(grad_out, w2, counts, transposed=False)
        grad_pair_gates = torch.linalg.vecdot(grad_middle.float(), act.float()).index_select(0, assignment.place)
        grad_act = grad_middle.mul_(low_gates)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        torch.mul(silu, grad_act, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad_act.mul_(up), gate, grad_input=grad_gate)
        grad_w1 = _weight_gradients(grad_gate_up, x.index_select(0, token), w1, counts)
        grad_x = _summed_choices(_products(grad_gate_up, w1, counts, transposed=False), assignment, k)
        return grad_x, grad_pair_gates.view(-1, k), grad_w1, grad_w2, None

"""The routed experts' products in emulated FP8; the formulas are those of ``models.grouped_experts``.

As in Transformer Engine's ``GroupedLinear``, every expert has scales of its own for its tokens, its weights and their
gradients. The state covers the experts of all expert-parallel ranks; each rank fills in its own, and the reduction over
the amax group completes it: so it does not depend on which rank holds which expert. (megatron-core reduces the i-th
expert of every rank with each other's.) An expert without tokens leaves its activations' histories as they are.

Tokens and what lies between the two products are cast again in backward, with the scales of the forward, as weights
are: kept are the same tensors as without FP8.

Legend: t tokens, k experts per token, n = t k pairs, h hidden, e experts of this rank, f width of an expert.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptoughts.precision import fp8_emulation
from gptoughts.precision.fp8_linear import cast_backward, cast_forward
from gptoughts.precision.scaling_state import FORWARD_SLOTS, INPUT, WEIGHT, ScalingState


class Pairs(Protocol):
    """``grouped_experts.Assignment``."""

    @property
    def order(self) -> Tensor: ...
    @property
    def place(self) -> Tensor: ...
    @property
    def counts(self) -> list[int]: ...


class _Product:
    """One of the two products of all experts in one microbatch: rows of each expert times its weight.

    Args:
        state: Of the experts of all ranks; None: this product stays in the dtype of its operands.
        first: The first of this rank's experts among all.
    """

    def __init__(self, state: ScalingState | None, first: int) -> None:
        self._state = state
        self._first = first
        self._scales = state.forward_scales() if state is not None else []
        self.is_recording = state is not None and state.is_recording

    def forward(self, rows: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
        """[n, i] and [e, o, i] to [n, o]; records magnitudes where it is the microbatch's first forward."""
        out = rows.new_empty(rows.size(0), weights.size(1))
        for expert, (part, weight, target) in enumerate(
            zip(rows.split(counts), weights, out.split(counts), strict=True)
        ):
            cast_weight, weight_inverse = self._cast(weight, expert, WEIGHT, is_recording=self.is_recording)
            if part.size(0):
                cast_rows, inverse = self._cast(part, expert, INPUT, is_recording=self.is_recording)
                target.copy_(fp8_emulation.linear(cast_rows, cast_weight, inverse * weight_inverse))
        return out

    def backward(self, grad: Tensor, rows: Tensor, weights: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
        """Gradients of rows and weights from that of the product, [n, o]."""
        grad_rows, grad_weights = torch.empty_like(rows), torch.zeros_like(weights)
        parts = zip(grad.split(counts), rows.split(counts), weights, grad_rows.split(counts), grad_weights, strict=True)
        for expert, (part, of_rows, weight, to_rows, to_weight) in enumerate(parts):
            if not part.size(0):
                continue
            cast_grad, grad_inverse = part, 1.0
            if self._state is not None:
                cast_grad, grad_inverse = cast_backward(self._state, part.contiguous(), self._first + expert)
            cast_weight, weight_inverse = self._cast(weight, expert, WEIGHT, is_recording=False)
            cast_rows, inverse = self._cast(of_rows, expert, INPUT, is_recording=False)
            to_rows.copy_(fp8_emulation.matmul(cast_grad, cast_weight, grad_inverse * weight_inverse))
            to_weight.copy_(fp8_emulation.weight_gradient(cast_grad, cast_rows, grad_inverse * inverse))
        return grad_rows, grad_weights

    def _cast(self, x: Tensor, expert: int, slot: int, *, is_recording: bool) -> tuple[Tensor, float]:
        """A tensor and what its numbers are multiplied with."""
        if self._state is None:
            return x, 1.0
        column = FORWARD_SLOTS * (self._first + expert) + slot
        scale = self._scales[column]
        return cast_forward(self._state, x, column, scale, is_recording=is_recording)[0], 1.0 / scale


def fp8_swiglu(
    x: Tensor,
    gates: Tensor,
    w1: Tensor,
    w2: Tensor,
    assignment: Pairs,
    states: tuple[ScalingState | None, ScalingState | None],
    first: int,
) -> Tensor:
    """Weighted sum of each token's experts, as ``GroupedExperts.forward``.

    Args:
        x: [t, h].
        gates: fp32 [t, k].
        w1: [e, 2f, h].
        w2: [e, h, f].
        assignment: Of the experts that the gates belong to.
        states: Of the first and the second product, with the experts of all ranks; None: not in FP8.
        first: The first of this rank's experts among all.
    """
    products = tuple(_Product(state, first) for state in states)
    return _Fp8GroupedSwiGLU.apply(x, gates, w1, w2, assignment, products)


class _Fp8GroupedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gates: Tensor,
        w1: Tensor,
        w2: Tensor,
        assignment: Pairs,
        products: tuple[_Product, _Product],
    ) -> Tensor:
        k, counts = gates.size(1), assignment.counts
        gate_up = products[0].forward(x.index_select(0, assignment.order // k), w1, counts)
        pair_gates = gates.reshape(-1, 1).index_select(0, assignment.order)
        act = _activation(gate_up)
        out = products[1].forward(act.mul_(pair_gates.to(x.dtype)), w2, counts)
        ctx.assignment, ctx.k, ctx.products = assignment, k, products
        ctx.save_for_backward(x, gate_up, pair_gates, w1, w2)
        return _summed_choices(out, assignment, k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_up, pair_gates, w1, w2 = ctx.saved_tensors
        assignment, k = ctx.assignment, ctx.k
        token = assignment.order // k
        gate, up = gate_up.chunk(2, dim=-1)
        low_gates = pair_gates.to(x.dtype)
        act = _activation(gate_up)
        grad_middle, grad_w2 = ctx.products[1].backward(
            grad.index_select(0, token), act * low_gates, w2, assignment.counts
        )
        grad_pair_gates = torch.linalg.vecdot(grad_middle.float(), act.float()).index_select(0, assignment.place)
        grad_act = grad_middle.mul_(low_gates)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        torch.mul(F.silu(gate), grad_act, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad_act.mul_(up), gate, grad_input=grad_gate)
        grad_rows, grad_w1 = ctx.products[0].backward(grad_gate_up, x.index_select(0, token), w1, assignment.counts)
        return _summed_choices(grad_rows, assignment, k), grad_pair_gates.view(-1, k), grad_w1, grad_w2, None, None


def _activation(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _summed_choices(rows: Tensor, assignment: Pairs, k: int) -> Tensor:
    """Sum the k sorted rows of each token, [n, h] to [t, h]."""
    return rows.index_select(0, assignment.place).view(-1, k, rows.size(-1)).sum(1)

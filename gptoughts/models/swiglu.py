"""SwiGLU feed-forward layer (Shazeer, arXiv:2002.05202) that keeps nothing but its projection for backward.

    y = W_2 (silu(g) * u),   [g | u] = W_1 x;   du = dy silu(g),   dg = dy u silu'(g).

silu(g) is recomputed in backward: on a CPU one more pass over a cached tile costs less than writing and reading
another tensor of the layer's largest size.

Legend: s sequence, b microbatch, f feed-forward width on this rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.mlp import MLP
from torch import Tensor
from torch.autograd.function import once_differentiable


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        torch.mul(F.silu(gate), grad, out=grad_up)
        return grad_gate_up


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [..., 2f]; returns [..., f]."""
    return _SwiGLU.apply(gate_up)


class SwiGLUMLP(MLP):
    """megatron-core's MLP with the activation of this module (no biases, no clamp, no per-token scale)."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, padding_mask: Tensor | None = None, **upstream_options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """[s, b, h] to [s, b, h] and no bias; padding changes nothing here. Collective: tensor-parallel group."""
        given = sorted(name for name, value in upstream_options.items() if value is not None)
        if given:
            raise ValueError(f"the feed-forward layer was given {', '.join(given)}; not supported")
        gate_up, _ = self.linear_fc1(hidden_states)
        return self.linear_fc2(swiglu(gate_up))

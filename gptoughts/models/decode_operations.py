"""What ``models.decode_step`` repeats: norms, products, attention and experts for a few tokens.

Legend: b rows, s tokens of each, n = b s, h hidden, np heads on this rank, ng key/value heads there, g = np / ng,
hn head dim, p places, i inputs, o outputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch import Tensor, nn

from gptoughts.models.kv_cache import StepMemory
from gptoughts.models.moe import MixtureOfExperts
from gptoughts.parallel import groups
from gptoughts.platform import huge_pages, matrix_product

_LINEARS = (ColumnParallelLinear, RowParallelLinear)


def lay_out_for_decoding(model: nn.Module) -> None:
    """Store the matrices of linear layers by input; shapes and values stay, and all modules work as before."""
    for name, module in model.named_modules():
        # The projection of latents is read as one matrix per head.
        if isinstance(module, _LINEARS) and not name.endswith("linear_kv_up_proj"):
            weight = module.weight
            if weight is not None and weight.device.type == "cpu" and not weight.t().is_contiguous():
                by_input = huge_pages.empty(weight.t().shape, weight.dtype)
                weight.data = by_input.copy_(weight.detach().t()).t()


class Norm:
    """RMSNorm as y = x (w sqrt(n)) / hypot(|x|, sqrt(n eps)), n its width: four operations in place of nine."""

    def __init__(self, norm: Any) -> None:
        self.norm, width = norm, norm.weight.numel()
        self.weight = norm.weight.detach().float() * width**0.5
        self.floor = torch.tensor((width * norm.eps) ** 0.5, device=self.weight.device)

    def __call__(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":  # one kernel there
            return F.rms_norm(x, self.norm.normalized_shape, self.norm.weight, self.norm.eps)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return torch.mul(x, self.weight).div_(torch.hypot(length, self.floor)).to(x.dtype)


def product(rows: Tensor, weight: Tensor) -> Tensor:
    """[n, i] by a weight [o, i] of either layout: [n, o]."""
    return F.linear(rows, weight) if weight.stride(0) == 1 else matrix_product.linear(rows, weight)


def add_product(x: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """x + rows weight^T, where ranks hold parts of the sum. Collective: tensor-parallel group."""
    if groups.tensor_parallel_size() == 1:
        if weight.stride(0) == 1:
            return torch.addmm(x, rows, weight.t())
        return product(rows, weight).add_(x)
    part = product(rows, weight)
    dist.all_reduce(part, group=groups.tensor_parallel_group())
    return part.add_(x)


def latent_of(x: Tensor, weight: Tensor, width: int) -> Tensor:
    """[n, width] of a down projection, which ranks may have divided. Collective: tensor-parallel group, then."""
    latent = product(x, weight)
    return latent if latent.size(-1) == width else gather_from_tensor_model_parallel_region(latent)


def attend(query: Tensor, keys: Tensor, values: Tensor, kept: StepMemory, scale: float) -> Tensor:
    """[b, ng, s g, hn] over [b, ng, p, hn]; returns as many rows in the same order, [b, m, ng s g / m, hn].

    torch's CPU kernel gives each thread heads of keys: where all queries have one, it is shown to several threads.
    """
    b, ng, rows, _ = query.shape
    mask, s = kept.layer.window.is_visible, kept.layer.window.positions.size(1)
    if mask is not None and mask.size(2) > 1:
        mask = mask.repeat_interleave(rows // s, dim=2)
    parts = torch.get_num_threads() // b if ng == 1 and query.device.type == "cpu" else 1
    if parts > 1 and rows % parts == 0 and (mask is None or mask.size(2) == 1):
        query = query.view(b, parts, rows // parts, -1)
        keys, values = keys.expand(-1, parts, -1, -1), values.expand(-1, parts, -1, -1)
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)


def turned_by(heads: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of [b, s, n, m, d] by ([cos | cos], [-sin | sin])."""
    cos, sin = turn
    swapped = torch.roll(heads, heads.size(-1) // 2, dims=-1)
    return torch.mul(heads, cos).addcmul_(swapped, sin)


def swiglu_of(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def mixture_of(x: Tensor, mixture: MixtureOfExperts) -> Tensor:
    """The experts that were chosen, and no others: [b, h] to [b, h]."""
    gates, chosen = mixture.router(x[None])
    experts = mixture.experts
    output = torch.zeros_like(x) if mixture.shared_experts is None else mixture.shared_experts(x[None])[0][0]
    by_expert: dict[int, list[tuple[int, int]]] = {}
    for row, choices in enumerate(chosen.tolist()):
        for choice, expert in enumerate(choices):
            by_expert.setdefault(expert, []).append((row, choice))
    for expert, pairs in by_expert.items():
        rows, choices = (torch.tensor(part, device=x.device) for part in zip(*pairs, strict=True))
        middle = swiglu_of(F.linear(x[rows], experts.linear_fc1_weight[expert]))
        middle.mul_(gates[rows, choices].to(x.dtype).unsqueeze(-1))
        output.index_add_(0, rows, F.linear(middle, experts.linear_fc2_weight[expert]))
    return output

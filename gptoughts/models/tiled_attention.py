"""Attention on a CPU: torch's fused forward, and a backward of our own in tiles of queries.

With P = softmax(scale q k^T + mask) recomputed from the forward's log-sum-exp (Dao et al., arXiv:2205.14135, alg. 4):

    dv = P^T do,   dS = P * (do v^T - delta),   delta_i = do_i . o_i,   dq = scale dS k,   dk = scale dS^T q.

torch's CPU backward works on 32-row tiles per head; a batched product of 128 query rows of many heads at once, over the
keys that a causal mask leaves, takes about half its time. Scores and P are fp32 whatever the dtype, as in the forward.

Legend: s sequence, b microbatch, np heads on this rank, ng key/value heads on this rank, g = np / ng, hn head dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_TILE_ROWS = 128
_TILE_ELEMENTS = 1 << 21
"""fp32 elements of a tile of scores: 8 MiB."""


def supports(query: Tensor, key: Tensor) -> bool:
    """Whether :func:`tiled_attention` can stand in for scaled_dot_product_attention (without mask and dropout)."""
    return (
        query.device.type == "cpu"
        and query.dtype in (torch.float32, torch.bfloat16)
        and query.size(0) == key.size(0)
        and query.requires_grad
    )


def tiled_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float, is_causal: bool) -> Tensor:
    """softmax(scale q k^T + causal mask) v.

    Args:
        query: [s, b, np, hn]; any strides, the last dimension dense.
        key: [s, b, ng, hn].
        value: [s, b, ng, hn_v].
        scale: Factor of the scores.
        is_causal: Each position attends to itself and what is before it.

    Returns:
        [b, np, s, hn_v].
    """
    return _TiledAttention.apply(query, key, value, scale, is_causal)


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, is_causal: bool) -> Tensor:
        # The kernel wants equal head sizes; columns of zeros change nothing.
        width = max(query.size(-1), value.size(-1))
        padded = [F.pad(x, (0, width - x.size(-1))) if x.size(-1) < width else x for x in (query, key, value)]
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(x.permute(1, 2, 0, 3) for x in padded), 0.0, is_causal, scale=scale
        )
        out = out[..., : value.size(-1)]
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.scale, ctx.is_causal = scale, is_causal
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, out, lse = ctx.saved_tensors
        s, b, ng, _ = key.shape
        g = query.size(2) // ng
        delta = torch.linalg.vecdot(out.float(), grad.float())
        # Those of keys and values are sums over tiles: fp32, so that no tile is rounded away.
        grad_query = torch.empty(b * ng, g, s, query.size(3), dtype=query.dtype)
        grad_key, grad_value = (torch.zeros(b * ng, s, x.size(3), dtype=torch.float32) for x in (key, value))
        # [b * ng, g, s, ...]: the g query heads of a group meet their keys in one product.
        parts = (
            _grouped(query, ng),
            _flat(key),
            _flat(value),
            grad.reshape(b * ng, g, s, grad.size(-1)),
            lse.reshape(b * ng, g, s, 1),
            delta.reshape(b * ng, g, s, 1),
            grad_query,
            grad_key,
            grad_value,
        )
        heads_per_tile = max(1, _TILE_ELEMENTS // (g * min(_TILE_ROWS, s) * s))
        for start in range(0, b * ng, heads_per_tile):
            tile = (x[start : start + heads_per_tile] for x in parts)
            _backward_of_heads(*tile, scale=ctx.scale, is_causal=ctx.is_causal)
        grad_key, grad_value = (_unflat(x.to(key.dtype), b) for x in (grad_key, grad_value))
        return _unflat(grad_query.flatten(0, 1), b), grad_key, grad_value, None, None


def _backward_of_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    *,
    scale: float,
    is_causal: bool,
) -> None:
    """Add up the gradients of a few key/value heads [n, s, hn] and their query heads [n, g, s, hn], in place."""
    n, g, s, _ = query.shape
    dtype = query.dtype
    future = torch.ones(_TILE_ROWS, _TILE_ROWS, dtype=torch.bool).triu(1)
    wide_key = key.float()
    for start in range(0, s, _TILE_ROWS):
        end = min(start + _TILE_ROWS, s)
        rows, keys = end - start, end if is_causal else s
        scaled, upstream, low, shift = (x[:, :, start:end].reshape(n, g * rows, -1) for x in (query, grad, lse, delta))
        scaled = scaled * scale
        scores = torch.baddbmm(-low, scaled.float(), wide_key[:, :keys].transpose(1, 2))
        probabilities = scores.exp_()
        if is_causal:
            diagonal = probabilities.view(n, g, rows, keys)[..., start:end]
            diagonal.masked_fill_(future[:rows, :rows], 0.0)
        # Not baddbmm_: into a slice it falls back to one product per head.
        grad_value[:, :keys] += torch.bmm(probabilities.to(dtype).transpose(1, 2), upstream)
        grad_scores = torch.bmm(upstream, value[:, :keys].transpose(1, 2))
        grad_scores = grad_scores.sub(shift).mul_(probabilities).to(dtype)
        grad_query[:, :, start:end] = torch.bmm(grad_scores, key[:, :keys]).mul_(scale).view(n, g, rows, -1)
        grad_key[:, :keys] += torch.bmm(grad_scores.transpose(1, 2), scaled)


def _flat(x: Tensor) -> Tensor:
    """[s, b, n, hn] to [b * n, s, hn], a view where the strides allow it."""
    return x.flatten(1, 2).transpose(0, 1)


def _grouped(query: Tensor, ng: int) -> Tensor:
    """[s, b, np, hn] to [b * ng, g, s, hn]."""
    s, b, np, hn = query.shape
    return query.reshape(s, b * ng, np // ng, hn).permute(1, 2, 0, 3)


def _unflat(x: Tensor, b: int) -> Tensor:
    """[b * n, s, hn] to [s, b, n, hn]."""
    return x.transpose(0, 1).unflatten(1, (b, -1))

"""Attention on a CPU in tiles of queries, forward and backward.

With P = softmax(scale q k^T + mask), recomputed in backward from the forward's log-sum-exp (Dao et al.,
arXiv:2205.14135, alg. 4):

    dv = P^T do,   dS = P * (do v^T - delta),   delta_i = do_i . o_i,   dq = scale dS k,   dk = scale dS^T q.

torch's CPU kernels work on tiles of 32 or 64 rows per head. Of 128 query rows over the keys that a causal mask leaves,
backward is about twice as fast as torch's as one batched product of many heads. Where oneDNN is the faster library and
threads are few, it is faster still with one head at a time: single products can go to oneDNN, batched fp32 ones only to
MKL, and a head's tile stays in the second-level cache. So is forward where torch's kernel has to pad heads or repeat
keys; elsewhere that kernel runs. Scores and P are fp32 whatever the dtype.

Legend: s sequence, b microbatch, np heads on this rank, ng key/value heads on this rank, g = np / ng, hn head dim.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptoughts.platform import matrix_product

_TILE_ROWS = 128
_TILE_ELEMENTS = 1 << 21
"""fp32 elements of a tile of scores of many heads: 8 MiB."""
_FEW_THREADS = 4
"""More threads than this have too little to do in a product of one head."""
_LEAST_SCORES = 1 << 15
"""Scores of a head's tile below which a call per head costs more than it saves."""


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
        out, lse = attend(query, key, value, scale=scale, is_causal=is_causal)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.scale, ctx.is_causal = scale, is_causal
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, out, lse = ctx.saved_tensors
        delta = torch.linalg.vecdot(out.float(), grad.float())
        grad_query, grad_key, grad_value = gradients(
            query, key, value, grad, lse, delta, scale=ctx.scale, is_causal=ctx.is_causal
        )
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None


def attend(query: Tensor, key: Tensor, value: Tensor, *, scale: float, is_causal: bool) -> tuple[Tensor, Tensor]:
    """Output [b, np, s, hn_v] and log-sum-exp, fp32 [b, np, s]; arguments as in :func:`tiled_attention`.

    Without a causal mask there may be another number of keys than of queries.
    """
    is_fused_ready = query.size(2) == key.size(2) and query.size(3) == value.size(3)
    by_head = not is_fused_ready and _is_one_head_faster(query, key)
    return (_attend_head_by_head if by_head else _attend_fused)(query, key, value, scale=scale, is_causal=is_causal)


def gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    *,
    scale: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query (its dtype), key and value (fp32), each of its tensor's shape.

    Args:
        query: [s, b, np, hn].
        key: [k, b, ng, hn]; k = s under a causal mask.
        value: [k, b, ng, hn_v].
        grad: Of the output, [b, np, s, hn_v].
        lse: fp32 [b, np, s], over all keys that the queries look at; those given may be some of them.
        delta: fp32 [b, np, s].
        scale: Factor of the scores.
        is_causal: Each position attends to itself and what is before it.
    """
    keys, b, ng, _ = key.shape
    s, g = query.size(0), query.size(2) // ng
    # Those of keys and values are sums over tiles: fp32, so that no tile is rounded away.
    grad_query = torch.empty(b * ng, g, s, query.size(3), dtype=query.dtype)
    grad_key, grad_value = (torch.zeros(b * ng, keys, x.size(3), dtype=torch.float32) for x in (key, value))
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
    heads_per_tile = max(1, _TILE_ELEMENTS // (g * min(_TILE_ROWS, s) * keys))
    if _is_one_head_faster(query, key):
        heads_per_tile = 1
    for start in range(0, b * ng, heads_per_tile):
        tile = (x[start : start + heads_per_tile] for x in parts)
        _backward_of_heads(*tile, scale=scale, is_causal=is_causal)
    return _unflat(grad_query.flatten(0, 1), b), _unflat(grad_key, b), _unflat(grad_value, b)


def _is_one_head_faster(query: Tensor, key: Tensor) -> bool:
    """Whether heads are computed one after the other."""
    s, g = key.size(0), query.size(2) // key.size(2)
    is_large = g * min(_TILE_ROWS, s) * s >= _LEAST_SCORES
    return is_large and torch.get_num_threads() <= _FEW_THREADS and matrix_product.is_onednn_wider()


def _attend_fused(query: Tensor, key: Tensor, value: Tensor, *, scale: float, is_causal: bool) -> tuple[Tensor, Tensor]:
    """torch's kernel: output [b, np, s, hn_v] and log-sum-exp [b, np, s]."""
    # The kernel wants equal head sizes; columns of zeros change nothing.
    width = max(query.size(-1), value.size(-1))
    padded = [F.pad(x, (0, width - x.size(-1))) if x.size(-1) < width else x for x in (query, key, value)]
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(x.permute(1, 2, 0, 3) for x in padded), 0.0, is_causal, scale=scale
    )
    return out[..., : value.size(-1)], lse


def _attend_head_by_head(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """The same in our tiles, wholly in fp32."""
    length, b, ng, _ = key.shape
    s, g = query.size(0), query.size(2) // ng
    out = torch.empty(b * ng, g, s, value.size(-1), dtype=query.dtype)
    lse = torch.empty(b * ng, g, s, 1, dtype=torch.float32)
    heads = zip(_grouped(query, ng), _flat(key), _flat(value), out, lse, strict=True)
    for head_query, head_key, head_value, head_out, head_lse in heads:
        wide_key, wide_value = head_key.float().contiguous(), head_value.float().contiguous()
        for start in range(0, s, _TILE_ROWS):
            end = min(start + _TILE_ROWS, s)
            rows, keys = end - start, end if is_causal else length
            scaled = (head_query[:, start:end].float() * scale).reshape(g * rows, -1)
            scores = matrix_product.linear(scaled, wide_key[:keys])
            if is_causal:
                diagonal = scores.view(g, rows, keys)[..., start:end]
                diagonal.masked_fill_(_future(rows), float("-inf"))
            largest = scores.amax(-1, keepdim=True)
            total = scores.sub_(largest).exp_().sum(-1, keepdim=True)
            weighted = matrix_product.matmul(scores, wide_value[:keys])
            head_out[:, start:end] = weighted.div_(total).view(g, rows, -1)
            head_lse[:, start:end] = total.log_().add_(largest).view(g, rows, 1)
    return out.view(b, ng * g, s, -1), lse.view(b, ng * g, s)


@cache
def _future(rows: int) -> Tensor:
    """[rows, rows], True where a key comes after the query."""
    with torch.inference_mode(False):
        return torch.ones(rows, rows, dtype=torch.bool).triu(1)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """[n, r, i] times [n, i, c]; one alone by the faster library."""
    if left.size(0) > 1:
        return torch.bmm(left, right)
    return matrix_product.matmul(left[0], right[0]).unsqueeze(0)


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
    if n == 1:
        key, value = key.contiguous(), value.contiguous()
    wide_key = key.float()
    for start in range(0, s, _TILE_ROWS):
        end = min(start + _TILE_ROWS, s)
        rows, keys = end - start, end if is_causal else key.size(1)
        scaled, upstream, low, shift = (x[:, :, start:end].reshape(n, g * rows, -1) for x in (query, grad, lse, delta))
        scaled = scaled * scale
        scores = _product(scaled.float(), wide_key[:, :keys].transpose(1, 2))
        probabilities = scores.sub_(low).exp_()
        if is_causal:
            diagonal = probabilities.view(n, g, rows, keys)[..., start:end]
            diagonal.masked_fill_(_future(rows), 0.0)
        # Not baddbmm_: into a slice it falls back to one product per head.
        grad_value[:, :keys] += _product(probabilities.to(dtype).transpose(1, 2), upstream)
        grad_scores = _product(upstream, value[:, :keys].transpose(1, 2))
        grad_scores = grad_scores.sub(shift).mul_(probabilities).to(dtype)
        grad_query[:, :, start:end] = _product(grad_scores, key[:, :keys]).mul_(scale).view(n, g, rows, -1)
        grad_key[:, :keys] += _product(grad_scores.transpose(1, 2), scaled)


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

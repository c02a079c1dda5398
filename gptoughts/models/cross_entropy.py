"""Cross-entropy of (vocabulary-parallel) logits in nats, in tiles that stay in cache and without an fp32 copy.

    loss_i = lse_i - z_i[y_i],   lse_i = log sum_v exp z_iv,   dz_iv = g_i (exp(z_iv - lse_i) - [v = y_i]).

Forward keeps the logits as they are and one fp32 number per token; backward turns them into their gradient in place.
Under tensor parallelism lse is joined over the ranks from each rank's own.

Legend: n tokens, v vocabulary on this rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

_CPU_TILE_ELEMENTS = 1 << 20
"""fp32 elements of a tile on a CPU: 4 MiB, which a shared cache holds, and few enough tiles that threads seldom wait
for each other between them."""
_GPU_TILE_ELEMENTS = 1 << 26
"""On CUDA: 256 MiB, beside which a launch costs nothing, and of all logits it would be twice what they take."""


def cross_entropy(logits: Tensor, labels: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Loss of each token. Backward overwrites ``logits`` with its gradient: use them for nothing else.

    Args:
        logits: [n, v], contiguous, any floating dtype.
        labels: int64 [n]; ids of the whole vocabulary.
        group: Tensor-parallel group that the vocabulary is divided over, in rank order; None: v is all of it.

    Returns:
        fp32 [n], nats.

    Collective: ``group``, if given.
    """
    return _CrossEntropy.apply(logits, labels, group)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        is_divided = group is not None and group.size() > 1
        local = labels - group.rank() * logits.size(-1) if is_divided else labels  # type: ignore[union-attr]
        lse = torch.empty(labels.shape, dtype=torch.float32, device=logits.device)
        for rows in _tiles(logits):
            torch.logsumexp(logits[rows].float(), dim=-1, out=lse[rows])
        is_here = (local >= 0) & (local < logits.size(-1)) if is_divided else None
        index = local if is_here is None else local.where(is_here, 0)
        target = logits.gather(-1, index.unsqueeze(-1)).squeeze(-1).float()
        if is_divided:
            assert is_here is not None
            target = target.where(is_here, 0.0)
            dist.all_reduce(target, group=group)
            lse = _join(lse, group)
        ctx.save_for_backward(logits, lse, index, is_here)
        return lse - target

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, lse, index, is_here = ctx.saved_tensors
        at_target = (-grad if is_here is None else -grad.where(is_here, 0.0)).unsqueeze(-1)
        index = index.unsqueeze(-1)
        for rows in _tiles(logits):
            tile = logits[rows].float() if logits.dtype != torch.float32 else logits[rows]
            tile.sub_(lse[rows, None]).exp_().mul_(grad[rows, None])
            tile.scatter_add_(-1, index[rows], at_target[rows])
            if tile.dtype != logits.dtype:
                logits[rows] = tile
        return logits, None, None


def _tiles(logits: Tensor) -> list[slice]:
    """Row ranges."""
    n, v = logits.shape
    step = max(1, (_GPU_TILE_ELEMENTS if logits.is_cuda else _CPU_TILE_ELEMENTS) // v)
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def _join(lse: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """log sum exp over the ranks' own lse. Collective: ``group``."""
    largest = lse.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    total = (lse - largest).exp_()
    dist.all_reduce(total, group=group)
    return total.log_().add_(largest)

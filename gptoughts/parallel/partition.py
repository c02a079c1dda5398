"""How one tensor is divided over tensor- and expert-parallel ranks, and put together again.

megatron-core marks a divided parameter with ``partition_dim`` and ``partition_stride``. With stride 1 rank r holds the
r-th of equal slices. With stride k the tensor is k blocks one after the other (SwiGLU's gate and up: k = 2), every
block is divided by itself, and a rank holds its slice of each block in turn.

Weights of routed experts have the expert as their first dimension. Expert parallelism divides that one, into equal runs
of experts; no other axis divides it. megatron-core marks such a parameter with ``allreduce = False``: data-parallel
ranks hold different ones, so that its gradient is not summed over all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def is_expert_parallel(parameter: Tensor) -> bool:
    """Whether expert-parallel ranks hold different experts in this parameter. Collective: none."""
    return not getattr(parameter, "allreduce", True)


def split(full: Tensor, dim: int | None, stride: int, rank: int, size: int) -> Tensor:
    """This rank's part of a whole tensor; the whole where it is not divided (``dim`` None). Collective: none."""
    if dim is None or size == 1:
        return full
    parts = [block.chunk(size, dim=dim)[rank] for block in full.chunk(stride, dim=dim)]
    return parts[0] if stride == 1 else torch.cat(parts, dim=dim)


def merge(shards: Sequence[Tensor], dim: int | None, stride: int) -> Tensor:
    """The whole tensor from all ranks' parts, in rank order; the inverse of :func:`split`. Collective: none."""
    if dim is None or len(shards) == 1:
        return shards[0]
    blocks = [shard.chunk(stride, dim=dim) for shard in shards]
    return torch.cat([blocks[rank][k] for k in range(stride) for rank in range(len(shards))], dim=dim)

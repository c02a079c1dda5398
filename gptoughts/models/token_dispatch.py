"""Tokens to the expert-parallel ranks that hold their experts, and the weighted sums back.

Of e experts rank r of R holds e/R: those from r e/R on. Every rank has t tokens of its own samples. The two ways give
the same sums, added in another order:

- ``allgather``: each rank gets the tokens of all, runs its experts on those that chose them, and the ranks' parts are
  added on the way back. A rank receives and sends (R - 1) t h numbers each way, whatever the routing.
- ``alltoall``: a token travels once per chosen expert that is elsewhere, about t k h (R - 1) / R each way where the
  load is even: less as soon as k < R. Ranks tell each other the counts first.

Gates travel with the tokens, since an expert applies them in its middle. A rank whose experts nobody chose runs them on
no rows: every rank runs the same modules and collectives in the same order, whatever the routing.

Legend: t tokens of this rank, k experts per token, h hidden, e experts of the layer, n rows at this rank's experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    all_to_all,
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptoughts.models.grouped_experts import Assignment, assign

Experts = Callable[[Tensor, Tensor, Assignment], Tensor]
"""``GroupedExperts``: rows [n, h], fp32 gates [n, 1] and which expert each row belongs to -> [n, h]."""


def dispatch_all_gather(
    x: Tensor, gates: Tensor, chosen: Tensor, experts: Experts, num_local: int, group: dist.ProcessGroup
) -> Tensor:
    """Weighted sum of each token's experts, [t, h].

    Args:
        x: [t, h], the same t on every rank.
        gates: fp32 [t, k].
        chosen: int64 [t, k], experts of the whole layer.
        experts: Those of this rank.
        num_local: How many these are.
        group: Expert-parallel ranks.

    Collective: ``group``, forward and backward.
    """
    k = chosen.size(1)
    x, gates = (gather_from_sequence_parallel_region(part, group=group) for part in (x, gates))
    own = gather_from_sequence_parallel_region(chosen, group=group).view(-1) - group.rank() * num_local
    pairs = ((own >= 0) & (own < num_local)).nonzero().view(-1)
    tokens = pairs // k
    rows = _Taken.apply(x, tokens)
    row_gates = gates.view(-1, 1).index_select(0, pairs)
    output = experts(rows, row_gates, assign(own.index_select(0, pairs).unsqueeze(1), num_local))
    return reduce_scatter_to_sequence_parallel_region(_Summed.apply(output, tokens, x.size(0)), group=group)


def dispatch_all_to_all(
    x: Tensor, gates: Tensor, chosen: Tensor, experts: Experts, num_local: int, group: dist.ProcessGroup
) -> Tensor:
    """Weighted sum of each token's experts, [t, h]; arguments as in :func:`dispatch_all_gather`, t may differ.

    Collective: ``group``, forward and backward.
    """
    num_experts = num_local * group.size()
    sent = assign(chosen, num_experts)
    counts = torch.tensor(sent.counts, device=x.device)
    # [rank that a row comes from, local expert]
    received = torch.empty_like(counts)
    dist.all_to_all_single(received, counts, group=group)
    out_splits = [sum(sent.counts[first : first + num_local]) for first in range(0, num_experts, num_local)]
    in_splits = received.view(-1, num_local).sum(1).tolist()
    tokens = sent.order // chosen.size(1)
    rows = all_to_all(group, _Taken.apply(x, tokens), in_splits, out_splits)
    row_gates = all_to_all(group, gates.reshape(-1, 1).index_select(0, sent.order), in_splits, out_splits)
    own = (
        torch.arange(num_local, device=x.device)
        .repeat(group.size())
        .repeat_interleave(received, output_size=sum(in_splits))
    )
    output = experts(rows, row_gates, assign(own.unsqueeze(1), num_local))
    return _Summed.apply(all_to_all(group, output, out_splits, in_splits), tokens, x.size(0))


Dispatch = Callable[[Tensor, Tensor, Tensor, Experts, int, dist.ProcessGroup], Tensor]
DISPATCHERS: Mapping[str, Dispatch] = {"allgather": dispatch_all_gather, "alltoall": dispatch_all_to_all}
"""By megatron-core's name (``moe_token_dispatcher_type``)."""


def _sum_rows(rows: Tensor, tokens: Tensor, count: int) -> Tensor:
    """Add the rows of each token, in fp32: [n, h] to [count, h]."""
    total = torch.zeros(count, rows.size(1), dtype=torch.float32, device=rows.device)
    return total.index_add_(0, tokens, rows.float()).to(rows.dtype)


class _Taken(torch.autograd.Function):
    """Row of each entry of ``tokens``: [t, h] to [n, h]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.count = x.size(0)
        return x.index_select(0, tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (tokens,) = ctx.saved_tensors
        return _sum_rows(grad, tokens, ctx.count), None


class _Summed(torch.autograd.Function):
    """The inverse way: sum of each token's rows, [n, h] to [t, h]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, tokens: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(tokens)
        return _sum_rows(rows, tokens, count)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (tokens,) = ctx.saved_tensors
        return grad.index_select(0, tokens), None, None

"""Context parallelism: which part of a sequence is this rank's, and what ranks send each other.

All of the model works on a rank's own tokens but attention, where queries meet the keys of other ranks. Two ways:

- Ulysses (DeepSpeed-Ulysses, arXiv:2309.14509, section 3): rank r of c has tokens r s/c ... (r + 1) s/c - 1. Before
  attention each rank gives away the other ranks' heads of its tokens and gets the other tokens of its own heads, after
  it the other way round. An exchange sends (c - 1)/c of what a rank has, whatever c.
- Ring (arXiv:2310.01889): keys and values go round. Of 2 c pieces rank r has the r-th and the r-th last, so that under
  a causal mask all ranks have equally much to do (zig-zag).

Legend: s sequence, c context-parallel ranks, b microbatch, n heads, d head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptoughts.parallel import groups


def own_part(x: Tensor, *, is_zigzag: bool = False) -> Tensor:
    """This rank's tokens of [b, s, ...]: [b, s/c, ...], a view but where it is two pieces. Collective: none."""
    size, rank = groups.context_parallel_size(), groups.context_parallel_rank()
    if size == 1:
        return x
    if not is_zigzag:
        return x.chunk(size, dim=1)[rank]
    pieces = x.chunk(2 * size, dim=1)
    return torch.cat((pieces[rank], pieces[-1 - rank]), dim=1)


def places_of(rank: int, size: int, length: int, device: torch.device) -> Tensor:
    """Where the tokens of a rank's two pieces are in the whole sequence, int64 [length / size]. Collective: none."""
    pieces = torch.arange(length, device=device).chunk(2 * size)
    return torch.cat((pieces[rank], pieces[-1 - rank]))


def start_ring_step(x: Tensor, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """Begin to send ``x`` to the next rank; what is returned waits for the one before's, of the same shape.

    Collective: ``group``, each rank as often as the others.
    """
    ranks = dist.get_process_group_ranks(group)
    after, before = ranks[(group.rank() + 1) % group.size()], ranks[group.rank() - 1]
    x = x.contiguous()
    received = torch.empty_like(x)
    works = dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, x, after, group), dist.P2POp(dist.irecv, received, before, group)]
    )

    def receive() -> Tensor:
        for work in works:
            work.wait()
        return received

    return receive


def tokens_to_heads(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    """All tokens of some heads for some tokens of all heads; one exchange for all tensors.

    Args:
        tensors: Each [s/c, b, n, d], any strides, n a multiple of c; n and d may differ between them.
        group: Context-parallel ranks.

    Returns:
        Each [s, b, n/c, d], of rank r heads r n/c ... (r + 1) n/c - 1: views of one buffer, the last dimension dense.

    Collective: ``group``, forward and backward.
    """
    return _TokensToHeads.apply(group, *tensors)


def heads_to_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Some tokens of all heads for all tokens of some heads: [s, b, n/c d] to [s/c, b, n d].

    Collective: ``group``, forward and backward.
    """
    return _HeadsToTokens.apply(group, x)


class _TokensToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        received = _exchange([_split_heads(x, group.size()) for x in tensors], group)
        return tuple(x.flatten(0, 1) for x in received)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        received = _exchange([grad.unflatten(0, (ctx.group.size(), -1)) for grad in grads], ctx.group)
        return None, *(_join_heads(x) for x in received)


class _HeadsToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, x: Tensor) -> Tensor:
        ctx.group = group
        (received,) = _exchange([x.unflatten(0, (group.size(), -1)).unsqueeze(3)], group)
        return _join_heads(received).flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        size = ctx.group.size()
        (received,) = _exchange([_split_heads(grad.unflatten(2, (size, -1)), size)], ctx.group)
        return None, received.flatten(0, 1).flatten(2)


def _split_heads(x: Tensor, size: int) -> Tensor:
    """[s/c, b, n, d] to [c, s/c, b, n/c, d], a view."""
    return x.unflatten(2, (size, -1)).permute(2, 0, 1, 3, 4)


def _join_heads(x: Tensor) -> Tensor:
    """The inverse of :func:`_split_heads`, contiguous."""
    return x.permute(1, 2, 0, 3, 4).flatten(2, 3)


def _exchange(parts: Sequence[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    """Part i of the first dimension goes to rank i; what comes back has rank i's at i. Collective: ``group``.

    Args:
        parts: Each [c, s/c, b, n, d].
        group: Context-parallel ranks.

    Returns:
        Each of the same shape, views of one buffer.
    """
    widths = [part.size(3) * part.size(4) for part in parts]
    if len(parts) == 1 and parts[0].is_contiguous():
        sent = parts[0].flatten(3)
    else:
        sent = parts[0].new_empty(*parts[0].shape[:3], sum(widths))
        for part, columns in zip(parts, sent.split(widths, dim=-1), strict=True):
            columns.unflatten(-1, part.shape[3:]).copy_(part)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    columns_of = received.split(widths, dim=-1)
    return [columns.unflatten(-1, part.shape[3:]) for part, columns in zip(parts, columns_of, strict=True)]

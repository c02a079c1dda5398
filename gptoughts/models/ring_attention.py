"""Core attention over context-parallel ranks that hand keys and values round, with any number of heads.

Ring attention (Liu et al., arXiv:2310.01889): a rank keeps its queries; in step i it has the keys and values of rank
r - i and attends to them, while they go on to rank r + 1. Parts o_j with log-sum-exp l_j are merged to

    l = log sum_j exp l_j,    o = sum_j exp(l_j - l) o_j.

Backward goes round once more: with l and delta = do . o of the whole, each part of the gradient stands by itself
(``models.block_attention``); those of keys and values travel along with them and are home after c steps.

Of 2 c pieces of a sequence rank r has the r-th and the r-th last (``parallel.context``). So under a causal mask each
step but the first needs none: of an earlier rank's keys all queries see the first half, of a later rank's the second
half of the queries sees all. Every rank has equally much to do.

Legend: s tokens of this rank, S of the whole sequence, c context-parallel ranks, b microbatch, np heads and ng
key/value heads on this tensor-parallel rank, hn head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptoughts.models import block_attention
from gptoughts.models.core_attention import CAUSAL_TYPES, SDPACoreAttention
from gptoughts.parallel import groups
from gptoughts.parallel.context import places_of, start_ring_step


class RingAttention(SDPACoreAttention):
    """Takes and gives this rank's tokens; arguments as in :class:`SDPACoreAttention`.

    Raises:
        ValueError: attention dropout.
    """

    def __init__(self, config: TransformerConfig, *args: Any, cp_comm_type: str | None = None, **options: Any) -> None:
        config = copy(config)
        config.context_parallel_size = 1
        super().__init__(config, *args, **options)
        if self.dropout > 0.0:
            raise ValueError(f"attention_dropout={self.dropout}: ring attention draws no random numbers; must be 0")

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """[s, b, np, hn], [s, b, ng, hn] and [s, b, ng, hn_v] to [s, b, np hn_v]; a mask is the whole's, [.., S].

        Raises:
            ValueError: packed sequences, a bias, or a mask that is not about keys alone.

        Collective: context-parallel group, forward and backward.
        """
        if packed_seq_params is not None or attention_bias is not None:
            raise ValueError("ring attention takes neither packed sequences nor a bias; context_method=ulysses does")
        if attention_mask is not None and attention_mask.shape[1:3] != (1, 1):
            raise ValueError(f"ring attention takes masks of keys, [b, 1, 1, s], not {tuple(attention_mask.shape)}")
        ring = _Ring(
            groups.context_parallel_group(),
            self.softmax_scale,
            (attn_mask_type or self.attn_mask_type) in CAUSAL_TYPES,
            None if attention_mask is None else attention_mask[:, 0, 0],
        )
        return _RingAttention.apply(query, key, value, ring)


@dataclass(frozen=True)
class _Block:
    """Which of this rank's queries look at which of another rank's keys."""

    queries: slice
    keys: slice
    is_causal: bool
    forbidden: Tensor | None
    """bool [1 or b, keys]: those that nobody looks at."""


@dataclass(frozen=True)
class _Ring:
    """What all steps have in common."""

    group: dist.ProcessGroup
    scale: float
    is_causal: bool
    forbidden: Tensor | None
    """bool [1 or b, S]."""

    def blocks(self, length: int) -> Iterator[_Block]:
        """Step by step, with ``length`` queries and as many keys."""
        rank, size = self.group.rank(), self.group.size()
        for step in range(size):
            source = (rank - step) % size
            queries, keys = slice(0, length), slice(0, length)
            if self.is_causal and source < rank:
                keys = slice(0, length // 2)
            elif self.is_causal and source > rank:
                queries = slice(length // 2, length)
            forbidden = None
            if self.forbidden is not None:
                places = places_of(source, size, self.forbidden.size(1), self.forbidden.device)
                forbidden = self.forbidden[:, places[keys]]
            yield _Block(queries, keys, self.is_causal and source == rank, forbidden)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, ring: _Ring) -> Tensor:
        s, b, np, _ = query.shape
        own = here = _joined(key, value)
        out = torch.zeros(b, np, s, value.size(-1), dtype=torch.float32, device=query.device)
        lse = torch.full((b, np, s), float("-inf"), dtype=torch.float32, device=query.device)
        for step, block in enumerate(ring.blocks(s), start=1):
            receive = start_ring_step(here, ring.group) if step < ring.group.size() else None
            keys, values = _parted(here[block.keys], key.shape)
            part, part_lse = block_attention.attend(
                query[block.queries], keys, values, block.forbidden, scale=ring.scale, is_causal=block.is_causal
            )
            _merge(out[:, :, block.queries], lse[:, :, block.queries], part, part_lse)
            here = receive() if receive is not None else here
        result = out.to(query.dtype).permute(2, 0, 1, 3).reshape(s, b, -1)
        ctx.save_for_backward(query, own, result, lse)
        ctx.ring, ctx.key_shape = ring, key.shape
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, here, result, lse = ctx.saved_tensors
        ring: _Ring = ctx.ring
        s, np = query.size(0), query.size(2)
        grad, result = (x.unflatten(2, (np, -1)).permute(1, 2, 0, 3) for x in (grad, result))
        delta = torch.linalg.vecdot(result.float(), grad.float())
        grad_query = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
        travelling = torch.zeros(here.shape, dtype=torch.float32, device=here.device)
        for step, block in enumerate(ring.blocks(s), start=1):
            receive = start_ring_step(here, ring.group) if step < ring.group.size() else None
            keys, values = _parted(here[block.keys], ctx.key_shape)
            rows = block.queries
            of_query, of_key, of_value = block_attention.gradients(
                query[rows], keys, values, grad[:, :, rows], lse[:, :, rows], delta[:, :, rows], block.forbidden,
                scale=ring.scale, is_causal=block.is_causal,
            )  # fmt: skip
            grad_query[rows] += of_query
            travelling[block.keys] += _joined(of_key, of_value)
            here = receive() if receive is not None else here
            # Follows its keys; after the last step it is with their owner.
            travelling = start_ring_step(travelling, ring.group)()
        grad_key, grad_value = (x.to(query.dtype) for x in _parted(travelling, ctx.key_shape))
        return grad_query.to(query.dtype), grad_key, grad_value, None


def _joined(key: Tensor, value: Tensor) -> Tensor:
    """[s, b, ng (hn + hn_v)], one message."""
    return torch.cat((key.flatten(2), value.flatten(2)), dim=-1)


def _parted(joined: Tensor, key_shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Keys and values, views."""
    _, _, ng, hn = key_shape
    key, value = joined.split([ng * hn, joined.size(-1) - ng * hn], dim=-1)
    return key.unflatten(-1, (ng, hn)), value.unflatten(-1, (ng, -1))


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Put a part into what is there, in place: [b, np, s, hn_v] and [b, np, s], fp32."""
    total = torch.logaddexp(lse, part_lse)
    seen = total.masked_fill(total == float("-inf"), 0.0)  # nothing yet: weights of 0, not of 0/0
    out.mul_((lse - seen).exp().unsqueeze(-1)).add_(part * (part_lse - seen).exp().unsqueeze(-1))
    lse.copy_(total)

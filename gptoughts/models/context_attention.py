"""Core attention over context-parallel ranks: any backend's with all tokens of some of the heads, or a ring.

Whatever a core attention can do with whole sequences it can do inside the exchange: any mask, packed sequences, heads
of unequal sizes, its own kernels. Where there are fewer key and value heads than ranks, or no multiple of them, each is
sent as often as it takes: lcm(ng, c) of them, a divisor of np because both are.

Legend: s sequence, c context-parallel ranks, b microbatch, np heads and ng key/value heads on this tensor-parallel
rank, hn head dim, t packed tokens.
"""

from __future__ import annotations

import math
from copy import copy
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from gptoughts.models.core_attention import SDPACoreAttention
from gptoughts.models.ring_attention import RingAttention
from gptoughts.parallel import groups
from gptoughts.parallel.context import heads_to_tokens, tokens_to_heads


def key_value_heads(groups_on_rank: int, size: int) -> int:
    """How many key and value heads the ranks exchange, of ``groups_on_rank`` that there are."""
    return math.lcm(groups_on_rank, size)


def is_zigzag(config: TransformerConfig) -> bool:
    """Whether a rank's tokens are two pieces of a sequence, for a ring (``parallel.context``)."""
    return config.cp_comm_type == "p2p"


def context_parallel(core_attention: type[nn.Module], config: TransformerConfig) -> type[nn.Module]:
    """The class to put into a layer spec: ``core_attention`` itself, with the exchange around it, or a ring.

    Args:
        core_attention: A backend's; within the exchange it is given a configuration without context parallelism and its
            part of the heads. Transformer Engine's is a ring by itself, of the same pieces (``is_zigzag``).
        config: megatron-core's configuration.
    """
    if config.context_parallel_size == 1:
        return core_attention
    if is_zigzag(config):
        return RingAttention if core_attention is SDPACoreAttention else core_attention

    class ContextParallelAttention(core_attention):  # type: ignore[misc,valid-type]
        def __init__(self, config: TransformerConfig, *args: Any, **options: Any) -> None:
            super().__init__(_config_of_heads(config), *args, **options)

        def forward(
            self,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Tensor | None,
            *,
            attention_bias: Tensor | None = None,
            **options: Any,
        ) -> Tensor:
            """As the core attention, but for the length: [s/c, b, np, hn] to [s/c, b, np hn]; packed without b.

            Masks are those of the whole sequence, [.., s, s].

            Collective: context-parallel group, forward and backward.
            """
            group = groups.context_parallel_group()
            is_packed = query.dim() == 3
            if is_packed:
                query, key, value = (x.unsqueeze(1) for x in (query, key, value))
            copies = key_value_heads(key.size(2), group.size()) // key.size(2)
            if copies > 1:
                key, value = (x.repeat_interleave(copies, dim=2) for x in (key, value))
            heads: Any = tokens_to_heads((query, key, value), group)
            if is_packed:
                heads = [x.squeeze(1) for x in heads]
            if attention_bias is not None:
                options["attention_bias"] = _own_heads(attention_bias)
            mask = None if attention_mask is None else _own_heads(attention_mask)
            out = super().forward(*heads, mask, **options)
            return heads_to_tokens(out.unsqueeze(1), group).squeeze(1) if is_packed else heads_to_tokens(out, group)

    return ContextParallelAttention


def _config_of_heads(config: TransformerConfig) -> TransformerConfig:
    """What an attention is told that sees whole sequences of its part of the heads."""
    size, tensor = config.context_parallel_size, config.tensor_model_parallel_size
    assert config.num_query_groups is not None, "megatron-core fills it in"
    found = copy(config)
    found.context_parallel_size = 1
    found.num_attention_heads = config.num_attention_heads // size
    found.num_query_groups = key_value_heads(config.num_query_groups // tensor, size) // size * tensor
    return found


def _own_heads(mask: Tensor) -> Tensor:
    """This rank's heads of [b, 1 or np, s, s]."""
    is_same_for_all = mask.size(1) == 1
    return mask if is_same_for_all else mask.chunk(groups.context_parallel_size(), 1)[groups.context_parallel_rank()]

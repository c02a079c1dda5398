"""Core attention on scaled_dot_product_attention, with the face that megatron-core's specs expect.

softmax(q k^T * scale + mask) v, heads grouped where there are fewer key than query heads (Ainslie et al.,
arXiv:2305.13245). Causal and bidirectional; an arbitrary mask; packed sequences as a block-diagonal mask over the pack.

Legend: s sequence, b microbatch, np heads on this rank, ng key/value heads on this rank, hn head dim, t packed tokens.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from gptoughts.models import tiled_attention

CAUSAL_TYPES = frozenset({AttnMaskType.causal, AttnMaskType.padding_causal})


class SDPACoreAttention(MegatronModule):
    """Replaces megatron-core's DotProductAttention, which materialises [b, np, s, s] and knows neither MLA nor packing.

    Args:
        config: megatron-core's configuration.
        layer_number: From 1 over the whole model (kept for megatron-core).
        attn_mask_type: Causal types look back only; ``no_mask`` and ``padding`` look both ways.
        attention_type: "self".
        attention_dropout: Overrides the configuration's.
        softmax_scale: Overrides 1/sqrt(k_channels).
        k_channels: Size of a query/key head; unset: kv_channels.
        v_channels: Size of a value head; unset: kv_channels.
        cp_comm_type: megatron-core's choice for context parallelism; must be unset (``models.context_attention``).
        pg_collection: Process groups, unused: heads are already this rank's.

    Raises:
        ValueError: context parallelism or sliding windows are asked for.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **upstream_options: Any,
    ) -> None:
        super().__init__(config=config)
        if config.context_parallel_size != 1 or cp_comm_type not in (None, "p2p"):
            raise ValueError(
                f"context_parallel_size={config.context_parallel_size}: this class attends within what it is given; "
                "models.context_attention goes around it; must be 1"
            )
        if config.window_size is not None:
            raise ValueError(f"window_size={config.window_size}: sliding windows are not supported; must be unset")
        given = {name: value for name, value in upstream_options.items() if value is not None and name != "name"}
        if given:
            raise ValueError(f"core attention was given {given}; not supported")
        self.layer_number = layer_number
        self.attn_mask_type = attn_mask_type
        self.attention_type = attention_type
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.k_channels = k_channels or config.kv_channels
        self.v_channels = v_channels or config.kv_channels
        self.softmax_scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(self.k_channels)

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
        """Attend.

        Args:
            query: [s, b, np, hn], or packed [t, np, hn].
            key: [s, b, ng, hn], or packed [t, ng, hn].
            value: [s, b, ng, hn_v], or packed [t, ng, hn_v].
            attention_mask: Boolean, True where a query must NOT look at a key (megatron-core's sense), broadcastable
                to [b, np, s, s]; joined with the mask of ``attn_mask_type``.
            attn_mask_type: Overrides the constructor's.
            attention_bias: Added to the scaled scores, broadcastable to [b, np, s, s].
            packed_seq_params: Lengths of the sequences in the pack; each attends to itself only.

        Returns:
            [s, b, np * hn_v]; packed [t, np * hn_v].
        """
        is_causal = (attn_mask_type or self.attn_mask_type) in CAUSAL_TYPES
        is_packed = query.dim() == 3
        if is_packed:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        if packed_seq_params is not None:
            attention_mask = _join_forbidden(attention_mask, _other_sequence(packed_seq_params, query.device))
        s, b, np, _ = query.shape
        mask, is_causal = _sdpa_mask(attention_mask, attention_bias, is_causal, s, key.size(0), query)
        out = self._attend(query, key, value, mask, is_causal)
        out = out.permute(2, 0, 1, 3).reshape(s, b, np * value.size(-1))
        return out.squeeze(1) if is_packed else out

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        if mask is None and dropout == 0.0 and tiled_attention.supports(query, key):
            return tiled_attention.tiled_attention(query, key, value, scale=self.softmax_scale, is_causal=is_causal)
        heads = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        # Probabilities belong to this rank's heads: their dropout differs between tensor-parallel ranks.
        with get_cuda_rng_tracker().fork() if dropout > 0.0 else nullcontext():
            return attend_heads(*heads, mask=mask, is_causal=is_causal, scale=self.softmax_scale, dropout=dropout)


def attend_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(scale q k^T + mask) v.

    Args:
        query: [b, np, s, hn].
        key: [b, ng, keys, hn].
        value: [b, ng, keys, hn_v].
        mask: bool (True = look) or float to add, broadcastable to [b, np, s, keys].
        is_causal: Each position attends to itself and what is before it; keys = s.
        scale: Factor of the scores.
        dropout: Fraction of the probabilities to drop.

    Returns:
        [b, np, s, hn_v].
    """
    v_channels = value.size(-1)
    if v_channels != query.size(-1):
        # The fused CPU kernel wants equal head sizes (the fallback is 1.4 times slower, keeps [s, s] scores, and
        # refuses wider values); zero columns of v give zero columns of the result, those of q and k no score.
        width = max(v_channels, query.size(-1))
        query, key, value = (F.pad(x, (0, width - x.size(-1))) for x in (query, key, value))
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=key.size(1) != query.size(1),
    )
    return out[..., :v_channels]


def _join_forbidden(first: Tensor | None, second: Tensor) -> Tensor:
    return second if first is None else first | second


def _other_sequence(packed: PackedSeqParams, device: torch.device) -> Tensor:
    """[1, 1, t, t], True where query and key belong to different sequences of the pack."""
    boundaries = packed.cu_seqlens_q_padded if packed.cu_seqlens_q_padded is not None else packed.cu_seqlens_q
    boundaries = boundaries.to(device=device, dtype=torch.int64)
    owner = torch.repeat_interleave(torch.arange(boundaries.numel() - 1, device=device), boundaries.diff())
    return (owner[:, None] != owner[None, :])[None, None]


def _sdpa_mask(
    forbidden: Tensor | None, bias: Tensor | None, is_causal: bool, queries: int, keys: int, like: Tensor
) -> tuple[Tensor | None, bool]:
    """What scaled_dot_product_attention gets: a mask (True = look, or a float to add), or none and its causal flag.

    With fewer queries than keys (a cache) the queries are the last positions.
    """
    if forbidden is None and bias is None and (not is_causal or queries == keys):
        return None, is_causal
    if is_causal and queries > 1:
        future = torch.ones(queries, keys, dtype=torch.bool, device=like.device).triu(1 + keys - queries)
        forbidden = _join_forbidden(forbidden, future)
    if bias is None:
        return None if forbidden is None else ~forbidden, False
    bias = bias.to(like.dtype)
    return (bias if forbidden is None else bias.masked_fill(forbidden, float("-inf"))), False

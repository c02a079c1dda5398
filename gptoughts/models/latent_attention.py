"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1), its training path ours.

With a cache it keeps RMS(c) and rope(k_r), which all heads share, and absorbs the projections of keys and values into
those of queries and output where the new tokens are few (section 2.1.2 there):

    q' = q_n W_uk,    score = (q' . RMS(c) + rope(q_r) . rope(k_r)) * scale,    o = (softmax(score) RMS(c)) W_uv^T.

Legend: s sequence, b microbatch, h hidden, np heads on this rank, c latent rank (q_lora_rank or kv_lora_rank),
d rotary size, p places of a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention as UpstreamMLASelfAttention
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from torch import Tensor

from gptoughts.models.attention import CoreCall, refuse_options
from gptoughts.models.core_attention import attend_heads
from gptoughts.models.recompute import RemadeOutputs, run_again
from gptoughts.models.rotary import rotate


@contextmanager
def _taken_for_column_parallel(linear: Any) -> Iterator[None]:
    """Inside, megatron-core's latent attention takes a class of ours for the column-parallel layer that it is.

    It tells the down projections' classes apart by name, so that it knows no subclass
    (transformer/multi_latent_attention.py:410, 0.16.1; line 527 of 0.19.2).
    """
    upstream = multi_latent_attention.ColumnParallelLinear
    if isinstance(linear, type) and issubclass(linear, upstream):
        multi_latent_attention.ColumnParallelLinear = linear  # type: ignore[misc]
    try:
        yield
    finally:
        multi_latent_attention.ColumnParallelLinear = upstream  # type: ignore[misc]


class MLASelfAttention(CoreCall, UpstreamMLASelfAttention):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1), expanded but for decoding.

    q = W_qb RMS(W_qa x) and [c | k_r] = W_kva x; per head, k = [W_uk RMS(c) | rope(k_r)], v = W_uv RMS(c).
    """

    def __init__(self, config: Any, submodules: MLASelfAttentionSubmodules, *args: Any, **kwargs: Any) -> None:
        with _taken_for_column_parallel(submodules.linear_kv_down_proj):
            super().__init__(config, submodules, *args, **kwargs)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **upstream_options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend and project; arguments and result as in :meth:`SelfAttention.forward`, tables of the rotary size.

        Collective: tensor-parallel group.
        """
        refuse_options(upstream_options)
        assert rotary_pos_emb is not None, "latent attention has no position but the rotary part's"
        query_latent = self._query_latent(hidden_states)
        latent, shared = self._latent(hidden_states)
        if self.cache is not None:
            refuse_options({"attention_mask": attention_mask, "packed_seq_params": packed_seq_params})
            turned = rotate(shared.unsqueeze(2), rotary_pos_emb)
            (kept,) = self.cache.store(torch.cat((self.kv_layernorm(latent).unsqueeze(2), turned), dim=-1))
            query = self._query(self._projected_query(query_latent), rotary_pos_emb)
            return self.linear_proj(self._attend_latents(query, kept.squeeze(1)))

        def core(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return self.core(query, key, value, attention_mask, packed_seq_params)

        return self.linear_proj(self._attend(core, query_latent, latent, shared, rotary_pos_emb))

    def _attend(
        self, core: Callable[..., Tensor], query_latent: Tensor, latent: Tensor, shared: Tensor, table: Tensor
    ) -> Tensor:
        """``core`` of the heads that the latents give, with the parts recomputed that are to be."""

        def attend(query_latent: Tensor, latent: Tensor, shared: Tensor, table: Tensor) -> Tensor:
            return attend_to_projected(
                self._projected_query(query_latent), self._projected_key_value(latent), shared, table
            )

        def attend_to_projected(query: Tensor, expanded: Tensor, shared: Tensor, table: Tensor) -> Tensor:
            return core(self._query(query, table), *self._key_value(expanded, rotate(shared.unsqueeze(2), table)))

        has_core, has_projections = self.is_recomputed("core_attn"), self.is_recomputed("mla_up_proj")
        if has_core and has_projections:
            return run_again(self.config, attend, query_latent, latent, shared, table)
        if has_core:
            projected = self._projected_query(query_latent), self._projected_key_value(latent)
            return run_again(self.config, attend_to_projected, *projected, shared, table)
        if not (has_projections and torch.is_grad_enabled()):
            return attend(query_latent, latent, shared, table)
        return self._attend_to_remade(core, query_latent, latent, shared, table)

    def _attend_to_remade(
        self, core: Callable[..., Tensor], query_latent: Tensor, latent: Tensor, shared: Tensor, table: Tensor
    ) -> Tensor:
        """``core``, which keeps neither keys and values nor queries that have a latent."""

        def query() -> Tensor:
            return self._query(self._projected_query(query_latent), table)

        def key_value() -> tuple[Tensor, Tensor]:
            return self._key_value(self._projected_key_value(latent), rotate(shared.unsqueeze(2), table))

        heads = (query(), *key_value())
        if self.config.q_lora_rank is None:
            # Queries without a latent are made of the hidden states, which a remade norm does not keep.
            remade = RemadeOutputs(heads[1:], key_value)
        else:
            remade = RemadeOutputs(heads, lambda: (query(), *key_value()))
        with remade.kept_by_nobody():
            return core(*heads)

    def kept_shapes(self) -> tuple[tuple[int, int], ...]:
        """The latent and the turned rotary key, which all heads share (see ``kv_cache``)."""
        return ((1, self.config.kv_lora_rank + self.config.qk_pos_emb_head_dim),)

    def _attend_latents(self, query: Tensor, kept: Tensor) -> Tensor:
        """[s, b, np, qk_head_dim + d] over [b, p, c + d]; returns [s, b, np * v_head_dim]."""
        assert self.cache is not None
        window = self.cache.window
        if self.is_absorbed(query.size(0)) and not window.is_causal:
            return self.absorbed_core(query, kept, window.is_visible)
        latent, turned = kept.transpose(0, 1).split([self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim], -1)
        key, value = self._expand(latent, turned.unsqueeze(2))
        return self.cached_core(query, key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3), self.softmax_scale)

    def is_absorbed(self, count: int) -> bool:
        """Whether ``count`` new tokens cost less when they look at latents than at expanded keys and values.

        Per kept token and head, expanding takes c (dn + dv) multiply-adds once, and every new token then
        dn + d + dv of them instead of 2 c + d.
        """
        config = self.config
        rank, expanded = config.kv_lora_rank, config.qk_head_dim + config.v_head_dim
        return count == 1 or count * (2 * rank - expanded) < rank * expanded

    def absorbed_core(self, query: Tensor, kept: Tensor, is_visible: Tensor | None) -> Tensor:
        """Attention over latents, with absorbed projections.

        Args:
            query: [s, b, np, qk_head_dim + d], its last d columns turned.
            kept: [b, p, c + d].
            is_visible: bool, broadcastable to [b, np, s, p], True where a query looks at a place; unset: everywhere.

        Returns:
            [s, b, np * v_head_dim].
        """
        s, b, np, _ = query.shape
        rank, head_dim = self.config.kv_lora_rank, self.config.qk_head_dim
        key_up, value_up = self.linear_kv_up_proj.weight.view(np, -1, rank).split(
            [head_dim, self.config.v_head_dim], dim=1
        )
        heads = query.permute(2, 0, 1, 3).reshape(np, s * b, -1)
        absorbed = torch.cat((heads[..., :head_dim] @ key_up, heads[..., head_dim:]), dim=-1)
        rows = absorbed.view(np, s, b, -1).permute(2, 0, 1, 3).reshape(b, np * s, -1)
        if is_visible is not None and s > 1:
            is_visible = is_visible.expand(b, 1, s, -1).repeat(1, 1, np, 1)
        # Values with the rotary columns still on: so the kernel for equal widths runs, and nothing is copied.
        rows, kept = rows.unsqueeze(1), kept.unsqueeze(1)
        found = attend_heads(rows, kept, kept, mask=is_visible, is_causal=False, scale=self.softmax_scale)
        found = found[..., :rank]
        found = found.view(b, np, s, rank).permute(1, 2, 0, 3).reshape(np, s * b, rank)
        return (found @ value_up.transpose(1, 2)).view(np, s, b, -1).permute(1, 2, 0, 3).reshape(s, b, -1)

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, Any]:
        """The spec as it is, for megatron-core 0.19.

        With latent norms it takes a norm fused into linear_q_proj for granted where queries have no latent, and that
        class is Transformer Engine's (transformer/mla_qk_norm_config.py:152, 0.19.2).
        """
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in names}

    def _query_latent(self, hidden_states: Tensor) -> Tensor:
        """[s, b, c] of this rank's part of the sequence; the hidden states where queries have no latent."""
        if self.config.q_lora_rank is None:
            return hidden_states
        latent, _ = self.linear_q_down_proj(hidden_states)
        return self._whole_latent(latent, self.config.q_lora_rank)

    def _projected_query(self, latent: Tensor) -> Tensor:
        """[s, b, np * (qk_head_dim + d)] of what :meth:`_query_latent` gives."""
        if self.config.q_lora_rank is None:
            return self.linear_q_proj(latent)[0]
        return self.linear_q_up_proj(self.q_layernorm(latent))[0]

    def _query(self, projected: Tensor, table: Tensor) -> Tensor:
        """[s, b, np, qk_head_dim + d], turned."""
        heads = projected.view(*projected.shape[:2], self.num_attention_heads_per_partition, self.q_head_dim)
        plain, turned = heads.split([self.config.qk_head_dim, self.config.qk_pos_emb_head_dim], dim=-1)
        return torch.cat((plain, rotate(turned, table)), dim=-1)

    def _latent(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """[s, b, h] to c, [s, b, c] (under sequence parallelism of this rank's part), and k_r, [s, b, d]."""
        config = self.config
        sizes = [config.kv_lora_rank, config.qk_pos_emb_head_dim]
        combined, _ = self.linear_kv_down_proj(hidden_states)
        is_divided = combined.size(-1) != sum(sizes)  # a column-parallel projection
        if is_divided:
            combined = gather_from_tensor_model_parallel_region(combined)
        latent, shared = combined.split(sizes, dim=-1)
        if is_divided and config.sequence_parallel:
            latent = scatter_to_sequence_parallel_region(latent)
        if config.sequence_parallel and not is_divided:
            shared = gather_from_sequence_parallel_region(shared, group=self.tp_group)
        else:
            # Each rank's gradient of the shared rotary key comes from its own heads: sum it. megatron-core does not
            # (transformer/multi_latent_attention.py:585, 0.16.1), so its gradients with tensor parallelism are off.
            shared = copy_to_tensor_model_parallel_region(shared)
        return latent, shared

    def _projected_key_value(self, latent: Tensor) -> Tensor:
        """[s, b, np * (qk_head_dim + v_head_dim)] of c."""
        return self.linear_kv_up_proj(self.kv_layernorm(latent))[0]

    def _expand(self, latent: Tensor, turned: Tensor) -> tuple[Tensor, Tensor]:
        """RMS(c) and turned rotary keys [s, b, 1, d] to [s, b, np, qk_head_dim + d] and [s, b, np, v_head_dim]."""
        return self._key_value(self.linear_kv_up_proj(latent)[0], turned)

    def _key_value(self, projected: Tensor, turned: Tensor) -> tuple[Tensor, Tensor]:
        """What :meth:`_projected_key_value` gives, and turned rotary keys: the same."""
        config, num_heads = self.config, self.num_attention_heads_per_partition
        heads = projected.view(*projected.shape[:2], num_heads, config.qk_head_dim + config.v_head_dim)
        plain, value = heads.split([config.qk_head_dim, config.v_head_dim], dim=-1)
        return torch.cat((plain, turned.expand(-1, -1, num_heads, -1)), dim=-1), value

    def _whole_latent(self, latent: Tensor, size: int) -> Tensor:
        """The whole latent of this rank's part of the sequence, from a column-parallel or a replicated projection."""
        if latent.size(-1) == size:
            return latent
        latent = gather_from_tensor_model_parallel_region(latent)
        return scatter_to_sequence_parallel_region(latent) if self.config.sequence_parallel else latent

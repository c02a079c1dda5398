"""Self-attention layers whose training path is ours; projections, norms and the core come from the layer spec.

megatron-core's forward is written around its inference engine and CUDA kernels: on a CPU it copies query, key and value
several times and recomputes cos and sin in every layer. Here the heads stay views of the projection until they are
turned. ``rotary_pos_emb`` is the table of ``models.rotary``, made once per forward by the language model.

With a cache (``models.kv_cache``) the layers see new tokens only and look at what is kept of the others. Latent
attention keeps RMS(c) and rope(k_r), which all heads share, and absorbs the projections of keys and values into those
of queries and output where the new tokens are few (DeepSeek-V2, arXiv:2405.04434, section 2.1.2):

    q' = q_n W_uk,    score = (q' . RMS(c) + rope(q_r) . rope(k_r)) * scale,    o = (softmax(score) RMS(c)) W_uv^T.

Legend: s sequence, b microbatch, h hidden, np heads on this rank, ng key/value heads on this rank, hn head dim,
c latent rank (q_lora_rank or kv_lora_rank), d rotary size, p places of a cache.
"""

from __future__ import annotations

from collections.abc import Iterator
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
from megatron.core.transformer.attention import SelfAttention as UpstreamSelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.multi_latent_attention import MLASelfAttention as UpstreamMLASelfAttention
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from torch import Tensor

from gptoughts.models.core_attention import attend_heads
from gptoughts.models.kv_cache import LayerCache
from gptoughts.models.norms import mark_partial_gradients
from gptoughts.models.rotary import rotate


def _refuse(given: dict[str, Any]) -> None:
    """megatron-core's layer passes every option of its inference engine; none may be set."""
    set_options = sorted(name for name, value in given.items() if value is not None)
    if set_options:
        raise ValueError(f"self-attention was given {', '.join(set_options)}; its cache is models.kv_cache's")


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


class _CoreCall:
    """What both layers share: recomputation of the core attention, packing, and a cache that may be attached."""

    cache: LayerCache | None = None
    """What a forward without gradients writes to and looks at; set by ``kv_cache.attached``."""

    def _cached_core(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """[s, b, np, hn] over kept [b, ng, p, hn] and [b, ng, p, hn_v]; returns [s, b, np * hn_v]."""
        assert self.cache is not None
        window = self.cache.window
        s, b, np, hn = query.shape
        ng = keys.size(1)
        if s == 1:
            # The heads of a group are the rows of one product; all look at the same places.
            out = attend_heads(
                query.reshape(b, ng, np // ng, hn), keys, values, mask=window.is_visible, is_causal=False, scale=scale
            )
            return out.reshape(1, b, -1)
        out = attend_heads(
            query.permute(1, 2, 0, 3), keys, values, mask=window.is_visible, is_causal=window.is_causal, scale=scale
        )
        return out.permute(2, 0, 1, 3).reshape(s, b, -1)

    def _core(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, packed: PackedSeqParams | None
    ) -> Tensor:
        if packed is not None:
            query, key, value = (x.squeeze(1) for x in (query, key, value))
        mask_type = self.attn_mask_type  # type: ignore[attr-defined]
        if mask is not None and mask_type is AttnMaskType.no_mask:
            mask_type = AttnMaskType.arbitrary  # Transformer Engine ignores a mask under no_mask
        if self.checkpoint_core_attention and self.training:  # type: ignore[attr-defined]
            attend = self._checkpointed_attention_forward  # type: ignore[attr-defined]
        else:
            attend = self.core_attention  # type: ignore[attr-defined]
        out = attend(query, key, value, mask, attn_mask_type=mask_type, packed_seq_params=packed)
        return out.reshape(out.size(0), 1, -1) if packed is not None else out


class SelfAttention(_CoreCall, UpstreamSelfAttention):
    """Multi-head or grouped-query attention with rotary embedding."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for norm in (self.q_layernorm, self.k_layernorm):
            # One weight for all heads, of which a rank has its own: gradients are to be summed over the
            # tensor-parallel group as under sequence parallelism (megatron-core goes by their names,
            # distributed/finalize_model_grads.py:355, 0.16.1).
            if norm is not None and self.world_size > 1:
                mark_partial_gradients(norm)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **upstream_options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend and project.

        Args:
            hidden_states: [s, b, h] (under sequence parallelism s is this rank's part).
            attention_mask: As in ``SDPACoreAttention.forward``.
            rotary_pos_emb: Table [2, s, 1 or b, 1, hn/2].
            packed_seq_params: Lengths of packed sequences; b is 1 then.

        Returns:
            [s, b, h], and the bias that was not added (None without one).

        Collective: tensor-parallel group.
        """
        _refuse(upstream_options)
        query, key, value = self._split_heads(self.linear_qkv(hidden_states)[0])
        if self.q_layernorm is not None:
            query = self.q_layernorm(query)
        if self.k_layernorm is not None:
            key = self.k_layernorm(key)
        if rotary_pos_emb is not None:
            query, key = rotate(query, rotary_pos_emb), rotate(key, rotary_pos_emb)
        if self.cache is not None:
            _refuse({"attention_mask": attention_mask, "packed_seq_params": packed_seq_params})
            keys, values = self.cache.store(key, value)
            scale = self.hidden_size_per_attention_head**-0.5
            return self.linear_proj(self._cached_core(query, keys, values, scale))
        return self.linear_proj(self._core(query, key, value, attention_mask, packed_seq_params))

    def kept_shapes(self) -> tuple[tuple[int, int], ...]:
        """A key and a value per key/value head (see ``kv_cache``)."""
        return ((self.num_query_groups_per_partition, self.hidden_size_per_attention_head),) * 2

    def _split_heads(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[s, b, ng * (np/ng + 2) * hn] to [s, b, np, hn], [s, b, ng, hn], [s, b, ng, hn]; views but for grouped q."""
        s, b, _ = mixed.shape
        groups, head_dim = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        per_group = self.num_attention_heads_per_partition // groups
        heads = mixed.view(s, b, groups, per_group + 2, head_dim)
        query = heads[..., :per_group, :]
        query = query.squeeze(3) if per_group == 1 else query.reshape(s, b, groups * per_group, head_dim)
        return query, heads[..., per_group, :], heads[..., per_group + 1, :]


class MLASelfAttention(_CoreCall, UpstreamMLASelfAttention):
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
        _refuse(upstream_options)
        assert rotary_pos_emb is not None, "latent attention has no position but the rotary part's"
        query = self._query(hidden_states, rotary_pos_emb)
        latent, shared = self._latent(hidden_states)
        turned = rotate(shared.unsqueeze(2), rotary_pos_emb)
        if self.cache is not None:
            _refuse({"attention_mask": attention_mask, "packed_seq_params": packed_seq_params})
            (kept,) = self.cache.store(torch.cat((latent.unsqueeze(2), turned), dim=-1))
            return self.linear_proj(self._attend_latents(query, kept.squeeze(1)))
        key, value = self._expand(latent, turned)
        return self.linear_proj(self._core(query, key, value, attention_mask, packed_seq_params))

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
        return self._cached_core(query, key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3), self.softmax_scale)

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
        scores = (rows @ kept.transpose(1, 2)).float().mul_(self.softmax_scale)
        if is_visible is not None:
            scores.view(b, np, s, -1).masked_fill_(~is_visible, float("-inf"))
        found = scores.softmax(dim=-1).to(kept.dtype) @ kept[..., :rank]
        found = found.view(b, np, s, rank).permute(1, 2, 0, 3).reshape(np, s * b, rank)
        return (found @ value_up.transpose(1, 2)).view(np, s, b, -1).permute(1, 2, 0, 3).reshape(s, b, -1)

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, Any]:
        """The spec as it is, for megatron-core 0.19.

        With latent norms it takes a norm fused into linear_q_proj for granted where queries have no latent, and that
        class is Transformer Engine's (transformer/mla_qk_norm_config.py:152, 0.19.2).
        """
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in names}

    def _query(self, hidden_states: Tensor, table: Tensor) -> Tensor:
        """[s, b, h] to [s, b, np, qk_head_dim + d]."""
        if self.config.q_lora_rank is None:
            query, _ = self.linear_q_proj(hidden_states)
        else:
            latent, _ = self.linear_q_down_proj(hidden_states)
            query, _ = self.linear_q_up_proj(self.q_layernorm(self._whole_latent(latent, self.config.q_lora_rank)))
        heads = query.view(*query.shape[:2], self.num_attention_heads_per_partition, self.q_head_dim)
        plain, turned = heads.split([self.config.qk_head_dim, self.config.qk_pos_emb_head_dim], dim=-1)
        return torch.cat((plain, rotate(turned, table)), dim=-1)

    def _latent(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """[s, b, h] to RMS(c), [s, b, c] (under sequence parallelism of this rank's part), and k_r, [s, b, d]."""
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
        return self.kv_layernorm(latent), shared

    def _expand(self, latent: Tensor, turned: Tensor) -> tuple[Tensor, Tensor]:
        """RMS(c) and turned rotary keys [s, b, 1, d] to [s, b, np, qk_head_dim + d] and [s, b, np, v_head_dim]."""
        config = self.config
        expanded, _ = self.linear_kv_up_proj(latent)
        heads = expanded.view(
            *expanded.shape[:2], self.num_attention_heads_per_partition, config.qk_head_dim + config.v_head_dim
        )
        plain, value = heads.split([config.qk_head_dim, config.v_head_dim], dim=-1)
        return torch.cat((plain, turned.expand(-1, -1, plain.size(2), -1)), dim=-1), value

    def _whole_latent(self, latent: Tensor, size: int) -> Tensor:
        """The whole latent of this rank's part of the sequence, from a column-parallel or a replicated projection."""
        if latent.size(-1) == size:
            return latent
        latent = gather_from_tensor_model_parallel_region(latent)
        return scatter_to_sequence_parallel_region(latent) if self.config.sequence_parallel else latent

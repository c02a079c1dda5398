"""Self-attention layers whose training path is ours; projections, norms and the core come from the layer spec.

megatron-core's forward is written around its inference engine and CUDA kernels: on a CPU it copies query, key and value
several times and recomputes cos and sin in every layer. Here the heads stay views of the projection until they are
turned. ``rotary_pos_emb`` is the table of ``models.rotary``, made once per forward by the language model.

With a cache (``models.kv_cache``) the layers see new tokens only and look at what is kept of the others.

Legend: s sequence, b microbatch, h hidden, np heads on this rank, ng key/value heads on this rank, hn head dim,
p places of a cache.
"""

from __future__ import annotations

from typing import Any

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention as UpstreamSelfAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from gptoughts.models.core_attention import attend_heads
from gptoughts.models.kv_cache import LayerCache
from gptoughts.models.norms import mark_partial_gradients
from gptoughts.models.recompute import recomputes, run_again
from gptoughts.models.rotary import rotate


def refuse_options(given: dict[str, Any]) -> None:
    """megatron-core's layer passes every option of its inference engine; none may be set."""
    set_options = sorted(name for name, value in given.items() if value is not None)
    if set_options:
        raise ValueError(f"self-attention was given {', '.join(set_options)}; its cache is models.kv_cache's")


class CoreCall:
    """What both layers share: the core attention's call, packing, and a cache that may be attached."""

    cache: LayerCache | None = None
    """What a forward without gradients writes to and looks at; set by ``kv_cache.attached``."""

    def cached_core(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
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

    def core(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, packed: PackedSeqParams | None
    ) -> Tensor:
        if packed is not None:
            query, key, value = (x.squeeze(1) for x in (query, key, value))
        mask_type = self.attn_mask_type  # type: ignore[attr-defined]
        if mask is not None and mask_type is AttnMaskType.no_mask:
            mask_type = AttnMaskType.arbitrary  # Transformer Engine ignores a mask under no_mask
        attend = self.core_attention  # type: ignore[attr-defined]
        out = attend(query, key, value, mask, attn_mask_type=mask_type, packed_seq_params=packed)
        return out.reshape(out.size(0), 1, -1) if packed is not None else out

    def is_recomputed(self, module: str) -> bool:
        return self.training and recomputes(self.config, module)  # type: ignore[attr-defined]


class SelfAttention(CoreCall, UpstreamSelfAttention):
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
        refuse_options(upstream_options)
        mixed, _ = self.linear_qkv(hidden_states)
        if self.cache is not None:
            refuse_options({"attention_mask": attention_mask, "packed_seq_params": packed_seq_params})
            query, key, value = self._heads(mixed, rotary_pos_emb)
            keys, values = self.cache.store(key, value)
            scale = self.hidden_size_per_attention_head**-0.5
            return self.linear_proj(self.cached_core(query, keys, values, scale))

        def attend(mixed: Tensor, table: Tensor | None) -> Tensor:
            return self.core(*self._heads(mixed, table), attention_mask, packed_seq_params)

        if self.is_recomputed("core_attn"):
            return self.linear_proj(run_again(self.config, attend, mixed, rotary_pos_emb))
        return self.linear_proj(attend(mixed, rotary_pos_emb))

    def _heads(self, mixed: Tensor, table: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Normed and turned heads, from the projection."""
        query, key, value = self._split_heads(mixed)
        if self.q_layernorm is not None:
            query = self.q_layernorm(query)
        if self.k_layernorm is not None:
            key = self.k_layernorm(key)
        if table is not None:
            query, key = rotate(query, table), rotate(key, table)
        return query, key, value

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

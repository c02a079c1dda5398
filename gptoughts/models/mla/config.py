"""The shape of a dense decoder with multi-head latent attention.

Keys and values come from a compressed latent of ``kv_lora_rank`` numbers per token; a rotary part of
``qk_pos_emb_head_dim`` is shared by all heads (DeepSeek-V2, arXiv:2405.04434, section 2.1).
"""

from __future__ import annotations

from dataclasses import dataclass

from gptoughts.config.model import ModelConfig


@dataclass(frozen=True)
class MLAConfig(ModelConfig):
    """Fields of the family ``mla``."""

    q_lora_rank: int | None = None
    """Rank of the queries' compression; unset or 0: queries are projected directly."""
    kv_lora_rank: int = 128
    """Rank of the keys' and values' compression, which is what a cache stores per token."""
    qk_head_dim: int = 64
    """Size of a head's part of query and key without rotary embedding."""
    qk_pos_emb_head_dim: int = 32
    """Size of the rotary part of query and key; the key's is shared by all heads."""
    v_head_dim: int = 64
    """Size of a head's value."""

    def __post_init__(self) -> None:
        if self.q_lora_rank == 0:
            object.__setattr__(self, "q_lora_rank", None)

    def problems(self) -> list[str]:
        """Everything about this shape that cannot be built, one line each."""
        found = super().problems()
        for name in ("kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"):
            value = getattr(self, name)
            if value <= 0:
                found.append(f"{name}={value}: must be greater than 0")
        if self.q_lora_rank is not None and self.q_lora_rank < 0:
            found.append(f"q_lora_rank={self.q_lora_rank}: must be 0 (no compression) or greater")
        if self.qk_pos_emb_head_dim % 2:
            found.append(
                f"qk_pos_emb_head_dim={self.qk_pos_emb_head_dim}: the rotary embedding turns pairs; must be even"
            )
        if self.add_qkv_bias:
            found.append("add_qkv_bias=True: megatron-core's latent attention has no such bias; set it to false")
        return found

    def rotary_dim(self) -> int:
        """The shared part is turned."""
        return self.qk_pos_emb_head_dim

    def recompute_modules(self) -> tuple[str, ...]:
        """The projections from the latents besides."""
        return (*super().recompute_modules(), "mla_up_proj")

    def attention_parameters(self) -> int:
        """Down and up projections of queries and of keys and values, the output projection, and the latent norms."""
        hidden, heads = self.hidden_size, self.num_attention_heads
        query_size = heads * (self.qk_head_dim + self.qk_pos_emb_head_dim)
        if self.q_lora_rank is None:
            query = hidden * query_size
        else:
            query = hidden * self.q_lora_rank + self.q_lora_rank + self.q_lora_rank * query_size
        down = hidden * (self.kv_lora_rank + self.qk_pos_emb_head_dim)
        up = self.kv_lora_rank + self.kv_lora_rank * heads * (self.qk_head_dim + self.v_head_dim)
        return query + down + up + heads * self.v_head_dim * hidden

    def replicated_parameters_of_layer(self, index: int) -> int:
        """The layer's norms and those of the latents (the down projections are divided over their outputs)."""
        return super().replicated_parameters_of_layer(index) + (self.q_lora_rank or 0) + self.kv_lora_rank

    def attention_width(self) -> int:
        """Heads x (query-key size + value size), in the expanded form that training uses."""
        return self.num_attention_heads * (self.qk_head_dim + self.qk_pos_emb_head_dim + self.v_head_dim)

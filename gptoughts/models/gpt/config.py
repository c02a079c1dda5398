"""The shape of a Llama-style decoder: multi-head or grouped-query attention, RoPE, RMSNorm, SwiGLU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from gptoughts.config.model import ModelConfig


@dataclass(frozen=True)
class GPTConfig(ModelConfig):
    """Fields of the family ``gpt``."""

    num_query_groups: int | None = None
    """Key and value heads (grouped-query attention); unset: as many as query heads."""
    kv_channels: int | None = None
    """Size of a head; unset: hidden_size / num_attention_heads."""
    qk_layernorm: bool = False
    """RMSNorm of each query and key head before the rotary embedding."""

    def filled(self) -> Self:
        """This shape with num_query_groups and kv_channels filled in."""
        return replace(self, num_query_groups=self._query_groups, kv_channels=self._head_size)

    @property
    def _query_groups(self) -> int:
        return self.num_attention_heads if self.num_query_groups is None else self.num_query_groups

    @property
    def _head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads if self.kv_channels is None else self.kv_channels

    def problems(self) -> list[str]:
        """Everything about this shape that cannot be built, one line each."""
        found = super().problems()
        if found:
            return found
        if self.kv_channels is None and self.hidden_size % self.num_attention_heads:
            found.append(
                f"num_attention_heads={self.num_attention_heads}: hidden_size={self.hidden_size} is not divisible "
                "by it; choose a divisor or set model.kv_channels"
            )
        elif self._head_size <= 0 or self._head_size % 2:
            found.append(f"kv_channels={self._head_size}: the rotary embedding turns pairs; must be even and positive")
        groups = self._query_groups
        if groups <= 0 or self.num_attention_heads % groups:
            divisors = [n for n in range(1, self.num_attention_heads + 1) if self.num_attention_heads % n == 0]
            found.append(
                f"num_query_groups={groups}: num_attention_heads={self.num_attention_heads} is not divisible by it; "
                f"allowed: {', '.join(map(str, divisors))}"
            )
        return found

    def tensor_parallel_divisors(self) -> dict[str, int]:
        """What tensor parallelism divides: name -> count."""
        return super().tensor_parallel_divisors() | {"num_query_groups": self._query_groups}

    def attention_parameters(self) -> int:
        """Query, key, value and output projections, their biases, and the head norms."""
        query = self.num_attention_heads * self._head_size
        key_value = 2 * self._query_groups * self._head_size
        matrices = self.hidden_size * (query + key_value) + query * self.hidden_size
        bias = query + key_value if self.add_qkv_bias else 0
        norms = 2 * self._head_size if self.qk_layernorm else 0
        return matrices + bias + norms

    def attention_width(self) -> int:
        """Heads x (query-key size + value size)."""
        return self.num_attention_heads * 2 * self._head_size

"""The shape of a Llama-style decoder: multi-head or grouped-query attention, RoPE, RMSNorm, SwiGLU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self

from gptoughts.config.model import ModelConfig
from gptoughts.models import rotary_scaling

_LLAMA3_FIELDS = ("rotary_low_freq_factor", "rotary_high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class GPTConfig(ModelConfig):
    """Fields of the family ``gpt``."""

    num_query_groups: int | None = None
    """Key and value heads (grouped-query attention); unset: as many as query heads."""
    kv_channels: int | None = None
    """Size of a head; unset: hidden_size / num_attention_heads."""
    qk_layernorm: bool = False
    """RMSNorm of each query and key head before the rotary embedding."""
    rotary_scaling: Literal["linear", "llama3"] | None = None
    """Stretches the rotary wavelengths for longer sequences: all alike, or the long ones only (Llama 3.1 and later)."""
    rotary_scaling_factor: float | None = None
    """By how much; needed with rotary_scaling."""
    rotary_low_freq_factor: float | None = None
    """llama3: pairs that turn fewer times than this over the original length are stretched wholly."""
    rotary_high_freq_factor: float | None = None
    """llama3: pairs that turn more often than this over the original length are left alone."""
    original_max_position_embeddings: int | None = None
    """llama3: sequence length, in tokens, that the model was first trained with."""

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
        return found + self._scaling_problems()

    def _scaling_problems(self) -> list[str]:
        needed = {
            None: (),
            "linear": ("rotary_scaling_factor",),
            "llama3": ("rotary_scaling_factor", *_LLAMA3_FIELDS),
        }[self.rotary_scaling]
        found = []
        for name in ("rotary_scaling_factor", *_LLAMA3_FIELDS):
            value = getattr(self, name)
            if name in needed and (value is None or value <= 0):
                found.append(f"{name}={value}: rotary_scaling={self.rotary_scaling} needs a number greater than 0")
            elif name not in needed and value is not None:
                found.append(
                    f"{name}={value}: has no meaning with rotary_scaling={self.rotary_scaling}; leave it unset"
                )
        low, high = self.rotary_low_freq_factor, self.rotary_high_freq_factor
        if not found and low is not None and high is not None and low >= high:
            found.append(f"rotary_low_freq_factor={low}: must be below rotary_high_freq_factor={high}")
        return found

    def rotary_dim(self) -> int:
        """Whole heads are turned."""
        return self._head_size

    def rotary_frequencies(self) -> tuple[float, ...] | None:
        """Radians per position of each rotary pair; None where the base alone says them."""
        if self.rotary_scaling is None:
            return None
        assert self.rotary_scaling_factor is not None
        dim, base, factor = self._head_size, self.rotary_base, self.rotary_scaling_factor
        if self.rotary_scaling == "linear":
            return rotary_scaling.linear_frequencies(dim, base, factor=factor)
        low, high, length = (getattr(self, name) for name in _LLAMA3_FIELDS)
        return rotary_scaling.llama3_frequencies(
            dim, base, factor=factor, low_freq_factor=low, high_freq_factor=high, original_length=length
        )

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

    def replicated_parameters_of_layer(self, index: int) -> int:
        """The layer's norms, and the head norms, whose weight all heads share."""
        head_norms = 2 * self._head_size if self.qk_layernorm else 0
        return super().replicated_parameters_of_layer(index) + head_norms

    def attention_width(self) -> int:
        """Heads x (query-key size + value size)."""
        return self.num_attention_heads * 2 * self._head_size

"""Which modules fill a layer spec: Transformer Engine's where it is usable, ours and megatron-core's elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import TransformerConfig

from gptoughts.models.core_attention import SDPACoreAttention
from gptoughts.models.norms import norm_class
from gptoughts.models.swiglu import SwiGLUMLP
from gptoughts.platform import device
from gptoughts.precision.fp8_linear import ColumnParallelLinear, RowParallelLinear


@dataclass(frozen=True)
class SpecBackend:
    """The modules of one backend; each is constructed by megatron-core's layers."""

    column_parallel_linear: type
    row_parallel_linear: type
    replicated_linear: type
    """For latent attention's down projections, which every tensor-parallel rank needs whole."""
    core_attention: type
    norm: Any
    mlp: type


def select_backend(config: TransformerConfig) -> SpecBackend:
    """The backend that ``config.transformer_impl`` names."""
    if config.transformer_impl == "transformer_engine":
        return transformer_engine_backend()
    return local_backend(config.normalization)


def local_backend(normalization: str) -> SpecBackend:
    """Modules that need neither CUDA nor Transformer Engine."""
    return SpecBackend(
        column_parallel_linear=ColumnParallelLinear,
        row_parallel_linear=RowParallelLinear,
        # Divided over the output and gathered by the attention layer.
        replicated_linear=ColumnParallelLinear,
        core_attention=SDPACoreAttention,
        norm=norm_class(normalization),
        # On CUDA megatron-core's MLP has a jit-fused activation.
        mlp=MLP if device.is_cuda() else SwiGLUMLP,
    )


def transformer_engine_backend() -> SpecBackend:
    """Transformer Engine's linears, norms and attention (FP8 needs its linears)."""
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TEDotProductAttention,
        TELinear,
        TENorm,
        TERowParallelLinear,
    )

    return SpecBackend(
        column_parallel_linear=TEColumnParallelLinear,
        row_parallel_linear=TERowParallelLinear,
        replicated_linear=TELinear,
        core_attention=TEDotProductAttention,
        norm=TENorm,
        mlp=MLP,
    )

"""Layer spec of a dense decoder: norm, attention, norm, SwiGLU, with residual connections around both halves."""

from __future__ import annotations

from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from gptoughts.models.attention import SelfAttention
from gptoughts.models.specs.backends import SpecBackend, select_backend


def dense_layer_spec(
    config: TransformerConfig,
    *,
    attn_mask_type: AttnMaskType = AttnMaskType.causal,
    backend: SpecBackend | None = None,
) -> ModuleSpec:
    """A layer with multi-head or grouped-query attention.

    Args:
        config: megatron-core's configuration.
        attn_mask_type: ``causal``, or ``no_mask`` for bidirectional attention.
        backend: Unset: what this machine can run.
    """
    backend = backend or select_backend(config.normalization)
    head_norm = backend.norm if config.qk_layernorm else IdentityOp
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": attn_mask_type},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.column_parallel_linear,
            core_attention=backend.core_attention,
            linear_proj=backend.row_parallel_linear,
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )
    return decoder_layer_spec(attention, backend)


def decoder_layer_spec(attention: ModuleSpec, backend: SpecBackend) -> ModuleSpec:
    """A pre-norm layer around the given attention, with a dense SwiGLU."""
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=backend.norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=backend.norm,
            mlp=dense_mlp_spec(backend),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def dense_mlp_spec(backend: SpecBackend) -> Any:
    """The SwiGLU half."""
    return ModuleSpec(
        module=backend.mlp,
        submodules=MLPSubmodules(linear_fc1=backend.column_parallel_linear, linear_fc2=backend.row_parallel_linear),
    )

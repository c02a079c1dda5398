"""Specs of a dense decoder: norm, attention, norm, SwiGLU, with residual connections around both halves."""

from __future__ import annotations

from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor, nn

from gptoughts.models.attention import SelfAttention
from gptoughts.models.context_attention import context_parallel
from gptoughts.models.decoder_layer import DecoderLayer
from gptoughts.models.recompute import recomputes, run_again
from gptoughts.models.specs.backends import SpecBackend, select_backend


def dense_decoder_spec(
    config: TransformerConfig,
    *,
    attn_mask_type: AttnMaskType = AttnMaskType.causal,
    vp_stage: int | None = None,
    backend: SpecBackend | None = None,
) -> TransformerBlockSubmodules:
    """This stage's layers with multi-head or grouped-query attention.

    Args:
        config: megatron-core's configuration.
        attn_mask_type: ``causal``, or ``no_mask`` for bidirectional attention.
        vp_stage: Virtual pipeline stage.
        backend: Unset: what this machine can run.
    """
    backend = backend or select_backend(config)
    attention = grouped_query_attention(config, backend, attn_mask_type)
    return decoder_block(decoder_layer(attention, backend), config, backend, vp_stage)


def grouped_query_attention(
    config: TransformerConfig, backend: SpecBackend, attn_mask_type: AttnMaskType
) -> ModuleSpec:
    """Multi-head or grouped-query attention alone."""
    head_norm = backend.norm if config.qk_layernorm else IdentityOp
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": attn_mask_type},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.column_parallel_linear,
            core_attention=context_parallel(backend.core_attention, config),
            linear_proj=backend.row_parallel_linear,
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )


def decoder_layer(attention: ModuleSpec, backend: SpecBackend, mlp: type[nn.Module] | None = None) -> ModuleSpec:
    """A pre-norm layer around the given attention and feed-forward half; unset: a dense SwiGLU."""
    return ModuleSpec(
        module=DecoderLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=backend.norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=backend.norm,
            mlp=mlp or dense_mlp_class(backend),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def decoder_block(
    layer: ModuleSpec, config: TransformerConfig, backend: SpecBackend, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """This stage's layers, all alike, and the final norm.

    megatron-core fills in a norm of its own when it is given a layer alone, and that one refuses sequence parallelism
    (transformer/transformer_block.py:258, 0.16.1).
    """
    num_layers = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=backend.norm)


def dense_mlp_class(backend: SpecBackend, mlp: type[MLP] | None = None) -> type[nn.Module]:
    """The feed-forward half as a class that every supported megatron-core constructs without asking what it is.

    0.16 hands a layer's MLP the configuration alone (transformer/transformer_layer.py:370, 0.16.1) and logs a warning
    for specs of classes that it does not know; 0.19 hands over groups and names (transformer_layer.py:433, 0.19.2).

    Args:
        backend: Its linears are used.
        mlp: What it is; unset: the backend's SwiGLU.
    """
    submodules = MLPSubmodules(linear_fc1=backend.column_parallel_linear, linear_fc2=backend.row_parallel_linear)

    class DenseMLP(mlp or backend.mlp):  # type: ignore[misc]
        def __init__(
            self, config: TransformerConfig, pg_collection: Any = None, is_mtp_layer: bool = False, name: Any = None
        ) -> None:
            tp_group = pg_collection.tp if pg_collection is not None else None
            super().__init__(config, submodules, ffn_hidden_size=config.ffn_hidden_size, tp_group=tp_group)

        def forward(self, hidden_states: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
            if not (self.training and recomputes(self.config, "mlp")):
                return super().forward(hidden_states, **options)
            forward = super().forward
            return run_again(self.config, lambda x: forward(x, **options), hidden_states)

    return DenseMLP

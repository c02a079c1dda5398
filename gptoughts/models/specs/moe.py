"""Specs of a decoder whose upper layers are mixtures of experts."""

from __future__ import annotations

from copy import copy
from typing import Any

from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import nn

from gptoughts.models.moe import MixtureOfExperts
from gptoughts.models.router import ExpertRouter
from gptoughts.models.specs.backends import SpecBackend, select_backend
from gptoughts.models.specs.dense import decoder_layer, grouped_query_attention
from gptoughts.models.specs.mla import mla_attention


def moe_decoder_spec(
    config: TransformerConfig,
    *,
    first_k_dense_layers: int,
    normalize_gates: bool,
    bias_update_rate: float,
    attn_mask_type: AttnMaskType = AttnMaskType.causal,
    vp_stage: int | None = None,
    backend: SpecBackend | None = None,
) -> TransformerBlockSubmodules:
    """This stage's layers: dense ones at the bottom of the model, experts above.

    Args:
        config: megatron-core's configuration, which says what attention there is.
        first_k_dense_layers: How many layers of the whole model are dense.
        normalize_gates: As in :class:`ExpertRouter`.
        bias_update_rate: As in :class:`ExpertRouter`.
        attn_mask_type: ``causal``, or ``no_mask`` for bidirectional attention.
        vp_stage: Virtual pipeline stage.
        backend: Unset: what this machine can run.
    """
    backend = backend or select_backend(config)
    if isinstance(config, MLATransformerConfig):
        attention = mla_attention(config, backend, attn_mask_type)
    else:
        attention = grouped_query_attention(config, backend, attn_mask_type)
    experts = expert_mlp_class(backend, normalize_gates=normalize_gates, bias_update_rate=bias_update_rate)
    dense_layer, expert_layer = decoder_layer(attention, backend), decoder_layer(attention, backend, experts)
    offset = get_transformer_layer_offset(config, vp_stage)
    numbers = range(offset, offset + get_num_layers_to_build(config, vp_stage))
    layers = [dense_layer if number < first_k_dense_layers else expert_layer for number in numbers]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=backend.norm)


def expert_mlp_class(backend: SpecBackend, *, normalize_gates: bool, bias_update_rate: float) -> type[nn.Module]:
    """The expert layer as a class that every supported megatron-core constructs (see ``dense_mlp_class``)."""
    submodules = MLPSubmodules(linear_fc1=backend.column_parallel_linear, linear_fc2=backend.row_parallel_linear)

    def router(config: TransformerConfig, groups: Any) -> ExpertRouter:
        return ExpertRouter(
            config, normalize_gates=normalize_gates, bias_update_rate=bias_update_rate, pg_collection=groups
        )

    def shared_experts(config: TransformerConfig, tp_group: Any) -> nn.Module:
        # The second projection takes its width from the configuration alone (transformer/mlp.py:141, 0.16.1).
        config = copy(config)
        config.ffn_hidden_size = config.moe_shared_expert_intermediate_size
        return backend.mlp(config, submodules, ffn_hidden_size=config.ffn_hidden_size, tp_group=tp_group)

    class ExpertMLP(MixtureOfExperts):
        def __init__(
            self, config: TransformerConfig, pg_collection: Any = None, is_mtp_layer: bool = False, name: Any = None
        ) -> None:
            has_shared = config.moe_shared_expert_intermediate_size is not None
            super().__init__(config, router=router, shared_experts=shared_experts if has_shared else None)

    return ExpertMLP

"""Builds the family ``deepseek``, and any decoder with dense layers at the bottom and mixtures of experts above."""

from __future__ import annotations

from typing import Unpack

import torch
from megatron.core.transformer.enums import AttnMaskType

from gptoughts.config.experiment import ExperimentConfig
from gptoughts.models.construction import Construction
from gptoughts.models.expert_load import expert_routers
from gptoughts.models.expert_shape import ExpertFields
from gptoughts.models.language_model import LanguageModel, build_language_model
from gptoughts.models.specs.moe import moe_decoder_spec
from gptoughts.models.transformer_config import transformer_config


def build_model(
    config: ExperimentConfig,
    *,
    params_dtype: torch.dtype,
    vp_stage: int | None = None,
    attn_mask_type: AttnMaskType = AttnMaskType.causal,
    **construction: Unpack[Construction],
) -> LanguageModel:
    """The model on this rank, with its initial weights.

    Args:
        config: The run; ``config.model`` has :class:`ExpertFields` and any attention.
        params_dtype: Dtype of the parameters.
        vp_stage: Virtual pipeline stage.
        attn_mask_type: ``causal``, or ``no_mask`` for bidirectional attention.
        construction: As ``build_language_model`` takes it.

    Collective: tensor-parallel group; the data-parallel group under ZeRO-3.
    """
    model = config.model
    assert isinstance(model, ExpertFields)
    upstream_config = transformer_config(config, params_dtype=params_dtype)
    block_spec = moe_decoder_spec(
        upstream_config,
        first_k_dense_layers=model.first_k_dense_layers,
        normalize_gates=model.moe_router_normalize_gates,
        bias_update_rate=model.moe_router_bias_update_rate,
        attn_mask_type=attn_mask_type,
        vp_stage=vp_stage,
    )
    language_model = build_language_model(
        config,
        upstream_config,
        block_spec,
        mtp_num_layers=model.mtp_depths(),
        vp_stage=vp_stage,
        **construction,
    )
    for router in expert_routers(language_model).values():
        router.reset_buffers()
    return language_model

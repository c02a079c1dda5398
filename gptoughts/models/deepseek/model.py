"""Builds the family ``deepseek``, and any decoder with dense layers at the bottom and mixtures of experts above."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from megatron.core.transformer.enums import AttnMaskType

from gptoughts.config.experiment import ExperimentConfig
from gptoughts.models.expert_load import expert_routers
from gptoughts.models.expert_shape import ExpertFields
from gptoughts.models.initialization import Gathered, keep_as_is
from gptoughts.models.language_model import ConstructionContext, LanguageModel, build_language_model
from gptoughts.models.specs.moe import moe_decoder_spec
from gptoughts.models.transformer_config import transformer_config


def build_model(
    config: ExperimentConfig,
    *,
    params_dtype: torch.dtype,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    attn_mask_type: AttnMaskType = AttnMaskType.causal,
    construction_context: ConstructionContext = nullcontext,
    gathered: Gathered = keep_as_is,
) -> LanguageModel:
    """The model on this rank, with its initial weights; arguments as in ``build_language_model``.

    Args:
        config: The run; ``config.model`` has :class:`ExpertFields` and any attention.
        params_dtype: Dtype of the parameters.
        pre_process: This stage embeds tokens.
        post_process: This stage makes logits.
        vp_stage: Virtual pipeline stage.
        attn_mask_type: ``causal``, or ``no_mask`` for bidirectional attention.
        construction_context: Entered around construction.
        gathered: Entered around each write of initial values.

    Collective: tensor-parallel group; the data-parallel group under ZeRO-3.
    """
    model = config.model
    assert isinstance(model, ExpertFields)
    upstream_config = transformer_config(model, config.parallel, params_dtype=params_dtype)
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
        pre_process=pre_process,
        post_process=post_process,
        vp_stage=vp_stage,
        construction_context=construction_context,
        gathered=gathered,
    )
    for router in expert_routers(language_model).values():
        router.reset_buffers()
    return language_model

"""Builds the family ``deepseek``: latent attention, dense layers at the bottom, mixtures of experts above."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from megatron.core.transformer.enums import AttnMaskType

from gptoughts.config.experiment import ExperimentConfig
from gptoughts.models.deepseek.config import DeepSeekConfig
from gptoughts.models.expert_load import expert_routers
from gptoughts.models.initialization import Gathered, keep_as_is
from gptoughts.models.language_model import ConstructionContext, LanguageModel, build_language_model
from gptoughts.models.specs.moe import moe_decoder_spec
from gptoughts.models.transformer_config import deepseek_transformer_config
from gptoughts.models.yarn import YarnScaling


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
        config: The run; ``config.model`` is a :class:`DeepSeekConfig`.
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
    assert isinstance(model, DeepSeekConfig)
    transformer_config = deepseek_transformer_config(model, config.parallel, params_dtype=params_dtype)
    block_spec = moe_decoder_spec(
        transformer_config,
        first_k_dense_layers=model.first_k_dense_layers,
        normalize_gates=model.moe_router_normalize_gates,
        bias_update_rate=model.moe_router_bias_update_rate,
        attn_mask_type=attn_mask_type,
        vp_stage=vp_stage,
    )
    rotary_dim = transformer_config.qk_pos_emb_head_dim
    yarn = yarn_scaling(model)
    language_model = build_language_model(
        config,
        transformer_config,
        block_spec,
        rotary_dim=rotary_dim,
        rotary_frequencies=None if yarn is None else yarn.frequencies(rotary_dim, model.rotary_base),
        rotary_amplitude=1.0 if yarn is None else yarn.amplitude,
        mtp_num_layers=model.mtp_num_layers,
        pre_process=pre_process,
        post_process=post_process,
        vp_stage=vp_stage,
        construction_context=construction_context,
        gathered=gathered,
    )
    for router in expert_routers(language_model).values():
        router.reset_buffers()
    return language_model


def yarn_scaling(model: DeepSeekConfig) -> YarnScaling | None:
    """YaRN's settings of a shape; None where its factor is 1."""
    if model.rotary_scaling_factor == 1:
        return None
    return YarnScaling(
        factor=model.rotary_scaling_factor,
        original_max_position_embeddings=model.original_max_position_embeddings,
        beta_fast=model.beta_fast,
        beta_slow=model.beta_slow,
        mscale=model.mscale,
        mscale_all_dim=model.mscale_all_dim,
    )

"""Builds the family ``mla``: a dense decoder with multi-head latent attention."""

from __future__ import annotations

from typing import Unpack

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import MLATransformerConfig

from gptoughts.config.experiment import ExperimentConfig
from gptoughts.models.construction import Construction
from gptoughts.models.language_model import LanguageModel, build_language_model
from gptoughts.models.mla.config import MLAConfig
from gptoughts.models.specs.mla import mla_decoder_spec
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
        config: The run; ``config.model`` is a :class:`MLAConfig`.
        params_dtype: Dtype of the parameters.
        vp_stage: Virtual pipeline stage.
        attn_mask_type: ``causal``, or ``no_mask`` for bidirectional attention.
        construction: As ``build_language_model`` takes it.

    Collective: tensor-parallel group; the data-parallel group under ZeRO-3.
    """
    model = config.model
    assert isinstance(model, MLAConfig)
    upstream_config = transformer_config(config, params_dtype=params_dtype)
    assert isinstance(upstream_config, MLATransformerConfig)
    return build_language_model(
        config,
        upstream_config,
        mla_decoder_spec(upstream_config, attn_mask_type=attn_mask_type, vp_stage=vp_stage),
        vp_stage=vp_stage,
        **construction,
    )

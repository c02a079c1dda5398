"""Builds the family ``gpt``: a Llama-style decoder with multi-head or grouped-query attention."""

from __future__ import annotations

from typing import Unpack

import torch
from megatron.core.transformer.enums import AttnMaskType

from gptoughts.config.experiment import ExperimentConfig
from gptoughts.models.construction import Construction
from gptoughts.models.gpt.config import GPTConfig
from gptoughts.models.language_model import LanguageModel, build_language_model
from gptoughts.models.specs.dense import dense_decoder_spec
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
        config: The run; ``config.model`` is a :class:`GPTConfig`.
        params_dtype: Dtype of the parameters.
        vp_stage: Virtual pipeline stage.
        attn_mask_type: ``causal``, or ``no_mask`` for bidirectional attention.
        construction: As ``build_language_model`` takes it.

    Collective: tensor-parallel group; the data-parallel group under ZeRO-3.
    """
    model = config.model
    assert isinstance(model, GPTConfig)
    upstream_config = transformer_config(config, params_dtype=params_dtype)
    return build_language_model(
        config,
        upstream_config,
        dense_decoder_spec(upstream_config, attn_mask_type=attn_mask_type, vp_stage=vp_stage),
        vp_stage=vp_stage,
        **construction,
    )

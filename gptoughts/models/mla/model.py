"""Builds the family ``mla``: a dense decoder with multi-head latent attention."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import MLATransformerConfig

from gptoughts.config.experiment import ExperimentConfig
from gptoughts.models.initialization import Gathered, keep_as_is
from gptoughts.models.language_model import ConstructionContext, LanguageModel, build_language_model
from gptoughts.models.mla.config import MLAConfig
from gptoughts.models.specs.mla import mla_decoder_spec
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
        config: The run; ``config.model`` is a :class:`MLAConfig`.
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
    assert isinstance(model, MLAConfig)
    upstream_config = transformer_config(model, config.parallel, params_dtype=params_dtype)
    assert isinstance(upstream_config, MLATransformerConfig)
    return build_language_model(
        config,
        upstream_config,
        mla_decoder_spec(upstream_config, attn_mask_type=attn_mask_type, vp_stage=vp_stage),
        pre_process=pre_process,
        post_process=post_process,
        vp_stage=vp_stage,
        construction_context=construction_context,
        gathered=gathered,
    )

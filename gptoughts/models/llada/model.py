"""Builds the family ``llada``: an autoregressive family's decoder without a causal mask, and the objective."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from megatron.core.transformer.enums import AttnMaskType

from gptoughts.config.experiment import ExperimentConfig
from gptoughts.models.deepseek.model import build_model as build_expert_decoder
from gptoughts.models.expert_shape import ExpertFields
from gptoughts.models.gpt.model import build_model as build_dense_decoder
from gptoughts.models.initialization import Gathered, keep_as_is
from gptoughts.models.language_model import ConstructionContext, LanguageModel
from gptoughts.models.llada.config import DiffusionFields
from gptoughts.models.mla.config import MLAConfig
from gptoughts.models.mla.model import build_model as build_latent_decoder
from gptoughts.objectives.masked_diffusion import MaskedDiffusion


def build_model(
    config: ExperimentConfig,
    *,
    params_dtype: torch.dtype,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    construction_context: ConstructionContext = nullcontext,
    gathered: Gathered = keep_as_is,
) -> LanguageModel:
    """The model on this rank, with its initial weights; arguments as in ``build_language_model``.

    Collective: tensor-parallel group; the data-parallel group under ZeRO-3.
    """
    assert isinstance(config.model, DiffusionFields)
    if isinstance(config.model, ExpertFields):
        build_decoder = build_expert_decoder
    else:
        build_decoder = build_latent_decoder if isinstance(config.model, MLAConfig) else build_dense_decoder
    return build_decoder(
        config,
        params_dtype=params_dtype,
        pre_process=pre_process,
        post_process=post_process,
        vp_stage=vp_stage,
        attn_mask_type=AttnMaskType.no_mask,
        construction_context=construction_context,
        gathered=gathered,
    )


def build_objective(config: ExperimentConfig) -> MaskedDiffusion:
    """The objective of a resolved run: noise from ``config.seed``, masking as the model's configuration says."""
    model = config.model.filled()
    assert isinstance(model, DiffusionFields)
    assert model.mask_token_id is not None
    period = config.train.global_batch_size if model.is_low_discrepancy else None
    assert not (model.is_low_discrepancy and period is None), "a resolved run knows its global batch size"
    return MaskedDiffusion(
        mask_token_id=model.mask_token_id,
        seed=config.seed,
        epsilon=model.mask_epsilon,
        random_length_probability=model.random_length_probability,
        stratified_samples=period,
        is_shifted=model.is_shifted,
    )

"""Builds the family ``relu2``: a Llama-style decoder with an ungated squared ReLU."""

from __future__ import annotations

from typing import Unpack

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP

from gptoughts.config.experiment import ExperimentConfig
from gptoughts.models.construction import Construction
from gptoughts.models.language_model import LanguageModel, build_language_model
from gptoughts.models.specs.backends import select_backend
from gptoughts.models.specs.dense import decoder_block, decoder_layer, dense_mlp_class, grouped_query_attention
from gptoughts.models.transformer_config import transformer_config
from tests.models.relu2.config import ReLU2Config


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """max(x, 0)^2 of any shape."""
    return F.relu(x).square()


def build_model(
    config: ExperimentConfig,
    *,
    params_dtype: torch.dtype,
    vp_stage: int | None = None,
    **construction: Unpack[Construction],
) -> LanguageModel:
    """The model on this rank, with its initial weights.

    Args:
        config: The run; ``config.model`` is a :class:`ReLU2Config`.
        params_dtype: Dtype of the parameters.
        vp_stage: Virtual pipeline stage.
        construction: As ``build_language_model`` takes it.

    Collective: tensor-parallel group; the data-parallel group under ZeRO-3.
    """
    model = config.model
    assert isinstance(model, ReLU2Config)
    upstream_config = transformer_config(
        config,
        params_dtype=params_dtype,
        gated_linear_unit=False,
        activation_func=squared_relu,
        bias_activation_fusion=False,
    )
    backend = select_backend(upstream_config)
    attention = grouped_query_attention(upstream_config, backend, AttnMaskType.causal)
    layer = decoder_layer(attention, backend, dense_mlp_class(backend, MLP))
    block = decoder_block(layer, upstream_config, backend, vp_stage)
    return build_language_model(config, upstream_config, block, vp_stage=vp_stage, **construction)

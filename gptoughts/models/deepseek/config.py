"""The shape of a decoder with latent attention and a fine-grained mixture of experts (DeepSeek-V2 and V3)."""

from __future__ import annotations

from dataclasses import dataclass

from gptoughts.models.expert_shape import ExpertFields
from gptoughts.models.mla.config import MLAConfig
from gptoughts.models.yarn import YarnFields


@dataclass(frozen=True)
class DeepSeekConfig(ExpertFields, YarnFields, MLAConfig):
    """Fields of the family ``deepseek``."""

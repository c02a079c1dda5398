"""Shapes of the family ``llada``.

The house sizes are those of ``gpt`` (GPT-3's table 2.1, adapted), so that the two objectives can be compared at equal
size; with latent attention they are those of ``mla``, with experts those of ``deepseek`` (under ``gpt``'s attention,
or under its own). One entry of the vocabulary is left to the mask token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from gptoughts.config.model import ModelConfig
from gptoughts.models.deepseek.presets import DEEPSEEK_PRESETS
from gptoughts.models.expert_shape import ExpertFields
from gptoughts.models.family import Preset
from gptoughts.models.gpt.presets import GPT_PRESETS
from gptoughts.models.llada.config import (
    LLaDAConfig,
    LLaDAExpertConfig,
    LLaDALatentConfig,
    LLaDALatentExpertConfig,
)
from gptoughts.models.mla.presets import MLA_PRESETS

_HOUSE_SIZES = ("debug", "small", "medium", "large", "xl")
_EXPERT_NAMES = {f.name for f in dataclasses.fields(ExpertFields)} - {f.name for f in dataclasses.fields(ModelConfig)}


def _fields(model: ModelConfig, names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(model).items() if name in names}


def _diffusing(presets: Mapping[str, Preset], model_class: type[ModelConfig]) -> dict[str, Preset]:
    """An autoregressive family's house shapes as ``model_class``."""
    names = {field.name for field in dataclasses.fields(model_class)}
    found = {}
    for size in _HOUSE_SIZES:
        preset = presets[size]
        shape = _fields(preset.model, names) | {"vocab_size": preset.model.vocab_size - 1}
        found[size] = dataclasses.replace(preset, model=model_class(**shape))
    return found


def _with_experts(size: str, preset: Preset, num_parameters: int) -> Preset:
    experts = DEEPSEEK_PRESETS[size]
    names = {field.name for field in dataclasses.fields(preset.model)}
    shape = _fields(preset.model, names) | _fields(experts.model, _EXPERT_NAMES)
    return dataclasses.replace(
        preset,
        model=LLaDAExpertConfig(**shape),
        num_parameters=num_parameters,
        source=f"{preset.source}; experts as in the family deepseek: {experts.source}",
    )


LLADA_PRESETS = _diffusing(GPT_PRESETS, LLaDAConfig)
"""Size -> preset, multi-head attention and dense layers."""

LATENT_PRESETS = _diffusing(MLA_PRESETS, LLaDALatentConfig)
"""The same with latent attention."""

LATENT_EXPERT_PRESETS = _diffusing(DEEPSEEK_PRESETS, LLaDALatentExpertConfig)
"""The same with latent attention and experts."""

_EXPERT_COUNTS = {
    "debug": 9_441_536, "small": 511_863_552, "medium": 1_818_706_944, "large": 3_928_647_168, "xl": 7_340_328_960,
}  # fmt: skip
EXPERT_PRESETS = {size: _with_experts(size, LLADA_PRESETS[size], count) for size, count in _EXPERT_COUNTS.items()}
"""The same with multi-head attention and experts."""

LLADA_PRESETS["llada-8b"] = Preset(
    model=LLaDAConfig(num_layers=32, hidden_size=4096, ffn_hidden_size=12288, num_attention_heads=32,
                      vocab_size=126464, seq_length=4096, rotary_base=500000, mask_token_id=126336),
    source="https://huggingface.co/GSAI-ML/LLaDA-8B-Base/blob/main/config.json; learning rate: arXiv:2502.09992, "
    "section 2.2",
    num_parameters=8_015_581_184,
    lr=4e-4,
    batch_size=1,
)  # fmt: skip

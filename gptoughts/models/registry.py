"""The table of model families: one entry each; builders are dotted paths, so that this file loads no torch."""

from __future__ import annotations

from dataclasses import replace

from gptoughts.models.deepseek.config import DeepSeekConfig
from gptoughts.models.deepseek.presets import DEEPSEEK_PRESETS
from gptoughts.models.family import Family
from gptoughts.models.gpt.config import GPTConfig
from gptoughts.models.gpt.presets import GPT_PRESETS
from gptoughts.models.llada.config import (
    LLaDAConfig,
    LLaDAExpertConfig,
    LLaDALatentConfig,
    LLaDALatentExpertConfig,
)
from gptoughts.models.llada.presets import EXPERT_PRESETS, LATENT_EXPERT_PRESETS, LATENT_PRESETS, LLADA_PRESETS
from gptoughts.models.mla.config import MLAConfig
from gptoughts.models.mla.presets import MLA_PRESETS

_CAUSAL_LM = "gptoughts.objectives.causal_lm:build_objective"

_GPT = Family(
    "gpt", "Llama-style decoder", GPTConfig, GPT_PRESETS, "gptoughts.models.gpt.model:build_model", _CAUSAL_LM
)
_MLA = Family(
    "mla", "dense decoder with multi-head latent attention", MLAConfig, MLA_PRESETS,
    "gptoughts.models.mla.model:build_model", _CAUSAL_LM,
)  # fmt: skip
_DEEPSEEK = Family(
    "deepseek", "decoder with multi-head latent attention and a fine-grained mixture of experts", DeepSeekConfig,
    DEEPSEEK_PRESETS, "gptoughts.models.deepseek.model:build_model", _CAUSAL_LM,
)  # fmt: skip

_LLADA_DENSE = Family(
    "llada", "masked-diffusion language model", LLaDAConfig, LLADA_PRESETS,
    "gptoughts.models.llada.model:build_model", "gptoughts.models.llada.model:build_objective", is_causal=False,
    chosen_by="--model.attention mha",
)  # fmt: skip
_LLADA = replace(
    _LLADA_DENSE,
    variants=tuple(
        replace(_LLADA_DENSE, config_class=config_class, presets=presets, chosen_by=chosen_by)
        for config_class, presets, chosen_by in (
            (LLaDALatentConfig, LATENT_PRESETS, "--model.attention mla"),
            (LLaDAExpertConfig, EXPERT_PRESETS, "--model.num_moe_experts N"),
            (LLaDALatentExpertConfig, LATENT_EXPERT_PRESETS, "--model.attention mla --model.num_moe_experts N"),
        )
    ),
)

FAMILIES: dict[str, Family] = {family.name: family for family in (_GPT, _MLA, _DEEPSEEK, _LLADA)}
"""Name -> family; ``--model_type`` takes these names."""

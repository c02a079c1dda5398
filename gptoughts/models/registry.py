"""The table of model families: one line each; builders are dotted paths, so that this file loads no torch."""

from __future__ import annotations

from gptoughts.models.family import Family
from gptoughts.models.gpt.config import GPTConfig
from gptoughts.models.gpt.presets import GPT_PRESETS
from gptoughts.models.mla.config import MLAConfig
from gptoughts.models.mla.presets import MLA_PRESETS

_CAUSAL_LM = "gptoughts.objectives.causal_lm:CausalLM"

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("gpt", "Llama-style decoder", GPTConfig, GPT_PRESETS, "gptoughts.models.gpt.model:build_model", _CAUSAL_LM),
        Family("mla", "dense decoder with multi-head latent attention", MLAConfig, MLA_PRESETS,
               "gptoughts.models.mla.model:build_model", _CAUSAL_LM),
    )  # fmt: skip
}
"""Name -> family; ``--model_type`` takes these names."""

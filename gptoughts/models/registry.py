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

FAMILIES: dict[str, Family] = {}
"""Name -> family; ``--model_type`` takes these names. :func:`register` fills it."""


def register(family: Family) -> None:
    """Enter a family into the table, which is all that makes it known to every program.

    Raises:
        ValueError: its name is taken, or it contradicts itself; says all that is wrong.
    """
    problems = [f"{family.name}: a family of this name is registered"] if family.name in FAMILIES else []
    problems += family.problems()
    if problems:
        raise ValueError("\n".join(problems))
    FAMILIES[family.name] = family


register(
    Family("gpt", "Llama-style decoder", GPTConfig, GPT_PRESETS, "gptoughts.models.gpt.model:build_model", _CAUSAL_LM)
)
register(
    Family(
        "mla", "dense decoder with multi-head latent attention", MLAConfig, MLA_PRESETS,
        "gptoughts.models.mla.model:build_model", _CAUSAL_LM,
    )
)  # fmt: skip
register(
    Family(
        "deepseek", "decoder with multi-head latent attention and a fine-grained mixture of experts", DeepSeekConfig,
        DEEPSEEK_PRESETS, "gptoughts.models.deepseek.model:build_model", _CAUSAL_LM,
    )
)  # fmt: skip

_LLADA_DENSE = Family(
    "llada", "masked-diffusion language model", LLaDAConfig, LLADA_PRESETS,
    "gptoughts.models.llada.model:build_model", "gptoughts.models.llada.model:build_objective", is_causal=False,
    chosen_by="--model.attention mha",
)  # fmt: skip
register(
    replace(
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
)

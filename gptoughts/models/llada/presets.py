"""Shapes of the family ``llada``.

The house sizes are those of ``gpt`` (GPT-3's table 2.1, adapted), so that the two objectives can be compared at equal
size; one entry of the vocabulary is left to the mask token.
"""

from __future__ import annotations

import dataclasses

from gptoughts.models.family import Preset
from gptoughts.models.gpt.presets import GPT_PRESETS
from gptoughts.models.llada.config import LLaDAConfig

_HOUSE_SIZES = ("debug", "small", "medium", "large", "xl")


def _like_gpt(preset: Preset) -> Preset:
    shape = dataclasses.asdict(preset.model)
    model = LLaDAConfig(**shape | {"vocab_size": preset.model.vocab_size - 1})
    return dataclasses.replace(preset, model=model)


LLADA_PRESETS = {size: _like_gpt(GPT_PRESETS[size]) for size in _HOUSE_SIZES} | {
    "llada-8b": Preset(
        model=LLaDAConfig(num_layers=32, hidden_size=4096, ffn_hidden_size=12288, num_attention_heads=32,
                          vocab_size=126464, seq_length=4096, rotary_base=500000, mask_token_id=126336),
        source="https://huggingface.co/GSAI-ML/LLaDA-8B-Base/blob/main/config.json; learning rate: arXiv:2502.09992, "
        "section 2.2",
        num_parameters=8_015_581_184,
        lr=4e-4,
        batch_size=1,
    ),
}  # fmt: skip
"""Size -> preset."""

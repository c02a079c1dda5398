"""Shapes of the family ``relu2``: the house sizes of ``gpt`` with a feed-forward half of width 4 h."""

from __future__ import annotations

from dataclasses import asdict, replace

from gptoughts.models.family import Preset
from gptoughts.models.gpt.presets import GPT_PRESETS
from tests.models.relu2.config import ReLU2Config

_COUNTS = {
    "debug": 7_342_336, "small": 135_285_504, "medium": 369_148_928, "large": 780_215_808, "xl": 1_543_604_224,
}  # fmt: skip


def _ungated(preset: Preset, num_parameters: int) -> Preset:
    shape = asdict(preset.model) | {"ffn_hidden_size": 4 * preset.model.hidden_size}
    source = f"{preset.source}; width of the feed-forward half as there"
    return replace(preset, model=ReLU2Config(**shape), num_parameters=num_parameters, source=source)


RELU2_PRESETS = {size: _ungated(GPT_PRESETS[size], count) for size, count in _COUNTS.items()}
"""Size -> preset."""

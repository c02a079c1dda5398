"""What ``--init_from`` names: a Hugging Face folder, a run or a checkpoint, and the shape of its model; no torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from gptoughts.checkpoint import layout
from gptoughts.checkpoint.huggingface.formats import is_huggingface, read_published
from gptoughts.config.cli import from_yaml
from gptoughts.config.model import ModelConfig
from gptoughts.errors import CheckpointError, GptoughtsError
from gptoughts.models.registry import FAMILIES

_FREE_FIELDS = (
    "layernorm_epsilon", "rotary_base", "rotary_scaling", "rotary_scaling_factor",
    "rotary_low_freq_factor", "rotary_high_freq_factor", "original_max_position_embeddings",
)  # fmt: skip
"""Fields that no tensor depends on: a run may start from weights with others (a longer context, for one)."""
_ADAPTED_FIELDS = ("is_shifted",)
"""Fields that a start from another family's weights proposes and does not need."""


def read_origin(path: str) -> tuple[str, ModelConfig]:
    """Family and shape of the model at ``path``.

    Raises:
        CheckpointError, ConfigError: nothing there that a run can start from.
    """
    folder = Path(path)
    if is_huggingface(folder):
        published = read_published(folder)
        return published.format.family, published.model
    try:
        checkpoint = layout.locate(folder)
    except CheckpointError as error:
        raise CheckpointError([*error.problems, "nor is there a Hugging Face folder with a config.json"]) from None
    file = checkpoint / layout.CONFIG
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from None
    config = from_yaml(text, FAMILIES, label=str(file))
    return config.model_type, config.model.filled()


def origin_tokenizer(path: str) -> Path | None:
    """tokenizer.json of the model at ``path``; None where none lies there.

    Raises:
        CheckpointError: nothing there that a run can start from.
    """
    folder = Path(path)
    file = (folder if is_huggingface(folder) else layout.locate(folder)) / layout.TOKENIZER
    return file if file.is_file() else None


def shape_contradictions(path: str, wanted: ModelConfig) -> list[str]:
    """A line for each field of ``wanted`` with which the tensors at ``path`` would not fit."""
    try:
        family, origin = read_origin(path)
    except GptoughtsError:
        return []  # said by whoever took the shape from there
    here = dataclasses.asdict(wanted.filled())
    there = type(wanted).adopted(origin)
    if there is None and not FAMILIES[family].holds(wanted):
        return []  # said by the command line's check
    if there is None:
        there = dataclasses.asdict(origin.filled())
    else:
        settled = {*_ADAPTED_FIELDS, *wanted.CHOICES}  # the command line's check has looked at the choices
        here = {name: value for name, value in here.items() if name in there and name not in settled}
    return [
        f"model.{name}={value}: init_from={path} has {there.get(name)}; leave it out"
        for name, value in here.items()
        if name not in {*_FREE_FIELDS, *wanted.RUN_ONLY_FIELDS} and value != there.get(name)
    ]

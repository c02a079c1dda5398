"""The table of published formats, and config.json files; imports no torch."""

from __future__ import annotations

import dataclasses
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptoughts.checkpoint.huggingface import deepseek, deepseek_moe, llada, llama
from gptoughts.checkpoint.huggingface.base import Format
from gptoughts.checkpoint.huggingface.deepseek import MTP_FIELD
from gptoughts.checkpoint.huggingface.fp8 import BlockQuantization, read_quantization
from gptoughts.config.model import ModelConfig
from gptoughts.errors import CheckpointError

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FORMATS: tuple[Format, ...] = (*llama.FORMATS, *deepseek.FORMATS, *deepseek_moe.FORMATS, *llada.FORMATS)


@dataclass(frozen=True)
class Published:
    """A config.json that has been understood."""

    format: Format
    model: ModelConfig
    quantization: BlockQuantization | None = None
    """How the weights are stored where they are quantized."""


def is_huggingface(folder: Path) -> bool:
    """Whether a folder is a Hugging Face model."""
    return (folder / CONFIG_FILE).is_file()


def read_published(folder: Path) -> Published:
    """The format and shape of a Hugging Face folder.

    Raises:
        CheckpointError: no config.json, or all that it says which cannot be held here.
    """
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        model_type = config.get("model_type")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); a Hugging Face folder has one") from None
    except (ValueError, AttributeError):
        raise CheckpointError(f"{path}: no JSON object") from None
    return understand(_without_absent_prediction(folder, config), model_type, str(path))


def _without_absent_prediction(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """transformers drops multi-token prediction's tensors and leaves their number in config.json: believe the files."""
    place = f"model.layers.{config.get('num_hidden_layers')}."
    if not config.get(MTP_FIELD) or any(name.startswith(place) for name in _tensor_names(folder)):
        return config
    return config | {MTP_FIELD: 0}


def _tensor_names(folder: Path) -> list[str]:
    """Names in a folder's safetensors, from the index or the one file's header; none where it has neither."""
    index, single = folder / INDEX_FILE, folder / SINGLE_FILE
    try:
        if index.is_file():
            return list(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        with single.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            return list(json.loads(file.read(min(length, single.stat().st_size))))
    except (OSError, ValueError, KeyError, struct.error):
        return []  # whoever reads the tensors says what is wrong with them


def understand(config: dict[str, Any], model_type: str | None, label: str) -> Published:
    """As :func:`read_published`, from the file's content.

    Raises:
        CheckpointError: it says what cannot be held here; ``label`` names it.
    """
    problems: list[str] = []
    try:
        found = next((one for one in FORMATS if one.model_type == model_type and one.is_for(config)), None)
        model = found.read(config, problems) if found is not None else None
    except (TypeError, ValueError) as error:
        raise CheckpointError([f"{label}: {p}" for p in problems] + [f"{label}: a value of no use: {error}"]) from None
    if found is None:
        known = ", ".join(dict.fromkeys(one.model_type for one in FORMATS))
        raise CheckpointError(f"{label}: model_type={model_type!r}: not one of those that convert: {known}")
    if model is not None:
        problems += _kind_problems(model) or model.problems()
    if problems or model is None:
        raise CheckpointError([f"{label}: {problem}" for problem in problems])
    return Published(found, model, read_quantization(config, []))


_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"), "float": ((int, float), "a number"), "bool": ((bool,), "true or false"),
}  # fmt: skip


def _kind_problems(model: ModelConfig) -> list[str]:
    """A line for each field that a file filled with a value of another kind."""
    found = []
    for field in dataclasses.fields(model):
        value = getattr(model, field.name)
        kinds, words = _KINDS.get(str(field.type).removesuffix(" | None"), ((object,), ""))
        if value is not None and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
            found.append(f"{field.name}={value!r}: {words} is needed")
    return found


def format_for(family: str, model: ModelConfig) -> Format:
    """The first format that can hold a shape of ours.

    Raises:
        CheckpointError: none can; says why for each.
    """
    problems = []
    for one in FORMATS:
        if one.family == family:
            refusals = one.refusals(model)
            if not refusals:
                return one
            problems.append(f"{one.model_type} cannot hold this model: {', '.join(refusals)}")
    if not problems:
        known = ", ".join(sorted({one.family for one in FORMATS}))
        problems = [f"model_type={family}: has no Hugging Face format; families that have: {known}"]
    raise CheckpointError(problems)

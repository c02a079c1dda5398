"""Whole weights from a checkpoint of any layout, ready to run on this one process."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from gptoughts.checkpoint import layout
from gptoughts.checkpoint.portable import BUFFER, WEIGHT, CheckpointReader
from gptoughts.config.cli import from_yaml
from gptoughts.config.experiment import ExperimentConfig, ParallelConfig
from gptoughts.data.tokenizer import Tokenizer, load_tokenizer
from gptoughts.errors import CheckpointError
from gptoughts.models.language_model import global_buffer_names, global_parameter_names
from gptoughts.models.registry import FAMILIES
from gptoughts.parallel import groups
from gptoughts.platform import device


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode with its tokenizer and the configuration that it was trained with."""

    model: nn.Module
    tokenizer: Tokenizer
    config: ExperimentConfig
    checkpoint: Path


def load_model(path: Path) -> LoadedModel:
    """Read a run's newest checkpoint, or the one at ``path``, onto one device (fp32 on a CPU, bf16 on CUDA).

    Raises:
        CheckpointError: there is none, a file is damaged, or names and shapes are not those of its configuration.
        DataError: it carries no readable tokenizer.
    Collective: none; makes the groups of a world of this one process.
    """
    folder = layout.locate(path)
    layout.check_files(folder)
    if not (folder / layout.TOKENIZER).is_file():
        raise CheckpointError(f"{folder}: carries no {layout.TOKENIZER}, so prompts cannot be read")
    saved = from_yaml((folder / layout.CONFIG).read_text(encoding="utf-8"), FAMILIES)
    # FP8 is a way to train: checkpoints hold the weights that it rounds.
    config = dataclasses.replace(saved, parallel=ParallelConfig(), use_fp8=False)
    groups.initialize(config.parallel, seed=config.seed)
    dtype = torch.bfloat16 if device.is_cuda() else torch.float32
    model = FAMILIES[config.model_type].load_model_builder()(config, params_dtype=dtype)
    _fill(model, CheckpointReader(folder))
    model.eval()
    return LoadedModel(model, load_tokenizer(folder / layout.TOKENIZER), config, folder)


def _fill(model: nn.Module, reader: CheckpointReader) -> None:
    parameters = global_parameter_names(model)
    buffers = global_buffer_names(model)
    reader.check_names([], names=parameters)
    with torch.no_grad():
        for tensors, kind in ((parameters, WEIGHT), (buffers, BUFFER)):
            for name, tensor in tensors.items():
                value = reader.full(name, kind)
                if value.shape != tensor.shape:
                    raise CheckpointError(
                        f"{reader.folder}: {name} has shape {tuple(value.shape)}, {tuple(tensor.shape)} expected"
                    )
                tensor.copy_(value)

"""Models ready to be run, from a checkpoint of any layout or a Hugging Face folder, on one rank or several.

The world that a launcher started is one tensor-parallel group, unless said otherwise: each rank holds its part of every
layer.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from gptoughts.checkpoint import layout
from gptoughts.checkpoint.huggingface.formats import is_huggingface, read_published
from gptoughts.checkpoint.huggingface.weights import HuggingFaceWeights
from gptoughts.checkpoint.manager import check_files_together
from gptoughts.checkpoint.portable import BUFFER, WEIGHT, CheckpointReader
from gptoughts.config.cli import from_yaml
from gptoughts.config.experiment import ExperimentConfig, ParallelConfig
from gptoughts.data.tokenizer import Tokenizer, load_tokenizer
from gptoughts.engine.interface import StateFragment
from gptoughts.errors import CheckpointError, ConfigError
from gptoughts.inference.precisions import PRECISIONS
from gptoughts.models.initialization import partition_of
from gptoughts.models.language_model import global_buffer_names, global_parameter_names
from gptoughts.models.registry import FAMILIES
from gptoughts.parallel import groups
from gptoughts.platform import device

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
assert tuple(_DTYPES) == PRECISIONS


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode with its tokenizer and the configuration that it was trained with."""

    model: nn.Module
    tokenizer: Tokenizer
    config: ExperimentConfig
    checkpoint: Path
    """The folder that was read."""

    @property
    def context_tokens(self) -> int:
        """Tokens of the longest sequence that it was trained with."""
        return self.config.block_size or self.config.model.seq_length


def load_model(path: Path, *, precision: str | None = None, tensor_size: int | None = None) -> LoadedModel:
    """Read a run's newest checkpoint, the one at ``path``, or a Hugging Face folder.

    Args:
        path: Where it is.
        precision: Of weights and products, of ``PRECISIONS``; unset: bf16 on CUDA, fp32 on a CPU.
        tensor_size: Ranks that divide each layer; what they leave of the world are replicas. Unset: the whole world.

    Raises:
        CheckpointError: there is none, a file is damaged, names and shapes are not those of its configuration, or it
            carries no tokenizer, or one that is larger than its embedding.
        ConfigError: the model cannot be divided over the ranks.
        DataError: its tokenizer is unreadable.
    Collective: every rank of the world; makes its groups.
    """
    if tensor_size is None:
        tensor_size = int(os.environ.get("WORLD_SIZE", "1"))
    folder = path if is_huggingface(path) else layout.locate(path)
    if not (folder / layout.TOKENIZER).is_file():
        raise CheckpointError(f"{folder}: carries no {layout.TOKENIZER}, so prompts cannot be read")
    config = read_config(folder)
    config = dataclasses.replace(
        config,
        parallel=ParallelConfig(tensor=tensor_size),
        # FP8 is a way to train: checkpoints hold the weights that it rounds.
        use_fp8=False,
        # Our layers are those that decode from a cache.
        train=dataclasses.replace(config.train, transformer_impl="local"),
    )
    _check_division(config)
    groups.initialize(config.parallel, seed=config.seed)
    dtype = _DTYPES[precision or ("bf16" if device.is_cuda() else "fp32")]
    if is_huggingface(folder):
        weights: HuggingFaceWeights | CheckpointReader = HuggingFaceWeights(folder)
    else:
        check_files_together(folder)
        weights = CheckpointReader(folder)
    tokenizer = load_tokenizer(folder / layout.TOKENIZER)
    if tokenizer.vocab_size > config.model.padded_vocab_size:
        raise CheckpointError(
            f"{folder / layout.TOKENIZER}: {tokenizer.vocab_size} tokens, but the model's embedding has "
            f"{config.model.padded_vocab_size} rows; the tokenizer of its training is needed"
        )
    model = FAMILIES[config.model_type].load_model_builder()(config, params_dtype=dtype)
    _fill(model, weights)
    model.eval()
    return LoadedModel(model, tokenizer, config, folder)


def read_config(folder: Path) -> ExperimentConfig:
    """The configuration of a checkpoint or Hugging Face folder, with the layout that it was trained in.

    Raises:
        CheckpointError: it cannot be read or held here.
    """
    if is_huggingface(folder):
        published = read_published(folder)
        return ExperimentConfig(
            model_type=published.format.family, block_size=published.model.seq_length, model=published.model
        )
    file = folder / layout.CONFIG
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error})") from None
    return from_yaml(text, FAMILIES, label=str(file))


def _check_division(config: ExperimentConfig) -> None:
    size = config.parallel.tensor
    problems = [
        f"the model cannot be divided over {size} ranks: {name}={count} is not divisible by {size}"
        for name, count in config.model.tensor_parallel_divisors().items()
        if count % size
    ]
    if problems:
        raise ConfigError(problems)


def _fill(model: nn.Module, weights: HuggingFaceWeights | CheckpointReader) -> None:
    parameters = global_parameter_names(model)
    if isinstance(weights, HuggingFaceWeights):
        weights.check_names(parameters)
    else:
        weights.check_names([], names=parameters)
    rank, size = groups.tensor_parallel_rank(), groups.tensor_parallel_size()
    with torch.no_grad():
        for tensors, kind in ((parameters, WEIGHT), (global_buffer_names(model), BUFFER)):
            for name, tensor in tensors.items():
                wanted = _fragment(name, kind, tensor)
                tensor.copy_(weights.fragment(wanted, tensor_rank=rank, tensor_size=size).view(tensor.shape))


def _fragment(name: str, kind: str, tensor: Tensor) -> StateFragment:
    """This rank's whole part of a tensor."""
    dim, stride = partition_of(tensor)
    return StateFragment(
        name=name,
        kind=kind,
        tensor=tensor.detach().view(-1),
        start=0,
        shard_shape=tuple(tensor.shape),
        partition_dim=dim,
        partition_stride=stride,
        is_owner=True,
    )

"""``--init_from``: weights of another model into a fresh engine; optimizer, step and data start from nothing."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from gptoughts.checkpoint import layout
from gptoughts.checkpoint.huggingface.formats import is_huggingface
from gptoughts.checkpoint.huggingface.weights import HuggingFaceWeights
from gptoughts.checkpoint.portable import BUFFER, WEIGHT, CheckpointReader
from gptoughts.engine.interface import Engine, StateFragment
from gptoughts.errors import CheckpointError
from gptoughts.parallel import groups


def load_initial_weights(path: Path, engine: Engine, names: Iterable[str]) -> Path:
    """Fill the engine's weights and buffers (biases of routers); moments and counters stay as they are.

    Args:
        path: A Hugging Face folder, a run, or a checkpoint.
        engine: Freshly built.
        names: Global parameter names of its model.
    Returns:
        The folder that was read.
    Raises:
        CheckpointError: on every rank: damaged, or other names and shapes than this model's.
    Collective: every rank of the world.
    """
    source, folder = _open(path, list(names))
    tensor_rank, tensor_size = groups.tensor_parallel_rank(), groups.tensor_parallel_size()

    def read(fragment: StateFragment) -> Tensor:
        if fragment.kind not in (WEIGHT, BUFFER):
            return fragment.tensor
        return source.fragment(fragment, tensor_rank=tensor_rank, tensor_size=tensor_size)

    engine.load_state(read, engine.scalar_state())
    return folder


def _open(path: Path, names: list[str]) -> tuple[HuggingFaceWeights | CheckpointReader, Path]:
    if is_huggingface(path):
        weights = HuggingFaceWeights(path)
        weights.check_names(names)
        return weights, path
    folder = layout.locate(path)
    _check_files(folder)
    reader = CheckpointReader(folder)
    reader.check_names([], names=names)
    return reader, folder


def _check_files(folder: Path) -> None:
    """Rank 0 reads all files once; every rank learns what it found. Collective: every rank of the world."""
    problems: list[list[str]] = [[]]
    if dist.get_rank() == 0:
        try:
            layout.check_files(folder)
        except CheckpointError as error:
            problems = [error.problems]
    dist.broadcast_object_list(problems, src=0)
    if problems[0]:
        raise CheckpointError(problems[0])

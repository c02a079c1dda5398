"""Weights of a Hugging Face folder as training reads them: any piece of any of our tensors, for any layout."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from gptoughts.checkpoint.huggingface.formats import read_published
from gptoughts.checkpoint.huggingface.importing import import_problems
from gptoughts.checkpoint.huggingface.tensor_files import TensorFolder
from gptoughts.engine.interface import StateFragment
from gptoughts.errors import CheckpointError
from gptoughts.parallel import partition


class HuggingFaceWeights:
    """Reads by our global names; memory stays at a few tensors.

    Raises:
        CheckpointError: every unknown, missing or wrong-shaped tensor, by name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        published = read_published(folder)
        self._tensors = TensorFolder(folder)
        entries = published.format.entries(published.model)
        problems = import_problems(self._tensors, entries)
        if problems:
            raise CheckpointError([f"{folder}: {problem}" for problem in problems])
        self._entries = {entry.ours: entry for entry in entries}

    def check_names(self, names: Iterable[str]) -> None:
        """Compare names with those of the live model.

        Raises:
            CheckpointError: lists every name that only one side has.
        """
        only_one_side = sorted(set(names) ^ self._entries.keys())
        if only_one_side:
            raise CheckpointError([f"{self.folder}: {name}: is in one of both models only" for name in only_one_side])

    def fragment(self, wanted: StateFragment, *, tensor_rank: int, tensor_size: int) -> Tensor:
        """What a live fragment of weights should hold.

        Raises:
            CheckpointError: the tensor has another shape.
        """
        entry = self._entries[wanted.name]
        whole = entry.transform.join([self._tensors.read(name) for name in entry.theirs])
        part = partition.split(whole, wanted.partition_dim, wanted.partition_stride, tensor_rank, tensor_size)
        if tuple(part.shape) != wanted.shard_shape:
            raise CheckpointError(
                f"{self.folder}: {wanted.name} has shard shape {tuple(part.shape)} there, {wanted.shard_shape} here"
            )
        return part.reshape(-1)[wanted.start : wanted.start + wanted.tensor.numel()]

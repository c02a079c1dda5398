"""Weights of a Hugging Face folder as training reads them: any piece of any of our tensors, for any layout."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from gptoughts.checkpoint.huggingface.base import Entry
from gptoughts.checkpoint.huggingface.formats import read_published
from gptoughts.checkpoint.huggingface.importing import import_problems
from gptoughts.checkpoint.huggingface.tensor_files import TensorFolder
from gptoughts.checkpoint.portable import WEIGHT
from gptoughts.checkpoint.safetensors_file import DTYPES
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
        # A run keeps fp32 weights, so FP8 matrices are not rounded on the way.
        self._tensors = TensorFolder(folder, published.quantization, "F32")
        entries = published.format.entries(published.model)
        problems = import_problems(self._tensors, entries)
        if problems:
            raise CheckpointError([f"{folder}: {problem}" for problem in problems])
        self._entries = {entry.ours: entry for entry in entries}

    def names(self, kind: str = WEIGHT) -> list[str]:
        """Our names of all tensors of a kind."""
        return [name for name, entry in self._entries.items() if entry.kind == kind]

    def check_names(self, names: Iterable[str]) -> None:
        """Compare names with those of the live model.

        Raises:
            CheckpointError: lists every name that only one side has.
        """
        only_one_side = sorted(set(names) ^ set(self.names()))
        if only_one_side:
            raise CheckpointError([f"{self.folder}: {name}: is in one of both models only" for name in only_one_side])

    def full(self, name: str) -> Tensor:
        """One of our weights, whole."""
        return self._whole(self._entries[name])

    def fragment(self, wanted: StateFragment, *, tensor_rank: int, tensor_size: int) -> Tensor:
        """What a live fragment of a weight or buffer should hold, in the dtype of the files.

        Raises:
            CheckpointError: the tensor has another shape.
        """
        entry = self._entries[wanted.name]
        dim, stop = wanted.partition_dim, wanted.start + wanted.tensor.numel()
        if entry.slices is not None and dim != 0:
            return self._of_slices(entry, wanted, stop, tensor_rank, tensor_size)
        part = partition.split(self._whole(entry), dim, wanted.partition_stride, tensor_rank, tensor_size)
        self._check_shape(entry, tuple(part.shape), wanted)
        return part.reshape(-1)[wanted.start : stop]

    def _of_slices(self, entry: Entry, wanted: StateFragment, stop: int, tensor_rank: int, tensor_size: int) -> Tensor:
        """Only the experts that the fragment reaches, one after the other."""
        sources = entry.sources()
        dim = None if wanted.partition_dim is None else wanted.partition_dim - 1
        numel = math.prod(wanted.shard_shape[1:])
        out = torch.empty(stop - wanted.start, dtype=DTYPES[self._tensors.headers[sources[0][0]].dtype])
        for number in range(wanted.start // numel, -(-stop // numel)):
            part = partition.split(
                self._joined(entry, sources[number % len(sources)]),
                dim,
                wanted.partition_stride,
                tensor_rank,
                tensor_size,
            )
            self._check_shape(entry, (len(sources), *part.shape), wanted)
            first, last = max(wanted.start, number * numel), min(stop, (number + 1) * numel)
            source = part.reshape(-1)[first - number * numel : last - number * numel]
            out[first - wanted.start : last - wanted.start] = source
        return out

    def _joined(self, entry: Entry, names: list[str]) -> Tensor:
        return entry.transform.join([self._tensors.read(name) for name in names])

    def _whole(self, entry: Entry) -> Tensor:
        found = [self._joined(entry, names) for names in entry.sources()]
        return found[0] if entry.slices is None else torch.stack(found)

    def _check_shape(self, entry: Entry, found: tuple[int, ...], wanted: StateFragment) -> None:
        if found != wanted.shard_shape:
            raise CheckpointError(
                f"{self.folder}: {entry.ours} has shard shape {found} there, {wanted.shard_shape} here"
            )

"""Training state in files that know tensors by their global names, whatever layout wrote them.

Every rank writes the fragments that it owns (``engine.interface.StateFragment``) into one safetensors file, under keys
``kind/start/name``. The file's metadata says how each tensor was divided. A reader puts any piece together again: for
the layout that wrote it each fragment is read back as it was; for another one shards are merged and divided anew.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptoughts.checkpoint import layout
from gptoughts.checkpoint.safetensors_file import TensorHeader, write_file
from gptoughts.engine.interface import StateFragment
from gptoughts.errors import CheckpointError
from gptoughts.parallel import partition
from gptoughts.platform import device

WEIGHT = "weight"
BUFFER = "buffer"
KINDS = (WEIGHT, "exp_avg", "exp_avg_sq", BUFFER)
"""All that a fragment can be (``engine.interface.StateFragment.kind``)."""
_RNG_PREFIX = "rng/"


class ShardContent:
    """What this rank's file is to hold: the fragments that it owns, and the state of its random number generators.

    Args:
        fragments: All of this rank's fragments; those of another owner are left out.
        rng: State of each random number generator of this rank, uint8.
        tensor_rank: This rank's place in its tensor-parallel group.
        tensor_size: Ranks of that group.
    """

    def __init__(
        self, fragments: Iterable[StateFragment], rng: Mapping[str, Tensor], *, tensor_rank: int, tensor_size: int
    ) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._fragments: dict[str, StateFragment] = {}
        self._problem: OSError | None = None
        table: dict[str, Any] = {}
        for fragment in fragments:
            if fragment.is_owner:
                key = f"{fragment.kind}/{fragment.start}/{fragment.name}"
                self._tensors[key] = fragment.tensor.detach()
                self._fragments[key] = fragment
                table[key] = [list(fragment.shard_shape), fragment.partition_dim, fragment.partition_stride]
        # Bytes last: what is wider stays aligned.
        self._tensors |= {_RNG_PREFIX + name: state for name, state in rng.items()}
        self._metadata = {
            "tensor_rank": str(tensor_rank), "tensor_size": str(tensor_size), "fragments": json.dumps(table)
        }  # fmt: skip

    def copy(self, buffers: dict[str, Tensor]) -> None:
        """Go on with a copy on the host (``StateFragment.empty_copy``); from then on the state may change.

        Args:
            buffers: Where copies lie; kept by the caller, so that the next copy takes no new memory.

        A copy on a disk that is full is a problem of :meth:`write`: training goes on.
        """
        try:
            with device.background_stream():
                for key, tensor in self._tensors.items():
                    buffer = buffers.get(key)
                    if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                        fragment = self._fragments.get(key)
                        buffer = buffers[key] = torch.empty_like(tensor) if fragment is None else fragment.empty_copy()
                    self._tensors[key] = buffer.copy_(tensor, non_blocking=True)
        except OSError as error:
            self._problem = error
        for key in buffers.keys() - self._tensors.keys():
            del buffers[key]

    def write(self, path: Path) -> layout.FileRecord:
        """Write the file and flush it to the disk.

        Raises:
            OSError: the disk is full or cannot be written, also that of the copy.
        """
        if self._problem is not None:
            raise self._problem
        headers = [TensorHeader.of(key, tensor) for key, tensor in self._tensors.items()]
        return write_file(path, headers, lambda key: [self._tensors[key].cpu()], metadata=self._metadata)


@dataclass(frozen=True)
class _Piece:
    """A saved fragment: where it is and which part of its shard it holds."""

    file: Path
    key: str
    start: int
    stop: int


@dataclass(frozen=True)
class SavedTensor:
    """How a tensor was divided when it was saved."""

    shard_shape: tuple[int, ...]
    partition_dim: int | None
    partition_stride: int
    tensor_size: int

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        if self.partition_dim is None:
            return self.shard_shape
        shape = list(self.shard_shape)
        shape[self.partition_dim] *= self.tensor_size
        return tuple(shape)

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.full_shape)

    @property
    def division(self) -> str:
        """How it was divided, in words."""
        if self.partition_dim is None or self.tensor_size == 1:
            return "whole"
        return f"dimension {self.partition_dim} over {self.tensor_size} tensor-parallel ranks"


class CheckpointReader:
    """Reads tensors of one checkpoint by global name, for any layout; memory stays at a few tensors.

    Raises:
        CheckpointError: a file is missing or unreadable; names it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = layout.read_manifest(folder)
        self._pieces: dict[tuple[str, str, int], list[_Piece]] = {}
        self._tensors: dict[tuple[str, str], SavedTensor] = {}
        self._open: dict[Path, Any] = {}
        for name in self.manifest["files"]:
            if name.endswith(".safetensors"):
                self._index(folder / name)

    def _index(self, path: Path) -> None:
        try:
            handle = safe_open(path, framework="pt")
            metadata = handle.metadata()
            table = json.loads(metadata["fragments"])
            tensor_rank, tensor_size = int(metadata["tensor_rank"]), int(metadata["tensor_size"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error})") from None
        self._open[path] = handle
        for key, (shard_shape, dim, stride) in table.items():
            kind, start, name = key.split("/", 2)
            numel = handle.get_slice(key).get_shape()[0]
            piece = _Piece(path, key, int(start), int(start) + numel)
            rank = 0 if dim is None else tensor_rank
            self._pieces.setdefault((name, kind, rank), []).append(piece)
            self._tensors[name, kind] = SavedTensor(tuple(shard_shape), dim, stride, 1 if dim is None else tensor_size)

    def names(self, kind: str = WEIGHT) -> list[str]:
        """Global names of all tensors of a kind."""
        return sorted(name for name, found in self._tensors if found == kind)

    def describe(self, name: str, kind: str = WEIGHT) -> SavedTensor:
        """How a tensor was divided when it was saved.

        Raises:
            CheckpointError: there is no such tensor.
        """
        try:
            return self._tensors[name, kind]
        except KeyError:
            raise CheckpointError(f"{self.folder}: holds no tensor {name!r} ({kind})") from None

    def dtype(self, name: str, kind: str = WEIGHT) -> torch.dtype:
        """Dtype in which a tensor is stored.

        Raises:
            CheckpointError: there is no such tensor.
        """
        self.describe(name, kind)
        piece = next(pieces[0] for key, pieces in self._pieces.items() if key[:2] == (name, kind))
        return self._open[piece.file].get_slice(piece.key)[:0].dtype

    def range(self, name: str, kind: str, rank: int, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of one saved, flattened shard, in the dtype that it was saved in.

        Raises:
            CheckpointError: the saved fragments do not cover the range.
        """
        parts: list[Tensor] = []
        reached = start
        for piece in sorted(self._pieces.get((name, kind, rank), []), key=lambda p: p.start):
            if piece.stop <= reached or piece.start >= stop:
                continue
            if piece.start > reached:
                break
            view = self._open[piece.file].get_slice(piece.key)
            upto = min(stop, piece.stop)
            parts.append(view[reached - piece.start : upto - piece.start])
            reached = upto
        if reached < stop:
            raise CheckpointError(f"{self.folder}: {name} ({kind}) lacks elements {reached} to {stop}")
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def full(self, name: str, kind: str = WEIGHT, index: int | None = None) -> Tensor:
        """A whole tensor in its global shape, on the CPU; with ``index`` that slice of its first dim alone."""
        saved = self.describe(name, kind)
        shape, dim = saved.shard_shape, saved.partition_dim
        ranks, start = range(saved.tensor_size), 0
        if index is not None:
            if dim == 0:  # the slice lies on one rank
                assert saved.partition_stride == 1, name
                ranks, index, dim = range(index // shape[0], index // shape[0] + 1), index % shape[0], None
            shape, dim = shape[1:], None if dim is None else dim - 1
            start = index * torch.Size(shape).numel()
        stop = start + torch.Size(shape).numel()
        shards = [self.range(name, kind, rank, start, stop).view(shape) for rank in ranks]
        return partition.merge(shards, dim, saved.partition_stride)

    def fragment(self, wanted: StateFragment, *, tensor_rank: int, tensor_size: int) -> Tensor:
        """What a live fragment of the present layout should hold.

        Raises:
            CheckpointError: the checkpoint has no such tensor, or one of another shape.
        """
        if wanted.initial is not None and (wanted.name, wanted.kind) not in self._tensors:
            return torch.full((wanted.tensor.numel(),), wanted.initial)
        saved = self.describe(wanted.name, wanted.kind)
        now_size = 1 if wanted.partition_dim is None else tensor_size
        stop = wanted.start + wanted.tensor.numel()
        if saved.tensor_size == now_size:
            if saved.shard_shape != wanted.shard_shape:
                raise CheckpointError(self._shape_problem(wanted, saved))
            rank = 0 if wanted.partition_dim is None else tensor_rank
            return self.range(wanted.name, wanted.kind, rank, wanted.start, stop)
        whole = self.full(wanted.name, wanted.kind)
        part = partition.split(whole, wanted.partition_dim, wanted.partition_stride, tensor_rank, tensor_size)
        if tuple(part.shape) != wanted.shard_shape:
            raise CheckpointError(self._shape_problem(wanted, saved))
        return part.reshape(-1)[wanted.start : stop]

    def _shape_problem(self, wanted: StateFragment, saved: SavedTensor) -> str:
        text = f"{self.folder}: {wanted.name} has shard shape {saved.shard_shape} there, {wanted.shard_shape} here"
        is_history = "amax_history" in wanted.name
        return f"{text}; fp8.amax_history_len stays the same within a run" if is_history else text

    def rng(self, rank: int) -> dict[str, Tensor]:
        """Generator states that one rank saved; empty where that rank did not exist."""
        handle = self._open.get(self.folder / layout.shard_file(rank))
        if handle is None:
            return {}
        keys = [key for key in handle.keys() if key.startswith(_RNG_PREFIX)]  # noqa: SIM118 (safe_open is no dict)
        return {key.removeprefix(_RNG_PREFIX): handle.get_tensor(key) for key in keys}

    def check_names(self, fragments: Sequence[StateFragment], *, names: Iterable[str]) -> None:
        """Compare parameter names with those of the live model.

        Raises:
            CheckpointError: lists every name that only one side has.
        """
        here, there = set(names), set(self.names())
        problems = [f"{self.folder}: has no tensor {name!r}, which this model needs" for name in sorted(here - there)]
        problems += [f"{self.folder}: has {name!r}, which this model does not have" for name in sorted(there - here)]
        kinds = {(fragment.name, fragment.kind) for fragment in fragments if fragment.initial is None}
        problems += [
            f"{self.folder}: has no {kind} of {name!r}"
            for name, kind in sorted(kinds)
            if (name, kind) not in self._tensors
        ]
        if problems:
            raise CheckpointError(sorted(set(problems)))

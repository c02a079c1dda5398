"""Whole weights from the files that DeepSpeed's ``engine.save_checkpoint`` writes under ZeRO 1, 2 and 3.

``TAG/*_model_states.pt`` says names, shapes and buffers; ``TAG/*zero_pp_rank_R_mp_rank_00_optim_states.pt`` holds rank
R's part of the fp32 weights (deepspeed/utils/zero_to_fp32.py, 0.19.8, reads the same files):

- stages 1 and 2: the parameters of an optimizer group lie one after the other (each followed by its alignment padding,
  where there is one) in one vector, and rank R has the R-th part of it;
- stage 3: each parameter is cut into equal parts over the ranks (the last one padded); a rank's parts lie one after the
  other in its sub-groups, and may go over from one sub-group to the next.

The files are pickles. They are opened with ``weights_only=True``; of DeepSpeed's own classes the few that it writes
there are replaced by stand-ins that do nothing. Anything else in a file is refused, by name.
"""

from __future__ import annotations

import math
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptoughts.errors import CheckpointError

_LATEST = "latest"
_MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_FOREIGN_FILES = {
    re.compile(r"layer_\d+-model_.*"): "DeepSpeed's pipeline engine wrote it",
    re.compile(r"(layer_\d+_)?expert_\d+_.*|expp_rank_.*"): "DeepSpeed's own expert layers wrote it",
}


class _StandIn:
    """In place of a DeepSpeed class; keeps nothing."""

    def __init__(self, *_arguments: Any) -> None:
        pass

    def __setstate__(self, _state: Any) -> None:
        pass


_ALLOWED: list[Any] = [
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_StandIn, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_StandIn, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_StandIn, "deepspeed.utils.tensor_fragment.fragment_address"),
]


class _Vector:
    """Flat tensors one after the other, read as one; nothing is copied before it is asked for."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.parts = [part.view(-1) for part in parts]
        self.numel = sum(part.numel() for part in self.parts)

    def pieces(self, start: int, stop: int) -> list[Tensor]:
        found, first = [], 0
        for part in self.parts:
            begin, end = max(start - first, 0), min(stop - first, part.numel())
            if begin < end:
                found.append(part[begin:end])
            first += part.numel()
        return found


class ZeroCheckpoint:
    """Whole tensors of one DeepSpeed checkpoint by name; files are mapped, not read, so memory holds a few tensors.

    Args:
        path: The folder given to ``save_checkpoint`` (its newest tag), or one tag's folder.

    Raises:
        CheckpointError: rank files are missing, damaged, hold what is not opened, or were written in a layout that the
            files alone do not explain; names them.
    """

    def __init__(self, path: Path) -> None:
        self.folder = _tag_folder(path)
        model_files, optimizer_files = _rank_files(self.folder)
        optimizer = {rank: _load(file).get("optimizer_state_dict", {}) for rank, file in optimizer_files.items()}
        first = optimizer[min(optimizer)]
        if "zero_stage" not in first:
            raise CheckpointError(f"{optimizer_files[min(optimizer)]}: no ZeRO state (zero_stage) in it")
        self.stage = int(first["zero_stage"])
        count = first["partition_count"]
        self.world_size = max(count) if isinstance(count, list) else int(count)
        _check_ranks(self.folder, optimizer_files, range(self.world_size), "optim")
        needed = range(self.world_size) if self.stage == 3 else range(1)
        _check_ranks(self.folder, model_files, needed, "model")
        self._models = [_load(model_files[rank]) for rank in needed]
        self._states = [optimizer[rank] for rank in range(self.world_size)]
        self._pieces: dict[str, list[Tensor]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Shape of every tensor, in the module's order."""
        shapes = self._models[0].get("param_shapes")
        if not shapes:
            raise CheckpointError(f"{model_files[0]}: does not say the parameters' shapes (param_shapes)")
        (self._add_stage_3 if self.stage == 3 else self._add_stage_2)(shapes)
        self._add_the_rest()

    def _add(self, name: str, shape: Sequence[int], pieces: list[Tensor]) -> None:
        self.shapes[name] = tuple(shape)
        self._pieces[name] = pieces
        wanted, found = math.prod(shape), sum(piece.numel() for piece in pieces)
        if found != wanted:
            raise CheckpointError(f"{self.folder}: {name} has {wanted} elements, the files hold {found} of them")

    def _add_stage_2(self, shapes: Sequence[Mapping[str, Sequence[int]]]) -> None:
        groups = [state["single_partition_of_fp32_groups"] for state in self._states]
        paddings = self._states[0].get("param_alignment_paddings") or [[0] * len(group) for group in shapes]
        for number, group in enumerate(shapes):
            vector, offset = _Vector([rank[number] for rank in groups]), 0
            for (name, shape), padding in zip(group.items(), paddings[number], strict=True):
                numel = math.prod(shape)
                self._add(name, shape, vector.pieces(offset, offset + numel))
                offset += numel + padding
            self._check_end(offset, vector.numel)

    def _add_stage_3(self, shapes: Sequence[Mapping[str, Sequence[int]]]) -> None:
        vectors = [_Vector(state["fp32_flat_groups"]) for state in self._states]
        offset = 0
        for group in shapes:
            for name, shape in group.items():
                left = numel = math.prod(shape)
                part = -(-numel // self.world_size)
                pieces = []
                for vector in vectors:
                    pieces += vector.pieces(offset, offset + min(part, left))
                    left -= min(part, left)
                self._add(name, shape, pieces)
                offset += part
        for vector in vectors:
            self._check_end(offset, vector.numel)

    def _check_end(self, used: int, available: int) -> None:
        """Partitions are padded to a multiple of 2 x ranks (runtime/zero/stage_1_and_2.py, nccl_start_alignment)."""
        if abs(available - used) > 2 * self.world_size:
            raise CheckpointError(f"{self.folder}: parameters take {used} elements, the files hold {available}")

    def _add_the_rest(self) -> None:
        """Parameters that were not trained, buffers, and second names of shared parameters."""
        model = self._models[0]
        for name, shape in (model.get("frozen_param_shapes") or {}).items():
            fragments = _Vector([found["frozen_param_fragments"][name] for found in self._models])
            self._add(name, shape, fragments.pieces(0, math.prod(shape)))
        shared = dict(model.get("shared_params") or {})
        for name, tensor in (model.get("module") or {}).items():
            # Stage 1 does not list frozen parameters; the module holds them whole. Under stage 3 it holds buffers only.
            if isinstance(tensor, Tensor) and name not in self.shapes and name not in shared:
                is_whole = self.stage < 3 or name in model["buffer_names"]
                if is_whole:
                    self._add(name, tensor.shape, [tensor.reshape(-1)])
        for name, original in shared.items():
            if original in self.shapes:
                self._add(name, self.shapes[original], self._pieces[original])

    def dtype(self, name: str) -> torch.dtype:
        """Dtype that a tensor is read in: fp32, or a buffer's own where it holds no fractions."""
        stored = self._pieces[name][0].dtype if self._pieces[name] else torch.float32
        return torch.float32 if stored.is_floating_point else stored

    def read(self, name: str) -> Tensor:
        """One whole tensor, on the CPU."""
        pieces = self._pieces[name]
        whole = torch.cat(pieces) if pieces else torch.empty(0)
        return whole.to(self.dtype(name)).view(self.shapes[name])


def _tag_folder(path: Path) -> Path:
    latest = path / _LATEST
    if latest.is_file():
        tag = latest.read_text(encoding="utf-8").strip()
        if not (path / tag).is_dir():
            raise CheckpointError(f"{latest}: names {tag!r}, and there is no such folder beside it")
        return path / tag
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    return path


def _rank_files(folder: Path) -> tuple[dict[int, Path], dict[int, Path]]:
    """Files with names and shapes, and with partitions, by data-parallel rank."""
    model: dict[int, Path] = {}
    optimizer: dict[int, Path] = {}
    model_parallel: set[int] = set()
    for path in sorted(folder.iterdir()):
        for pattern, reason in _FOREIGN_FILES.items():
            if pattern.fullmatch(path.name):
                raise CheckpointError(f"{path}: {reason}; only plain ZeRO checkpoints are read")
        for pattern, found in ((_MODEL_FILE, model), (_OPTIMIZER_FILE, optimizer)):
            if match := pattern.fullmatch(path.name):
                found[int(match[1] or 0)] = path
                model_parallel.add(int(match[2]))
    if model_parallel - {0}:
        raise CheckpointError(
            f"{folder}: was written with model parallelism (mp_rank_{max(model_parallel):02d}): these files do not say "
            "how tensors were divided; only data parallelism is read"
        )
    if not optimizer or not model:
        missing = "*_optim_states.pt" if model else "*_model_states.pt"
        raise CheckpointError(
            f"{folder}: holds no {missing}; a DeepSpeed checkpoint of ZeRO stage 1, 2 or 3 is needed (at stage 0 "
            "mp_rank_00_model_states.pt holds whole weights)"
        )
    return model, optimizer


def _check_ranks(folder: Path, found: Mapping[int, Path], needed: range, kind: str) -> None:
    missing = [rank for rank in needed if rank not in found]
    if missing:
        raise CheckpointError(
            [
                f"{folder}: zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt is missing; {len(needed)} ranks wrote it"
                for rank in missing
            ]
        )
    if kind == "optim" and len(found) > len(needed):
        raise CheckpointError(
            f"{folder}: has files of {len(found)} ranks, {len(needed)} wrote it: files of two checkpoints are mixed"
        )


def _check_content(path: Path) -> None:
    """Compare every record with its checksum, which torch.load does not.

    Raises:
        CheckpointError: one differs.
    """
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
    except (OSError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    if damaged is not None:
        raise CheckpointError(
            f"{path}: checksum of {damaged} differs: the file is damaged, or was written without checksums "
            "(torch.serialization.set_crc32_options)"
        )


def _load(path: Path) -> dict[str, Any]:
    if zipfile.is_zipfile(path):  # what else there is, torch.load names
        _check_content(path)
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        try:
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except (RuntimeError, OSError, pickle.UnpicklingError):
            raise CheckpointError(f"{path}: damaged, or no file of DeepSpeed's") from None
        known = {name for _, name in _ALLOWED}
        listed = ", ".join(sorted(set(names) - known)) or "something"
        raise CheckpointError(f"{path}: holds {listed}, which would have to be run to be read; not opened") from None
    except (OSError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: no file of DeepSpeed's")
    return found

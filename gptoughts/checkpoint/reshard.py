"""A checkpoint in the files of another layout: one per tensor- and pipeline-parallel rank, with that rank's slices.

Any layout reads any checkpoint, but puts whole tensors together and divides them anew. Where many ranks start from the
same weights again and again, files that are divided as these ranks are spare them that: each reads its own file's bytes
and no others. What is made is a checkpoint like any other, with all that the source holds but states of random number
generators.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from gptoughts.checkpoint import layout
from gptoughts.checkpoint.huggingface.output import Conversion, new_folder, progress
from gptoughts.checkpoint.portable import KINDS, WEIGHT, CheckpointReader
from gptoughts.checkpoint.safetensors_file import NAMES, TensorHeader, write_file
from gptoughts.config.cli import from_yaml
from gptoughts.config.model import ModelConfig
from gptoughts.errors import CheckpointError, ConfigError
from gptoughts.models.registry import FAMILIES
from gptoughts.parallel import partition

_DIVIDED = (
    (re.compile(r"(embedding\.word_embeddings|output_layer)\.weight"), 0, 1),
    (re.compile(r".*\.linear_(qkv|q_proj|q_down_proj|q_up_proj|kv_down_proj|kv_up_proj)\.(weight|bias)"), 0, 1),
    (re.compile(r".*\.linear_fc1\.weight"), 0, 2),
    (re.compile(r".*\.linear_(proj|fc2)\.weight"), 1, 1),
    (re.compile(r".*\.experts\.linear_fc1_weight"), 1, 2),
    (re.compile(r".*\.experts\.linear_fc2_weight"), 2, 1),
)
"""What tensor parallelism divides: name, dimension, stride (parallel/partition.py). All else is on every rank."""
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_STACKED = re.compile(r".*\.experts\.linear_fc[12]_weight")


@dataclass(frozen=True)
class Target:
    """The layout to divide for."""

    tensor: int
    pipeline: int

    def check(self, model: ModelConfig) -> None:
        """Raise ConfigError with everything that this layout cannot divide."""
        problems = [
            f"target_{name}_parallel={value} (command line): must be 1 or greater"
            for name, value in (("tensor", self.tensor), ("pipeline", self.pipeline))
            if value < 1
        ]
        if not problems:
            problems = [
                f"target_tensor_parallel={self.tensor} (command line): {name}={count} is not divisible by it"
                for name, count in model.tensor_parallel_divisors().items()
                if count % self.tensor
            ]
            if model.num_layers % self.pipeline:
                problems.append(
                    f"target_pipeline_parallel={self.pipeline} (command line): num_layers={model.num_layers} is not "
                    "divisible by it"
                )
        if problems:
            raise ConfigError(problems)

    def stage_of(self, name: str, num_layers: int) -> int:
        """The pipeline stage that holds a tensor: equal runs of layers, the embedding first, all else last."""
        if match := _LAYER.match(name):
            return int(match[1]) // (num_layers // self.pipeline)
        return 0 if name.startswith("embedding.") else self.pipeline - 1

    def file(self, tensor_rank: int, stage: int) -> str:
        """Megatron-LM's name of a rank's files."""
        name = f"mp_rank_{tensor_rank:02d}"
        return f"{name}_{stage:03d}.safetensors" if self.pipeline > 1 else f"{name}.safetensors"


def division_of(name: str) -> tuple[int | None, int]:
    """The dimension of a whole tensor that tensor parallelism divides (None: none), and the stride."""
    return next(((dim, stride) for pattern, dim, stride in _DIVIDED if pattern.fullmatch(name)), (None, 1))


def reshard(source: Path, output: Path, target: Target) -> Conversion:
    """Make a run folder with one checkpoint, of the same step, divided for ``target``.

    Args:
        source: A run (its newest checkpoint) or a checkpoint, of any layout.
        output: Run folder to make.
        target: Layout of the new files.
    Raises:
        CheckpointError: no good checkpoint; nothing is written.
        ConfigError: the model cannot be divided so; nothing is written.
    """
    checkpoint = layout.locate(source)
    layout.check_files(checkpoint)
    text = (checkpoint / layout.CONFIG).read_text(encoding="utf-8")
    model = from_yaml(text, FAMILIES, label=str(checkpoint)).model
    target.check(model)
    reader = CheckpointReader(checkpoint)
    tensors = [(name, kind) for kind in KINDS for name in reader.names(kind)]
    parts = {
        (rank, stage): [found for found in tensors if target.stage_of(found[0], model.num_layers) == stage]
        for stage in range(target.pipeline)
        for rank in range(target.tensor)
    }
    headers = {place: [_header(reader, *found, target.tensor) for found in part] for place, part in parts.items()}
    with (
        new_folder(output) as partial,
        progress("dividing", [header for part in headers.values() for header in part]) as written,
    ):
        folder = layout.step_folder(partial, int(reader.manifest["step"]))
        records = _copy_the_rest(checkpoint, folder, reader)
        for (rank, stage), part in headers.items():
            metadata = _metadata(reader, parts[rank, stage], rank, target.tensor)

            def read(key: str, rank: int = rank) -> Iterator[Tensor]:
                return _shard(reader, key, rank, target.tensor)

            name = target.file(rank, stage)
            records[name] = write_file(folder / name, part, read, metadata=metadata, written=written)
        kept = {key: value for key, value in reader.manifest.items() if key not in ("format_version", "files")}
        kept["layout"] = {"tensor": target.tensor, "pipeline": target.pipeline, "data": 1}
        kept["world_size"] = target.tensor * target.pipeline
        layout.write_manifest(folder, records, kept)
        layout.write_atomically(folder.parent / layout.LATEST, folder.name + "\n")
        shutil.copyfile(folder / layout.CONFIG, partial / layout.CONFIG)
    total = sum(reader.describe(name, kind).numel for name, kind in tensors if kind == WEIGHT)
    form = f"tensor parallel {target.tensor}, pipeline parallel {target.pipeline}"
    return Conversion(output, form, total, len(parts), 0)


def _shard_shape(reader: CheckpointReader, name: str, kind: str, size: int) -> tuple[int, ...]:
    shape, (dim, _) = list(reader.describe(name, kind).full_shape), division_of(name)
    if dim is not None:
        if shape[dim] % size:
            raise CheckpointError(f"{reader.folder}: {name} has shape {tuple(shape)}, not divisible by {size}")
        shape[dim] //= size
    return tuple(shape)


def _header(reader: CheckpointReader, name: str, kind: str, size: int) -> TensorHeader:
    numel = math.prod(_shard_shape(reader, name, kind, size))
    return TensorHeader(f"{kind}/0/{name}", NAMES[reader.dtype(name, kind)], (numel,))


def _metadata(reader: CheckpointReader, part: list[tuple[str, str]], rank: int, size: int) -> dict[str, str]:
    table = {
        f"{kind}/0/{name}": [list(_shard_shape(reader, name, kind, size)), *division_of(name)] for name, kind in part
    }
    return {"tensor_rank": str(rank), "tensor_size": str(size), "fragments": json.dumps(table)}


def _shard(reader: CheckpointReader, key: str, rank: int, size: int) -> Iterator[Tensor]:
    """A rank's slice, experts one by one."""
    kind, _, name = key.split("/", 2)
    dim, stride = division_of(name)
    if _STACKED.fullmatch(name) and dim is not None:
        for index in range(reader.describe(name, kind).full_shape[0]):
            yield partition.split(reader.full(name, kind, index), dim - 1, stride, rank, size)
    else:
        yield partition.split(reader.full(name, kind), dim, stride, rank, size)


def _copy_the_rest(checkpoint: Path, folder: Path, reader: CheckpointReader) -> dict[str, layout.FileRecord]:
    """Every file that holds no tensors."""
    records = {}
    folder.mkdir(parents=True)
    for name in reader.manifest["files"]:
        if not name.endswith(".safetensors"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint / name, folder / name)
            layout.sync_file(folder / name)
            records[name] = layout.FileRecord.of(folder / name)
    return records

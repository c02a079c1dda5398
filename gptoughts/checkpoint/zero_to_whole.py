"""A DeepSpeed ZeRO checkpoint becomes whole fp32 weights in safetensors, one tensor at a time."""

from __future__ import annotations

import math
from pathlib import Path

from torch import Tensor

from gptoughts.checkpoint import layout
from gptoughts.checkpoint.huggingface.output import MAX_FILE_BYTES, Conversion, new_folder, progress
from gptoughts.checkpoint.huggingface.tensor_files import write_folder
from gptoughts.checkpoint.safetensors_file import NAMES, TensorHeader
from gptoughts.checkpoint.zero_files import ZeroCheckpoint
from gptoughts.errors import CheckpointError


def write_whole_weights(source: Path, output: Path, *, max_file_bytes: int = MAX_FILE_BYTES) -> Conversion:
    """Make a folder with ``model.safetensors`` (or several files and an index) that ``load_state_dict`` takes whole.

    Args:
        source: What ``engine.save_checkpoint`` was given, or one tag's folder in it.
        output: Folder to make.
        max_file_bytes: Weights are divided over files of about this size.
    Raises:
        CheckpointError: as :class:`ZeroCheckpoint`, or a tensor of a dtype that is not written; nothing is written.
    """
    checkpoint = ZeroCheckpoint(source)
    dtypes = {name: checkpoint.dtype(name) for name in checkpoint.shapes}
    problems = [f"{name}: {dtype} is not written" for name, dtype in dtypes.items() if dtype not in NAMES]
    if problems:
        raise CheckpointError(problems)
    headers = [TensorHeader(name, NAMES[dtypes[name]], shape) for name, shape in checkpoint.shapes.items()]

    headers.sort(key=lambda header: -dtypes[header.name].itemsize)  # the widest first: all values stay aligned

    def read(name: str) -> list[Tensor]:
        return [checkpoint.read(name)]

    with new_folder(output) as partial, progress("writing", headers) as written:
        num_files = write_folder(partial, headers, read, max_file_bytes=max_file_bytes, written=written)
        for path in partial.iterdir():
            layout.sync_file(path)
    total = sum(math.prod(header.shape) for header in headers)
    ranks = f"{checkpoint.world_size} rank{'s' if checkpoint.world_size > 1 else ''}"
    return Conversion(output, f"DeepSpeed ZeRO {checkpoint.stage} of {ranks}", total, num_files, 0)

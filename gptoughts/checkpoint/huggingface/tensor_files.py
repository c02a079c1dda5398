"""Hugging Face folders read one tensor at a time, so that memory holds a few whatever the model's size."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptoughts.checkpoint.safetensors_file import TensorHeader
from gptoughts.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONVERTIBLE = ("F32", "BF16", "F16")
"""safetensors' names of the dtypes that convert."""


class TensorFolder:
    """The tensors of a Hugging Face folder by name, read when asked for.

    Raises:
        CheckpointError: no safetensors, an index that names missing files, or an unreadable file; names it.
    """

    def __init__(self, folder: Path) -> None:
        self.headers: dict[str, TensorHeader] = {}
        self._files: dict[str, Any] = {}
        for path in _weight_files(folder):
            try:
                handle = safe_open(path, framework="pt")
                for name in handle.keys():  # noqa: SIM118 (safe_open is no dict)
                    view = handle.get_slice(name)
                    self.headers[name] = TensorHeader(name, view.get_dtype(), tuple(view.get_shape()))
                    self._files[name] = handle
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path}: cannot be read ({error})") from None

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, as stored."""
        return self._files[name].get_tensor(name)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX_FILE
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError):
            raise CheckpointError(f"{index}: no index of safetensors files") from None
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CheckpointError([f"{folder / name}: missing, {INDEX_FILE} names it" for name in missing])
        return [folder / name for name in names]
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    pickled = "; its .bin files are pickles, which are never opened" if list(folder.glob("*.bin")) else ""
    raise CheckpointError(f"{folder}: holds neither {SINGLE_FILE} nor {INDEX_FILE}{pickled}")


def plan_files(headers: Sequence[TensorHeader], max_file_bytes: int) -> list[list[TensorHeader]]:
    """Divide tensors over files in their order; a file exceeds the limit only where one tensor does."""
    files: list[list[TensorHeader]] = []
    size = 0
    for header in headers:
        if not files or size + header.num_bytes > max_file_bytes:
            files.append([])
            size = 0
        files[-1].append(header)
        size += header.num_bytes
    return files

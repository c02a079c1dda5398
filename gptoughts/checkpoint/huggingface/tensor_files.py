"""Hugging Face folders read one tensor at a time, so that memory holds a few whatever the model's size."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptoughts.checkpoint.huggingface.formats import INDEX_FILE, SINGLE_FILE
from gptoughts.checkpoint.huggingface.fp8 import FP8, SCALE_DTYPES, SCALE_SUFFIX, BlockQuantization
from gptoughts.checkpoint.safetensors_file import DTYPES, TensorHeader, write_file
from gptoughts.errors import CheckpointError

CONVERTIBLE = ("F32", "BF16", "F16")
"""safetensors' names of the dtypes that convert."""


class TensorFolder:
    """The tensors of a Hugging Face folder by name, read when asked for.

    FP8 matrices look as if they were stored in ``dequantized``; their factors have no names of their own.

    Args:
        folder: Folder with safetensors.
        quantization: What config.json says of it.
        dequantized: safetensors' name of the dtype that FP8 matrices are read in.

    Raises:
        CheckpointError: no safetensors, an index that names missing files, or an unreadable file; names it.
    """

    def __init__(self, folder: Path, quantization: BlockQuantization | None = None, dequantized: str = "BF16") -> None:
        self.headers: dict[str, TensorHeader] = {}
        self.problems: list[str] = []
        """Tensors that several files hold, FP8 matrices whose factors are missing or of another shape, by name."""
        self._quantization = quantization
        self._scales: dict[str, str] = {}
        self._files: dict[str, Any] = {}
        for path in _weight_files(folder):
            try:
                handle = safe_open(path, framework="pt")
                for name in handle.keys():  # noqa: SIM118 (safe_open is no dict)
                    if name in self.headers:
                        self.problems.append(f"{name}: in several files, {path.name} and another")
                    view = handle.get_slice(name)
                    self.headers[name] = TensorHeader(name, view.get_dtype(), tuple(view.get_shape()))
                    self._files[name] = handle
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path}: cannot be read ({error})") from None
        if quantization is not None:
            self._pair_scales(quantization, dequantized)

    def _pair_scales(self, quantization: BlockQuantization, dequantized: str) -> None:
        for name, header in list(self.headers.items()):
            if header.dtype != FP8 or len(header.shape) != 2:
                continue
            scale_name, shape = name + SCALE_SUFFIX, quantization.scale_shape(header.shape)
            scale = self.headers.get(scale_name)
            if scale is None or scale.shape != shape or scale.dtype not in SCALE_DTYPES:
                found = "missing" if scale is None else f"{scale.dtype} {scale.shape}"
                self.problems.append(f"{scale_name}: {found}; {' or '.join(SCALE_DTYPES)} {shape} expected")
            self.headers.pop(scale_name, None)
            self._scales[name] = scale_name
            self.headers[name] = TensorHeader(name, dequantized, header.shape)

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, in the dtype of its header."""
        tensor = self._files[name].get_tensor(name)
        if name not in self._scales:
            return tensor
        assert self._quantization is not None
        scale_name = self._scales[name]
        whole = self._quantization.dequantize(tensor, self._files[scale_name].get_tensor(scale_name))
        return whole.to(DTYPES[self.headers[name].dtype])


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


def write_folder(
    folder: Path,
    headers: Sequence[TensorHeader],
    read: Callable[[str], Iterable[Tensor]],
    *,
    max_file_bytes: int,
    written: Callable[[int], None],
) -> int:
    """Write tensors as a Hugging Face folder has them, with an index where there are several files; returns how many.

    Args:
        folder: Folder to write in.
        headers: All tensors, in order.
        read: As in :func:`write_file`.
        max_file_bytes: They are divided over files of about this size.
        written: Told the bytes of each tensor.
    """
    files = plan_files(headers, max_file_bytes)
    names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    names = names if len(files) > 1 else [SINGLE_FILE]
    for name, part in zip(names, files, strict=True):
        write_file(folder / name, part, read, metadata={"format": "pt"}, written=written)
    if len(files) > 1:
        where = {header.name: name for name, part in zip(names, files, strict=True) for header in part}
        index = {"metadata": {"total_size": sum(h.num_bytes for h in headers)}, "weight_map": where}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return len(files)

"""Folders and files of checkpoints: names, checksums, atomic writes, which one is the newest good one.

A checkpoint is a folder ``RUN/checkpoints/step_00000100``. It is written under a name that ends in ``.partial``, every
file is flushed to the disk, ``manifest.json`` (sizes and checksums of all other files) comes last, and only then is the
folder renamed. ``RUN/checkpoints/latest`` names the newest one and is replaced after that. So a folder without
``.partial`` and with a manifest is whole, unless the disk lost something later: which the checksums show.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from gptoughts.errors import CheckpointError

MANIFEST = "manifest.json"
LATEST = "latest"
CONFIG = "config.yaml"
TRAIN_STATE = "train_state.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
WEIGHTS_ONLY = "weights_only"
"""Key of a manifest: the checkpoint holds no optimizer state, so that a run can start from it but not resume."""
FORMAT_VERSION = 1
_OWN_CHECKSUM = "xxh3_128"
_PARTIAL = ".partial"
_CHUNK_BYTES = 1 << 24


def checkpoints_folder(run: Path) -> Path:
    """Folder of a run's checkpoints."""
    return run / "checkpoints"


def step_folder(run: Path, step: int) -> Path:
    """Folder of the checkpoint of one step."""
    return checkpoints_folder(run) / f"step_{step:08d}"


def partial_folder(folder: Path) -> Path:
    """Where a checkpoint is written before it is whole."""
    return folder.with_name(folder.name + _PARTIAL)


def shard_file(rank: int) -> str:
    """Name of the tensor file that one rank writes."""
    return f"rank_{rank:05d}.safetensors"


def step_of(folder: Path) -> int:
    """Step number in a checkpoint folder's name."""
    return int(folder.name.removeprefix("step_"))


def list_checkpoints(run: Path) -> list[Path]:
    """Whole checkpoints of a run (those renamed to their final name), oldest first."""
    folder = checkpoints_folder(run)
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.name.startswith("step_") and path.name[5:].isdigit()]
    return sorted(found, key=step_of)


def sync_file(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Replace a small text file so that a reader sees the old or the new content, never a part."""
    temporary = path.with_name(path.name + _PARTIAL)
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_file(path.parent)


@dataclass(frozen=True)
class FileRecord:
    """Size and checksum of one file."""

    num_bytes: int
    xxh3_128: str

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        """Read the file once and record it."""
        digest = xxhash.xxh3_128()
        num_bytes = 0
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                num_bytes += len(chunk)
        return cls(num_bytes, digest.hexdigest())


def write_manifest(folder: Path, files: dict[str, FileRecord], header: dict[str, Any]) -> None:
    """Write ``manifest.json`` into a folder whose other files are on the disk."""
    listing = {name: {"bytes": record.num_bytes, "xxh3_128": record.xxh3_128} for name, record in sorted(files.items())}
    manifest = {"format_version": FORMAT_VERSION, **header, "files": listing}
    content = json.loads(json.dumps(manifest))  # as it will be read
    text = json.dumps(content | {_OWN_CHECKSUM: _checksum_of_manifest(content)}, indent=2)
    write_atomically(folder / MANIFEST, text + "\n")


def _checksum_of_manifest(manifest: Mapping[str, Any]) -> str:
    """Of everything but the checksum itself."""
    content = {key: value for key, value in manifest.items() if key != _OWN_CHECKSUM}
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's manifest.

    Raises:
        CheckpointError: it is missing, no JSON, or of a newer format; names the file.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format_version"]
        manifest["files"].items()
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no {MANIFEST}, so this is no whole checkpoint") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path}: damaged (not a checkpoint manifest)") from None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format_version={version}; this version reads {FORMAT_VERSION}")
    # Earlier versions wrote none.
    if manifest.get(_OWN_CHECKSUM, _checksum_of_manifest(manifest)) != _checksum_of_manifest(manifest):
        raise CheckpointError(f"{path}: damaged (its content has changed since it was saved)")
    return manifest


def find_damage(folder: Path, name: str, record: dict[str, Any]) -> str | None:
    """Compare one file with its manifest entry; return what is wrong with it, or None."""
    path = folder / name
    if not path.is_file():
        return f"{path}: missing"
    size = path.stat().st_size
    if size != record["bytes"]:
        return f"{path}: {size} bytes, {record['bytes']} expected"
    if FileRecord.of(path).xxh3_128 != record["xxh3_128"]:
        return f"{path}: checksum differs (the content has changed since it was saved)"
    return None


def check_files(folder: Path) -> None:
    """Compare every file of a checkpoint with its manifest.

    Raises:
        CheckpointError: names each damaged file.
    """
    files = read_manifest(folder)["files"]
    damage = [found for name, record in files.items() if (found := find_damage(folder, name, record))]
    if damage:
        raise CheckpointError(damage)


def publish(folder: Path, *, keep_last: int) -> None:
    """Give a finished ``.partial`` folder its final name, point ``latest`` at it, drop what is too old."""
    partial = partial_folder(folder)
    sync_file(partial)
    if folder.exists():
        shutil.rmtree(folder)
    os.rename(partial, folder)
    sync_file(folder.parent)
    write_atomically(folder.parent / LATEST, folder.name + "\n")
    if keep_last > 0:
        for old in list_checkpoints(folder.parent.parent)[:-keep_last]:
            shutil.rmtree(old)


def start_partial(folder: Path) -> Path:
    """Make an empty ``.partial`` folder for a checkpoint; leftovers of earlier tries go."""
    partial = partial_folder(folder)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    return partial


def candidates(run: Path, resume: str) -> list[Path]:
    """Checkpoints to try, in order, for a ``--resume`` value; empty means: start anew.

    Raises:
        CheckpointError: a path was given and nothing there is a checkpoint.
    """
    if resume == "none":
        return []
    if resume == "auto":
        return list_checkpoints(run)[::-1]
    return [locate(Path(resume))]


def locate(path: Path) -> Path:
    """The checkpoint that a path means: a checkpoint folder itself, or a run's newest one.

    Raises:
        CheckpointError: neither; says what was looked for.
    """
    if (path / MANIFEST).is_file():
        return path
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such checkpoint; expected a folder like RUN/checkpoints/step_00000100, or a run"
        )
    for run in (path, path.parent):
        found = list_checkpoints(run)
        if found and (run == path or path.name == "checkpoints"):
            latest = checkpoints_folder(run) / LATEST
            named = checkpoints_folder(run) / latest.read_text().strip() if latest.is_file() else found[-1]
            return named if named in found else found[-1]
    raise CheckpointError(f"{path}: holds no checkpoint ({MANIFEST} or checkpoints/step_* expected)")


def first_good(folders: list[Path], damage_of: Callable[[Path], list[str]], say: Callable[[str], None]) -> Path | None:
    """The first undamaged folder; each damaged one is named through ``say``.

    Raises:
        CheckpointError: there were folders, and all of them are damaged.
    """
    problems: list[str] = []
    for folder in folders:
        damage = damage_of(folder)
        if not damage:
            if problems:
                say(f"using {folder} instead")
            return folder
        problems += damage
        for line in damage:
            say(f"damaged checkpoint: {line}")
    if problems:
        raise CheckpointError(
            [*problems, "no undamaged checkpoint is left; --resume none starts anew, --resume PATH names another one"]
        )
    return None

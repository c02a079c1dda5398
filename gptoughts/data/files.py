"""Files that appear whole or not at all: temporary name, fsync, rename."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

PARTIAL_SUFFIX = ".partial"


def partial_path(path: str | Path) -> Path:
    """Where a file is written until it is complete."""
    return Path(f"{path}{PARTIAL_SUFFIX}")


def publish(path: str | Path) -> None:
    """Give the finished, already closed partial file its final name, durably."""
    with open(partial_path(path), "rb") as stream:
        os.fsync(stream.fileno())
    os.replace(partial_path(path), path)
    folder = os.open(Path(path).parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_atomically(path: str | Path, write: Callable[[IO[bytes]], object], *, unique: bool = False) -> None:
    """Write a file through ``write(stream)`` so that readers see the old one, the new one or none, never a part.

    Args:
        path: Final name.
        write: Receives the binary stream.
        unique: Add the process id to the temporary name, for files that several processes may write at once.
    """
    temporary = Path(f"{path}.{os.getpid()}{PARTIAL_SUFFIX}") if unique else partial_path(path)
    try:
        with open(temporary, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file atomically."""
    write_atomically(path, lambda stream: stream.write(text.encode()))


def write_json(path: str | Path, value: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")

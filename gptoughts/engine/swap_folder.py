"""The folder on a disk into which one rank swaps: its own, removed with it, and swept up after ranks that were killed.

DeepSpeed names its files by rank and parameter, and removes what it finds there (runtime/swap_tensor/
partitioned_param_swapper.py:88, 0.19.8): two runs in one folder would write into each other's state. So each rank
claims ``FOLDER/gptoughts-NAME`` beside ``FOLDER/gptoughts-NAME.lock``, which it holds locked; the kernel lets go of a
lock with the process that holds it, however that ends.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
import weakref
from contextlib import suppress
from pathlib import Path

_PREFIX, _LOCK = "gptoughts-", ".lock"
_MADE_HERE = ".made_by_gptoughts"
"""Empty file in a folder that no user has made."""


class SwapFolder:
    """A claimed folder; removed by :meth:`remove`, and at the latest when the process ends in an orderly way.

    Args:
        parent: What the user named; made where it is not there, and then removed again with the last claim in it.
    Raises:
        OSError: it cannot be made or written.
    """

    def __init__(self, parent: Path) -> None:
        if not parent.exists():
            parent.mkdir(parents=True, exist_ok=True)
            (parent / _MADE_HERE).touch()
        sweep(parent)
        self.path = parent / f"{_PREFIX}{uuid.uuid4().hex}"
        lock = self.path.with_name(self.path.name + _LOCK)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        # Only a folder that is there without a locked file beside it is left behind: this order matters to sweep().
        self.path.mkdir()
        owner = os.getpid()
        self._finalizer = weakref.finalize(self, _remove, self.path, descriptor, owner)

    def remove(self) -> None:
        """Remove it with all that is in it; again and again if need be."""
        self._finalizer()


def sweep(parent: Path) -> list[Path]:
    """Remove what killed ranks left in ``parent``; returns what was removed."""
    removed = []
    for folder in parent.glob(f"{_PREFIX}*"):
        if folder.name.endswith(_LOCK):
            continue
        with suppress(OSError):  # another rank sweeps as well, or it is another user's
            descriptor = os.open(folder.with_name(folder.name + _LOCK), os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _delete(folder)
                removed.append(folder)
            finally:
                os.close(descriptor)
    return removed


def _remove(folder: Path, descriptor: int, owner: int) -> None:
    if os.getpid() != owner:
        return  # a forked child, which has inherited the claim
    _delete(folder)
    os.close(descriptor)
    parent, mark = folder.parent, folder.with_name(_MADE_HERE)
    with suppress(OSError):  # another rank is as far
        if mark.exists() and list(parent.iterdir()) == [mark]:
            mark.unlink()
            parent.rmdir()


def _delete(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.with_name(folder.name + _LOCK).unlink(missing_ok=True)

"""Locks that a killed compilation of DeepSpeed's CPU operators leaves behind.

torch compiles an extension under a lock file (``torch.utils.file_baton``) that is not tied to a process: one that is
killed leaves it, and every later run waits for it for ever, without a word. A living holder keeps the file open, which
shows whether one is on this host; on another host (a shared home) only time can tell.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import psutil

logger = logging.getLogger(__name__)

OPERATORS = ("deepspeed_shm_comm", "cpu_adam", "pin_memory", "async_io")
FOREIGN_BUILD_SECONDS = 180.0
_POLL_SECONDS = 1.0


def extensions_folder() -> Path:
    """Where torch builds extensions for this Python and device."""
    from torch.utils import cpp_extension

    return Path(cpp_extension._get_build_directory("x", verbose=False)).parent


def clear_stale_locks(
    folder: Path | None = None, *, foreign_build_seconds: float = FOREIGN_BUILD_SECONDS
) -> list[Path]:
    """Remove locks whose holder is gone; wait for one that another host may hold, and say so.

    Args:
        folder: Where extensions are built; unset: torch's.
        foreign_build_seconds: Age after which a lock that nobody on this host holds is taken for left behind.
    Returns:
        The locks that were removed.
    """
    removed = []
    for name in OPERATORS:
        lock = (folder or extensions_folder()) / name / "lock"
        was_said = False
        while lock.exists() and not _is_held_here(lock):
            try:
                age = time.time() - lock.stat().st_mtime
                if age > foreign_build_seconds:
                    lock.unlink()
                    removed.append(lock)
                    logger.warning("removed %s, left behind by a build that did not end", lock)
                    break
            except FileNotFoundError:
                break  # released, or removed by a peer
            if not was_said:
                left = foreign_build_seconds - age
                logger.warning("%s: another host may be building this operator; waiting up to %.0f s", lock, left)
                was_said = True
            time.sleep(_POLL_SECONDS)
    return removed


def _is_held_here(lock: Path) -> bool:
    """Whether a process of this host has the file open."""
    path = os.path.realpath(lock)
    for process in psutil.process_iter():
        try:
            if any(
                os.path.realpath(f"/proc/{process.pid}/fd/{fd}") == path for fd in os.listdir(f"/proc/{process.pid}/fd")
            ):
                return True
        except OSError:
            continue  # it has ended, or belongs to another user, who does not build into our folder
    return False

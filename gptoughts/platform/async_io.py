"""DeepSpeed's operator ``async_io``, and whether a folder is fit for it: what offload to NVMe needs of a machine."""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import shutil
from pathlib import Path

logger = logging.getLogger(__name__)

BUILDER = "AsyncIOBuilder"
LIBAIO = (
    "libaio's header and library; apt-get install libaio-dev (Debian, Ubuntu), or dnf install libaio-devel (Fedora)"
)
_GIB = 1024**3
_PAGE_BYTES = 4096


def has_libaio() -> bool:
    """Whether a program can be compiled and linked against libaio here, which is all that DeepSpeed asks for."""
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder(BUILDER)
    return builder is not None and bool(builder.is_compatible(verbose=False))


def operator_problem() -> str | None:
    """Load the operator, after building it where no run has done so; why that cannot be, or None.

    DeepSpeed would do it as well, when the engine is made, and would end in a traceback.
    """
    from deepspeed.accelerator import get_accelerator

    if not has_libaio():
        return f"DeepSpeed's operator async_io needs {LIBAIO}"
    logger.info(
        "loading DeepSpeed's operator async_io; the first time on a machine it is compiled, which takes minutes"
    )
    try:
        get_accelerator().create_op_builder(BUILDER).load(verbose=False)
    # DeepSpeed's builders raise whatever the compiler, ninja or the loader raised.
    except Exception as error:
        return f"DeepSpeed's operator async_io cannot be built: {error}"
    return None


def folder_problem(folder: Path, needed_bytes: int, *, may_be_made: bool) -> str | None:
    """Why a folder cannot hold ``needed_bytes`` of swapped state, or None.

    Args:
        folder: Where files are to be.
        needed_bytes: By all ranks of this host.
        may_be_made: It need not exist: the run makes it in its own folder.
    """
    place = folder
    while may_be_made and not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        return "is no folder" if place.exists() else "there is no such folder; make it first, on a local disk"
    problem = _write_problem(place)
    if problem is not None:
        return problem
    free_bytes = shutil.disk_usage(place).free
    if free_bytes < needed_bytes:
        return (
            f"{needed_bytes / _GIB:.1f} GiB are needed for the ranks of this host, {free_bytes / _GIB:.1f} GiB are free"
        )
    return None


def _write_problem(folder: Path) -> str | None:
    """Write one page as the operator does, past the kernel's cache."""
    path = folder / f".gptoughts-{os.getpid()}"
    page = mmap.mmap(-1, _PAGE_BYTES)  # aligned, as direct writes want it
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT, 0o600)
        try:
            os.write(descriptor, page)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return "its file system has no direct input and output (O_DIRECT), which async_io needs; take a local disk"
        return f"cannot be written: {error.strerror}"
    finally:
        path.unlink(missing_ok=True)
        page.close()
    return None


def lock_problem(num_bytes: int) -> str | None:
    """Why this process may not lock ``num_bytes`` in memory, or None.

    DeepSpeed's buffers are locked, and where that fails its allocator returns nothing and the process is killed by an
    assertion (csrc/pin_memory/deepspeed_pin_tensor.cpp:46, 0.19.8).
    """
    library = ctypes.CDLL(None, use_errno=True)
    size = ctypes.c_size_t(max(num_bytes, _PAGE_BYTES))
    buffer = (ctypes.c_char * size.value).from_buffer(mmap.mmap(-1, size.value))
    if library.mlock(buffer, size) != 0:
        reason = os.strerror(ctypes.get_errno())
        return (
            f"{num_bytes / _GIB:.2f} GiB of buffers cannot be locked in memory: {reason}; raise the limit (ulimit -l, "
            "LimitMEMLOCK, docker run --ulimit memlock=-1), or lower sub_group_size"
        )
    library.munlock(buffer, size)
    return None

"""The folder of a run: one run at a time writes it, and no former course of the run is overwritten."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from gptoughts.checkpoint import layout
from gptoughts.errors import CheckpointError
from gptoughts.training.metrics import METRICS_FILE

LOCK_FILE = ".lock"
_ASIDE = "superseded_"


@contextmanager
def open_run(run: Path) -> Iterator[Path]:
    """Make the run's folder and keep other runs out of it until the block ends.

    Raises:
        CheckpointError: on every rank, where the folder cannot be written or another run holds it.
    Collective: every rank of the world.
    """
    held: list[int] = []
    on_rank_zero(run, lambda: held.append(_lock(run)))
    try:
        yield run
    finally:
        for descriptor in held:
            os.close(descriptor)


def on_rank_zero(run: Path, work: Callable[[], object]) -> None:
    """Run ``work``, which writes to the run's folder, on rank 0; all ranks learn of a failure.

    Raises:
        CheckpointError: on every rank.
    Collective: every rank of the world.
    """
    problem: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            work()
        except CheckpointError as error:
            problem = [str(error)]
        except OSError as error:
            problem = [f"output_dir={run}: cannot be written: {error.strerror}"]
    dist.broadcast_object_list(problem, src=0)
    if problem[0]:
        raise CheckpointError(problem[0])


def _lock(run: Path) -> int:
    run.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 200).decode(errors="replace").strip()
        os.close(descriptor)
        raise CheckpointError(
            f"output_dir={run}: another run{f' ({holder})' if holder else ''} is writing there; wait until it has "
            "ended, or give another --output_dir"
        ) from None
    except OSError:
        return descriptor  # a file system without locks
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return descriptor


def set_aside(run: Path, *, resumed_from: Path | None, step: int) -> Path | None:
    """Move away the checkpoints that the run does not go on from, so that none of them is taken for one of its own.

    Those are the later ones, or all where the run starts anew or from a checkpoint of another run. If they stayed,
    ``--resume auto`` would take them for the newest, and ``--checkpoint.keep_last`` keep them rather than new ones.

    Args:
        run: The run's folder.
        resumed_from: The checkpoint that the run goes on from.
        step: Its step.
    Returns:
        The folder that holds them now, with a copy of metrics.jsonl; None where there were none.
    """
    checkpoints = layout.list_checkpoints(run)
    is_own = resumed_from is not None and any(os.path.samefile(resumed_from, found) for found in checkpoints)
    return _move_aside(run, [found for found in checkpoints if not is_own or layout.step_of(found) > step])


def set_aside_later(run: Path, *, step: int) -> Path | None:
    """Move away the checkpoints of later steps, whose course the run has left; returns what :func:`set_aside` does."""
    return _move_aside(run, [found for found in layout.list_checkpoints(run) if layout.step_of(found) > step])


def _move_aside(run: Path, others: list[Path]) -> Path | None:
    if not others:
        return None
    number = 1
    while (aside := run / f"{_ASIDE}{number}").exists():
        number += 1
    moved = layout.checkpoints_folder(aside)
    moved.mkdir(parents=True)
    if (run / METRICS_FILE).is_file():
        shutil.copyfile(run / METRICS_FILE, aside / METRICS_FILE)
    for found in others:
        os.rename(found, moved / found.name)
    layout.sync_file(layout.checkpoints_folder(run))
    layout.sync_file(moved)
    return aside

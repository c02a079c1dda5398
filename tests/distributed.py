"""Run a function on several gloo ranks: persistent pools of workers, so that a case takes seconds."""

from __future__ import annotations

import atexit
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch.multiprocessing as mp

TIMEOUT_SECONDS = 300.0
_POOLS: dict[int, WorkerPool] = {}


class WorkerError(AssertionError):
    """A worker raised; the message carries every failing rank's traceback."""


def _worker(rank: int, world_size: int, port: int, pipe: Connection) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    import datetime

    import torch

    from gptoughts.platform import gloo

    torch.set_num_threads(1)
    gloo.share_device()
    torch.distributed.init_process_group(
        "gloo", timeout=datetime.timedelta(seconds=TIMEOUT_SECONDS), world_size=world_size, rank=rank
    )
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            break
        if job is None:
            break
        fn, args = job
        try:
            pipe.send((True, fn(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    os._exit(0)


class WorkerPool:
    """``world_size`` processes whose default process group stays up between cases."""

    def __init__(self, world_size: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = mp.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_worker, args=(rank, world_size, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, fn: Callable[..., Any], *args: Any) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((fn, args))
        results: list[Any] = []
        failures: list[str] = []
        for rank, pipe in enumerate(self.pipes):
            # A rank that fails leaves its peers waiting in a collective: give them little time, then end the pool.
            if not pipe.poll(5.0 if failures else TIMEOUT_SECONDS):
                failures.append(f"rank {rank}: no answer")
                continue
            try:
                succeeded, value = pipe.recv()
            except EOFError:
                succeeded, value = False, "the worker died"
            if succeeded:
                results.append(value)
            else:
                failures.append(f"rank {rank}:\n{value}")
        if failures:
            self.close()
            raise WorkerError("\n".join(failures))
        return results

    def close(self) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
        for pipe in self.pipes:
            pipe.close()
        for world_size, pool in list(_POOLS.items()):
            if pool is self:
                del _POOLS[world_size]


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call ``fn(*args)`` on ``world_size`` ranks and return their results by rank.

    ``fn`` is a module-level function; arguments and results are pickled. A failure on any rank raises
    :class:`WorkerError` here and replaces the pool, so that the next case starts clean.
    """
    if world_size not in _POOLS:
        _POOLS[world_size] = WorkerPool(world_size)
    return _POOLS[world_size].run(fn, *args)


def close_pools() -> None:
    """End all workers (also done at exit)."""
    for pool in list(_POOLS.values()):
        pool.close()


atexit.register(close_pools)

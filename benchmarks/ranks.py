"""A function on several gloo ranks, each a process of its own with one thread."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def answers_of(ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``function(rank, *arguments)`` returns on each rank, in any order; it and its answers are pickled."""
    context = mp.get_context("spawn")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    answers = context.Queue()
    processes = [
        context.Process(target=_run, args=(rank, ranks, store.port, function, arguments, answers))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    found = [answers.get() for _ in processes]
    for process in processes:
        process.join()
    return found


def _run(
    rank: int, ranks: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...], answers: Any
) -> None:
    from gptoughts.config.experiment import ParallelConfig
    from gptoughts.parallel import groups
    from gptoughts.platform import gloo
    from gptoughts.platform.startup import prepare_process

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    prepare_process()
    torch.set_num_threads(1)
    gloo.share_device()
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    groups.initialize(ParallelConfig(), seed=1234)
    answers.put(function(rank, *arguments))
    dist.barrier()
    groups.destroy()

"""Contestants in a process each, taking turns: every one runs a step on the same tokens, then the next.

Each process is set up as its users have it: ours as the launcher does, a peer's plain torch. Turns alternate, so that a
noisy machine hits all of them; a turn's ratio compares two steps that ran one after the other, and the median counts.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from gptoughts.config.experiment import ParallelConfig
from gptoughts.parallel import groups
from gptoughts.platform import device, gloo
from gptoughts.platform.startup import prepare_process

Step = Callable[[torch.Tensor], float]
_STORES: list[dist.TCPStore | None] = []
"""They listen as long as this process lives."""


@dataclass(frozen=True)
class Contestant:
    """Who takes turns."""

    make_step: Callable[[], Step]
    """Called in the contestant's process; has to be picklable."""
    is_ours: bool
    """Set the process up as our launcher does, process groups included."""
    ranks: int = 1
    """Processes that run a step together, each on its part of the samples, joined by gloo."""


@dataclass(frozen=True)
class Turns:
    """Seconds per step of one contestant, turn by turn; of several ranks, the slowest one's."""

    wall: list[float]
    processor: list[float]
    """Of all threads of its process: other work on the machine hardly counts."""


def take_turns(
    contestants: dict[str, Contestant],
    *,
    vocab_size: int,
    batch_size: int,
    seq_length: int,
    steps: int,
    warmup_steps: int,
    threads: int,
) -> dict[str, Turns]:
    """Time ``steps`` steps of each contestant, after ``warmup_steps``, on tokens [batch_size, seq_length + 1]."""
    contestant_pipes = {name: _start(contestant, threads) for name, contestant in contestants.items()}
    for pipes in contestant_pipes.values():
        for pipe in pipes:
            pipe.recv()  # ready
    generator = torch.Generator().manual_seed(0)
    turns = {name: Turns([], []) for name in contestants}
    for index in range(warmup_steps + steps):
        tokens = torch.randint(0, vocab_size, (batch_size, seq_length + 1), generator=generator)
        for name, pipes in contestant_pipes.items():
            for pipe, part in zip(pipes, tokens.chunk(len(pipes)), strict=True):
                pipe.send(part.tolist())
            walls, processors = zip(*(pipe.recv() for pipe in pipes), strict=True)
            if index >= warmup_steps:
                turns[name].wall.append(max(walls))
                turns[name].processor.append(max(processors))
    for pipes in contestant_pipes.values():
        for pipe in pipes:
            pipe.send(None)
    return turns


def _start(contestant: Contestant, threads: int) -> list[Connection]:
    """The contestant's processes, by rank."""
    context = mp.get_context("spawn")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if contestant.ranks > 1 else None
    _STORES.append(store)
    pipes = []
    for rank in range(contestant.ranks):
        ours, theirs = context.Pipe()
        port = store.port if store is not None else 0
        context.Process(target=_serve, args=(contestant, rank, port, threads, theirs), daemon=True).start()
        pipes.append(ours)
    return pipes


def median_ratio(theirs: list[float], ours: list[float]) -> float:
    """How many times faster ours is: the median over turns."""
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


def _serve(contestant: Contestant, rank: int, port: int, threads: int, pipe: Connection) -> None:
    """One rank of a contestant: a timed step for each message of tokens, until None."""
    if contestant.is_ours:
        prepare_process()
    torch.set_num_threads(threads)
    if contestant.ranks > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(contestant.ranks))
        gloo.share_device()
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=contestant.ranks)
    if contestant.is_ours:
        groups.initialize(ParallelConfig(), seed=1234)
    step = contestant.make_step()
    pipe.send(None)
    while (rows := pipe.recv()) is not None:
        tokens = torch.tensor(rows, device=device.current_device())
        device.synchronize()
        started = time.perf_counter(), time.process_time()
        step(tokens)
        device.synchronize()
        pipe.send((time.perf_counter() - started[0], time.process_time() - started[1]))
    if contestant.is_ours:
        groups.destroy()

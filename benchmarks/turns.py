"""Contestants in a process each, taking turns: every one runs a step on the same tokens, then the next.

Each process is set up as its users have it: ours as the launcher does, a peer's plain torch. Turns alternate, so that a
noisy machine hits all of them; a turn's ratio compares two steps that ran one after the other, and the median counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
import torch.multiprocessing as mp

from gptoughts.config.experiment import ParallelConfig
from gptoughts.parallel import groups
from gptoughts.platform import device
from gptoughts.platform.startup import prepare_process

Step = Callable[[torch.Tensor], float]


@dataclass(frozen=True)
class Contestant:
    """Who takes turns."""

    make_step: Callable[[], Step]
    """Called in the contestant's process; has to be picklable."""
    is_ours: bool
    """Set the process up as our launcher does, process groups included."""


@dataclass(frozen=True)
class Turns:
    """Seconds per step of one contestant, turn by turn."""

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
    context = mp.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for name, contestant in contestants.items():
        pipes[name], theirs = context.Pipe()
        context.Process(target=_serve, args=(contestant, threads, theirs), daemon=True).start()
    for pipe in pipes.values():
        pipe.recv()  # ready
    generator = torch.Generator().manual_seed(0)
    turns = {name: Turns([], []) for name in contestants}
    for index in range(warmup_steps + steps):
        tokens = torch.randint(0, vocab_size, (batch_size, seq_length + 1), generator=generator)
        for name, pipe in pipes.items():
            pipe.send(tokens.tolist())
            wall, processor = pipe.recv()
            if index >= warmup_steps:
                turns[name].wall.append(wall)
                turns[name].processor.append(processor)
    for pipe in pipes.values():
        pipe.send(None)
    return turns


def median_ratio(theirs: list[float], ours: list[float]) -> float:
    """How many times faster ours is: the median over turns."""
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


def _serve(contestant: Contestant, threads: int, pipe: Connection) -> None:
    """A contestant's process: one timed step for each message of tokens, until None."""
    if contestant.is_ours:
        prepare_process()
    torch.set_num_threads(threads)
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

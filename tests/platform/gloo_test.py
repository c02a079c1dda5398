"""All groups on one transport device: one thread, and every group's sums are its own."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from gptoughts.config.experiment import ParallelConfig
from gptoughts.parallel import groups
from tests.distributed import run_distributed

NUM_GROUPS = 8


def _transport_threads() -> int:
    names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
    return sum(name.startswith("gloo_tcp") for name in names)


def _sums() -> tuple[int, list[list[float]]]:
    groups.initialize(ParallelConfig(tensor=2), seed=1)
    made = [dist.new_group([0, 1] if i % 2 else [0, 1, 2, 3]) for i in range(NUM_GROUPS)]
    threads = _transport_threads()
    rank = dist.get_rank()
    tensors = [torch.full((3,), float(10 * i + rank)) for i in range(NUM_GROUPS)]
    # All under way at once, so that their messages cross on the one device.
    mine = [(t, g) for i, (t, g) in enumerate(zip(tensors, made, strict=True)) if i % 2 == 0 or rank < 2]
    for work in [dist.all_reduce(tensor, group=group, async_op=True) for tensor, group in mine]:
        work.wait()
    for _, group in mine:
        dist.destroy_process_group(group)
    return threads, [tensor.tolist() for tensor in tensors]


def test_one_thread_serves_all_groups() -> None:
    for rank, (threads, sums) in enumerate(run_distributed(_sums, 4)):
        assert threads == 1
        for i, found in enumerate(sums):
            of_two = 20.0 * i + 1 if rank < 2 else 10.0 * i + rank
            expected = of_two if i % 2 else 40.0 * i + 6
            assert found == [expected] * 3

"""ZeRO-3's record of which modules run when, compared among the ranks that run the same ones."""

from __future__ import annotations

import torch
import torch.distributed as dist
from deepspeed.runtime.zero import partitioned_param_coordinator
from megatron.core import parallel_state

from gptoughts.platform import device


def compare_within_data_parallel_group() -> None:
    """From now on the record is compared within the data-parallel group.

    DeepSpeed gathers parameters ahead of their use in the order of the step before, and asserts that it is the same on
    all ranks of the world (runtime/zero/partitioned_param_coordinator.py:260, 0.19.8). Pipeline stages run other
    modules, and other numbers of them: they would fail or wait for ever. What has to agree are the ranks that gather
    together. Collective: none.
    """
    partitioned_param_coordinator.assert_ints_same_as_other_ranks = _assert_same_on_replicas


def _assert_same_on_replicas(ints: list[int]) -> None:
    """Raise where data-parallel ranks hold different lists. Collective: data-parallel group."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    if group.size() == 1:
        return
    # DeepSpeed numbers modules and parameters through all engines of a process: only the distances mean something.
    ints = [number - min(ints) for number in ints]
    length = torch.tensor([len(ints), -len(ints)], device=device.current_device())
    dist.all_reduce(length, dist.ReduceOp.MAX, group=group)
    if int(length[0]) == -int(length[1]):
        found = torch.tensor([*ints, *(-number for number in ints)], device=device.current_device())
        dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
        if torch.equal(found[: len(ints)], -found[len(ints) :]):
            return
    raise RuntimeError(f"ZeRO-3: rank {dist.get_rank()} runs other modules than its data-parallel peers: {ints}")

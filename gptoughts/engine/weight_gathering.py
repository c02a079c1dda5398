"""How DeepSpeed puts sharded weights together on gloo: each rank's shard is broadcast to where it belongs.

torch's gloo backend gathers into a tensor of its own, which it then copies piece by piece: for 17M fp32 weights on two
ranks five times the processor time of broadcasts, which read and write the weights themselves. The bytes that travel
are the same. On other backends nothing changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from deepspeed import comm as deepspeed_comm
from deepspeed.runtime.utils import all_gather_dp_groups
from deepspeed.runtime.zero import partition_parameters, stage_1_and_2
from torch import Tensor
from torch.distributed import ProcessGroup


def gather_in_place_on_gloo() -> None:
    """From now on DeepSpeed gathers weights as said above. May be called again. Collective: none."""
    # Stage 3 calls the first for each fetch (partition_parameters.py:122), 1 and 2 the second after each update
    # (stage_1_and_2.py:3155, both of 0.19.8).
    partition_parameters._dist_allgather_fn = _gather_shards
    stage_1_and_2.all_gather_dp_groups = _gather_groups


class Broadcasts:
    """A gathering under way.

    Args:
        shard: This rank's, 1-D.
        whole: What the shards of all ranks make, in their order; may contain ``shard``.
        group: Ranks with the other shards.
    Collective: ``group``, here and in :meth:`wait`.
    """

    def __init__(self, shard: Tensor, whole: Tensor, group: ProcessGroup) -> None:
        assert whole.numel() == shard.numel() * group.size(), "shards of unequal sizes"
        places = whole.view(-1).split(shard.numel())
        own = places[group.rank()]
        if own.data_ptr() != shard.data_ptr():
            own.copy_(shard.view(-1))
        self._works = [
            deepspeed_comm.broadcast(place, dist.get_global_rank(group, rank), group=group, async_op=True)
            for rank, place in enumerate(places)
        ]

    def wait(self) -> None:
        """Return when the tensor is whole."""
        for work in self._works:
            work.wait()


def _is_on_gloo(tensor: Tensor, group: ProcessGroup) -> bool:
    return tensor.device.type == "cpu" and dist.get_backend(group) == dist.Backend.GLOO


def _gather_shards(input_tensor: Tensor, output_tensor: Tensor, group: ProcessGroup | None = None) -> Any:
    """Start to gather; who needs the result calls ``wait`` of what is returned. Collective: ``group``."""
    if group is not None and _is_on_gloo(output_tensor, group):
        return Broadcasts(input_tensor, output_tensor, group)
    return deepspeed_comm.allgather_fn(output_tensor, input_tensor, group=group, async_op=True)


def _gather_groups(
    groups_flat: Sequence[Tensor],
    partitioned_param_groups: Sequence[Sequence[Tensor]],
    dp_process_group: Sequence[ProcessGroup],
    start_alignment_factor: int,
    allgather_bucket_size: int,
) -> None:
    """Gather the flat weights of each optimizer group. Collective: each group of ``dp_process_group``."""
    if not all(_is_on_gloo(flat, group) for flat, group in zip(groups_flat, dp_process_group, strict=True)):
        all_gather_dp_groups(
            groups_flat, partitioned_param_groups, dp_process_group, start_alignment_factor, allgather_bucket_size
        )
        return
    gatherings = [
        Broadcasts(shards[group.rank()], flat, group)
        for flat, shards, group in zip(groups_flat, partitioned_param_groups, dp_process_group, strict=True)
        if group.size() > 1
    ]
    for gathering in gatherings:
        gathering.wait()

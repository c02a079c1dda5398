"""Weights that DeepSpeed keeps in files between their uses (ZeRO-Infinity), with buffers as they are needed.

DeepSpeed's swapper has a fixed number of equal buffers, each as large as the largest parameter may be, and ends a run
where more parameters are gathered at one time (runtime/swap_tensor/partitioned_param_swapper.py:281, 0.19.8). How many
are follows from the model, from the reuse distance, and from whether a step trains or evaluates. Here a buffer has the
size of what it holds and is made when there is none left over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import (
    AsyncPartitionedParameterSwapper,
    PartitionedParamStatus,
)
from deepspeed.runtime.swap_tensor.utils import swap_in_tensors
from torch import Tensor

from gptoughts.engine.swap_folder import SwapFolder

UNUSED_BUFFERS = {"buffer_count": 1, "buffer_size": 1}
"""Of ``offload_param``: what DeepSpeed allocates for its own buffers."""


class ParameterSwapper(AsyncPartitionedParameterSwapper):  # type: ignore[misc]
    """Differences to DeepSpeed's swapper: buffers on demand, and nothing is read ahead of its use.

    A partition that was read ahead and not used stays in memory; an update then changes it there, and not its file,
    which is read again as soon as the buffer is let go (zero/stage3.py:1283, 0.19.8).

    Args:
        config: DeepSpeed's.
        dtype: Of the model's parameters.
        folder: Where files are; removed with the engine.
    """

    def __init__(self, config: Any, dtype: torch.dtype, folder: SwapFolder) -> None:
        super().__init__(config, dtype)
        self.folder = folder
        self._free: dict[int, list[Tensor]] = {}

    def available_swap_in_buffers(self) -> int:
        """0: how many parameters DeepSpeed may read ahead (zero/partitioned_param_coordinator.py:683)."""
        return 0

    def get_buffer(self, param: Any, numel: int) -> Tensor:
        """Room for a parameter's first partition."""
        self.param_id_to_numel[param.ds_id] = numel
        (buffer,), _ = self._allocate_and_return_buffers_for_swap_in([param])
        return buffer

    def swap_in(self, params: Sequence[Any], async_op: bool = True, swap_in_buffers: Any = None) -> None:
        """Read the partitions of ``params``."""
        assert swap_in_buffers is None, "nobody else's buffers"
        compute_buffers, buffers = self._allocate_and_return_buffers_for_swap_in(params)
        swap_in_tensors(self.aio_read_handle, buffers, self._get_swap_paths(params))
        self._update_inflight_swap_in(params, buffers, sum(buffer.numel() for buffer in compute_buffers))
        if not async_op:
            self.synchronize_reads()

    def remove_partition_and_release_buffers(self, params: Sequence[Any]) -> None:
        """Forget the partitions of ``params`` in memory."""
        for param in params:
            buffer = self.param_id_to_swap_buffer.pop(param.ds_id, None)
            if buffer is not None:
                self._free.setdefault(buffer.numel(), []).append(buffer)
            if param.ds_id in self.available_params:
                self.available_params.remove(param.ds_id)
                self.available_numel -= self.param_id_to_numel[param.ds_id]
            param.ds_tensor.data = self.invalid_buffer.data
            param.ds_tensor.status = PartitionedParamStatus.NOT_AVAILABLE

    def swap_out_partitioned_params(self, dst_fp16_params: Sequence[Any], src_fp32_params: Sequence[Tensor]) -> None:
        """Write updated weights.

        DeepSpeed's takes for granted that they fit at once, which a sub-group of many parameters need not, since each
        is rounded up to whole blocks.
        """
        self.synchronize_writes()
        pool = self.partitioned_swap_pool
        pool.reset()
        paths = self._get_swap_paths(dst_fp16_params, must_exist=True)
        for weights, path in zip(src_fp32_params, paths, strict=True):
            numel = self._io_aligned_numel(weights.numel())
            if not pool.has_space(numel):
                pool.swap_out(self.aio_write_handle)
                pool.reset()
            pool.insert_tensor(weights, path, numel)
        pool.swap_out(self.aio_write_handle)

    def close(self) -> None:
        """Give back memory and files."""
        buffers = [buffer for free in self._free.values() for buffer in free]
        for buffer in [*buffers, *self.param_id_to_swap_buffer.values()]:
            self.aio_read_handle.free_cpu_locked_tensor(buffer)
        self._free.clear()
        self.param_id_to_swap_buffer.clear()
        self.folder.remove()

    def _allocate_and_return_buffers_for_swap_in(self, params: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
        buffers = []
        for param in params:
            assert param.ds_id not in self.param_id_to_swap_buffer, f"parameter {param.ds_id} has a buffer already"
            numel = self._io_aligned_numel(self.param_id_to_numel[param.ds_id])
            free = self._free.get(numel)
            example = torch.empty(0, dtype=self.dtype)
            buffer = free.pop() if free else self.aio_read_handle.new_cpu_locked_tensor(numel, example).zero_()
            self.param_id_to_swap_buffer[param.ds_id] = buffer
            buffers.append(buffer)
        narrowed = [
            buffer.narrow(0, 0, self.param_id_to_numel[param.ds_id])
            for param, buffer in zip(params, buffers, strict=True)
        ]
        return narrowed, buffers

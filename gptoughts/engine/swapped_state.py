"""Optimizer state that DeepSpeed keeps in files between updates (ZeRO-Infinity), as tensors over these files.

Under ZeRO-3 with ``offload_optimizer.device`` nvme the fp32 weights and moments of a sub-group are in memory only
while it is updated; in between its tensors have no elements. Sub-groups below DeepSpeed's least size
(``is_swappable_tensor``, runtime/swap_tensor/optimizer_utils.py:225 of 0.19.8) stay in memory. Between two updates no
state is on its way: the last sub-group is written synchronously (zero/stage3.py:2774).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from gptoughts.engine.file_tensor import MappedFile

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")


class SwappedState:
    """Reaches the swapped sub-groups of a stage 3 optimizer; there are none where nothing is swapped.

    Args:
        optimizer: DeepSpeed's, of any stage.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        is_swapping = bool(getattr(optimizer, "swap_optimizer", False))
        self._swapper: Any = optimizer.optimizer_swapper if is_swapping else None
        flats = optimizer.fp32_partitioned_groups_flat if is_swapping else []
        self._groups = [group for group in range(len(flats)) if optimizer._swappable_optimizer_subgroup(group)]
        self.flats: list[Tensor] = [flats[group] for group in self._groups]
        """What stands for the fp32 weights of a sub-group; without elements between updates."""

    @property
    def folder(self) -> Path | None:
        """Where the files are; None: nothing is swapped."""
        return Path(self._swapper.swap_folder) if self._groups else None

    def is_swapped(self, group: int) -> bool:
        """Whether a sub-group's state is in files."""
        return group in self._groups

    def allocate(self, allocate_state: Callable[[Tensor], None]) -> None:
        """Bring each sub-group's weights into memory, have its moments made beside them, and write all of it."""
        for group, flat in zip(self._groups, self.flats, strict=True):
            self._optimizer._optimizer_states_and_gradient_swap_in(group)
            allocate_state(flat)
            self._swapper.swap_out_optimizer_state(parameter=flat, async_swap=False)

    def tensors(self, flat: Tensor) -> dict[str, MappedFile]:
        """Weights and moments of one sub-group by kind, 1-D over their files."""
        info = self._swapper.swap_params_info[flat.ds_id]  # type: ignore[attr-defined]
        state = self._optimizer.optimizer.state[flat]
        of_kind = {WEIGHT: flat, **{kind: state[kind] for kind in MOMENTS}}
        return {
            kind: MappedFile(Path(context.swap_path), info.numel())
            for kind, tensor in of_kind.items()
            for context in info.tensors
            if context.compute_tensor is tensor
        }

    def refresh_weights(self, group: int) -> None:
        """Bring a sub-group's fp32 weights into memory for the moment in which the model's own are made from them."""
        self._optimizer._optimizer_states_and_gradient_swap_in(group)
        self._optimizer._reassign_or_swap_out_partitioned_parameters(group)
        self._optimizer._release_swap_buffers(group)

"""ZeRO-3's gradient norm over ranks whose optimizers have different numbers of sub-groups."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def join_norms(optimizer: Any) -> None:
    """Have DeepSpeed sum squared gradient norms over ranks once per parameter group instead of once per sub-group.

    It sums them over pipeline stages as well (zero/stage3.py:2573 and 1994, 0.19.8), whose parameters fill different
    numbers of sub-groups: those with more wait for ever. Parameter groups are the same on every stage.

    Args:
        optimizer: DeepSpeed's of stage 3.
    """
    by_group: dict[int, list[int]] = {}
    for sub_group in range(len(optimizer.fp16_groups)):
        by_group.setdefault(optimizer.sub_group_to_group_id[sub_group], []).append(sub_group)

    def norms() -> list[Tensor]:
        found = []
        for sub_groups in by_group.values():
            parameters = [p for sub_group in sub_groups for p in optimizer.fp16_groups[sub_group]]
            if optimizer.offload_optimizer:
                found.append(optimizer.complete_grad_norm_calculation_for_cpu_offload(parameters))
            else:
                gradients = [g for sub_group in sub_groups for g in optimizer.averaged_gradients[sub_group]]
                found.append(optimizer.get_grad_norm_direct(gradients, parameters))
        return found

    optimizer._get_norm_groups = norms

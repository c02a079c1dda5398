"""After each optimizer step: how evenly experts were loaded, and the bias that evens them out.

Collectives here run once per step, on the counts of all layers together.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from gptoughts.models.router import ExpertRouter


def expert_routers(model: nn.Module) -> dict[int, ExpertRouter]:
    """Routers by the layer's index in the whole model, from 0."""
    found = [module for module in model.modules() if isinstance(module, ExpertRouter)]
    return {router.layer_number - 1: router for router in found}  # type: ignore[operator]


def finish_step(model: nn.Module, *, is_applied: bool) -> dict[str, float]:
    """Take the step's counts, move the biases where the update was applied, and say how even the load was.

    Args:
        model: One with routers, or without (then this does nothing).
        is_applied: False where the optimizer skipped the step: its counts are dropped.

    Returns:
        Per layer: the least and the most loaded expert's tokens over the mean (1: even), and the load's entropy over
        its largest value, ln e (1: even, 0: one expert has all).

    Collective: tensor- and data-parallel ranks together.
    """
    routers = expert_routers(model)
    if not routers:
        return {}
    counts = torch.stack([router.take_counts() for router in routers.values()])
    # Without sequence parallelism tensor-parallel peers count the same tokens: all counts are so many times too large,
    # and neither a comparison with their mean nor a share sees it.
    dist.all_reduce(counts, group=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True))
    figures: dict[str, float] = {}
    for (index, router), of_layer in zip(routers.items(), counts.double().cpu(), strict=True):
        if is_applied:
            router.update_bias(of_layer)
        figures |= {f"layer_{index}_expert_load_{name}": value for name, value in load_figures(of_layer).items()}
    return figures


def load_figures(counts: Tensor) -> dict[str, float]:
    """Evenness of fp64 counts [e], see :func:`finish_step`."""
    share = counts / counts.sum().clamp(min=1.0)
    entropy = -torch.special.xlogy(share, share).sum()
    num_experts = counts.numel()
    return {
        "min": float(share.min() * num_experts),
        "max": float(share.max() * num_experts),
        "entropy": float(entropy) / math.log(num_experts) if num_experts > 1 else 1.0,
    }

"""After each optimizer step: how evenly experts were loaded, and the bias that evens them out.

Collectives here run once per step, on the counts of all layers together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gptoughts.models.router import ExpertRouter
from gptoughts.platform import device


def expert_routers(model: nn.Module) -> dict[int, ExpertRouter]:
    """Routers by the layer's index in the whole model, from 0."""
    found = [module for module in model.modules() if isinstance(module, ExpertRouter)]
    return {router.layer_number - 1: router for router in found}  # type: ignore[operator]


def finish_step(chunks: Sequence[nn.Module], *, is_applied: bool) -> dict[str, float]:
    """Take the step's counts, move the biases where the update was applied, and say how even the load was.

    Args:
        chunks: What this rank holds of a model with routers, or without (then this does nothing).
        is_applied: False where the optimizer skipped the step: its counts are dropped.

    Returns:
        Per layer of the whole model: the least and the most loaded expert's tokens over the mean (1: even), and the
        load's entropy over its largest value, ln e (1: even, 0: one expert has all).

    Collective: every rank of the world, where the model has experts.
    """
    config: Any = chunks[0].config
    if config.num_moe_experts is None:
        return {}
    routers = {index: router for chunk in chunks for index, router in expert_routers(chunk).items()}
    # Layers of multi-token prediction are numbered after the decoder's, on every stage's account.
    num_layers = config.num_layers + int(getattr(chunks[0], "mtp_num_layers", 0))
    counts = torch.zeros(num_layers, config.num_moe_experts, dtype=torch.int64, device=device.current_device())
    for index, router in routers.items():
        counts[index] = router.take_counts()
    # A layer is on the ranks of one stage: the sum over the world is the sum over these. Without sequence parallelism
    # tensor-parallel peers count the same tokens: all counts are so many times too large, and neither a comparison
    # with their mean nor a share sees it.
    dist.all_reduce(counts)
    figures: dict[str, float] = {}
    for index, of_layer in enumerate(counts.double().cpu()):
        if is_applied and index in routers:
            routers[index].update_bias(of_layer)
        if of_layer.any():  # else its feed-forward half is dense
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

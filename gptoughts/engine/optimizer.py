"""AdamW with decay and no-decay groups.

m ← β₁m + (1 - β₁)g,  v ← β₂v + (1 - β₂)g²,  w ← w - η (m̂ / (√v̂ + ε) + λw) with bias-corrected m̂, v̂ and the decay λ
decoupled from the gradient (arXiv:1711.05101, algorithm 2). λ = 0 for tensors of fewer than two dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gptoughts.config.experiment import OptimConfig
from gptoughts.parallel.deepspeed_mpu import EXPERTS
from gptoughts.parallel.partition import is_expert_parallel


def shard_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of this rank's tensor-parallel shard, also where ZeRO-3 has taken the data away."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def build_param_groups(parameters: Mapping[str, nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with decay and the rest without, each in the order of ``parameters``.

    Experts that expert parallelism divides have groups of their own, marked as DeepSpeed's stages 1 and 2 want it: each
    group is one flat tensor there, sharded over one group of ranks. Frozen parameters are in none, and a group without
    parameters is left out.
    """
    trainable = [parameter for parameter in parameters.values() if parameter.requires_grad]
    groups: list[dict[str, Any]] = []
    for is_expert, marks in ((False, {}), (True, {"moe": True, "name": EXPERTS})):
        mine = [parameter for parameter in trainable if is_expert_parallel(parameter) == is_expert]
        decayed = [parameter for parameter in mine if len(shard_shape(parameter)) >= 2]
        others = [parameter for parameter in mine if len(shard_shape(parameter)) < 2]
        groups.append({"params": decayed, "weight_decay": weight_decay, **marks})
        groups.append({"params": others, "weight_decay": 0.0, **marks})
    return [group for group in groups if group["params"]]


def build_optimizer(
    parameters: Mapping[str, nn.Parameter], optim: OptimConfig, *, is_offloaded: bool
) -> torch.optim.Optimizer:
    """AdamW over :func:`build_param_groups`; its learning rate is 0 until a step sets it.

    DeepSpeed steps an optimizer with zero gradients to allocate its state; with a learning rate of 0 that leaves the
    weights alone, decay included.

    Args:
        parameters: Global name to parameter.
        is_offloaded: ZeRO-Offload: DeepSpeed's CPU kernel instead of torch's fused one.
    """
    groups = build_param_groups(parameters, optim.weight_decay)
    betas = (optim.beta1, optim.beta2)
    if is_offloaded:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, lr=0.0, betas=betas, eps=optim.eps, adamw_mode=True)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=optim.eps, fused=True)


def allocate_state(optimizer: torch.optim.Optimizer, tensors: Sequence[Tensor]) -> None:
    """Give every tensor that the optimizer is to update its moments (zero) and a step count of 0.

    Args:
        optimizer: AdamW.
        tensors: What it updates; ZeRO-3 puts them into ``param_groups`` only for the moment of the update.
    """
    for tensor in tensors:
        state = optimizer.state[tensor]
        for kind in ("exp_avg", "exp_avg_sq"):
            state.setdefault(kind, torch.zeros_like(tensor, requires_grad=False))
    set_step_count(optimizer, 0)


def step_count(optimizer: torch.optim.Optimizer) -> int:
    """Updates applied so far (the t of Adam's bias correction)."""
    steps = {int(state["step"]) for state in optimizer.state.values() if "step" in state}
    assert len(steps) <= 1, f"parameters disagree on the step count: {sorted(steps)}"
    return steps.pop() if steps else 0


def set_step_count(optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Set Adam's t for every tensor; DeepSpeed's kernel keeps an int, torch's a tensor beside what it updates."""
    is_torch = isinstance(optimizer, torch.optim.AdamW)
    for tensor, state in optimizer.state.items():
        value: Tensor | int = steps
        if is_torch:
            value = torch.tensor(float(steps), dtype=torch.float32, device=tensor.device)
        state["step"] = value

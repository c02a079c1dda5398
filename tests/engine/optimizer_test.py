"""AdamW's groups and its step count."""

from __future__ import annotations

import torch
from torch import nn

from gptoughts.config.experiment import OptimConfig
from gptoughts.engine.optimizer import allocate_state, build_optimizer, build_param_groups, set_step_count, step_count


def _parameters() -> dict[str, nn.Parameter]:
    frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)
    return {
        "norm.weight": nn.Parameter(torch.ones(3)),
        "linear.weight": nn.Parameter(torch.ones(3, 3)),
        "linear.bias": nn.Parameter(torch.ones(3)),
        "frozen.weight": frozen,
    }


def test_matrices_decay_and_vectors_do_not() -> None:
    parameters = _parameters()
    decayed, others = build_param_groups(parameters, 0.1)
    assert [id(p) for p in decayed["params"]] == [id(parameters["linear.weight"])]
    assert [id(p) for p in others["params"]] == [id(parameters["norm.weight"]), id(parameters["linear.bias"])]
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)


def test_a_sharded_matrix_still_decays() -> None:
    sharded = nn.Parameter(torch.empty(0))
    sharded.ds_shape = torch.Size((4, 4))  # as ZeRO-3 leaves it
    (group,) = build_param_groups({"weight": sharded}, 0.1)
    assert group["weight_decay"] == 0.1


def test_optimizer_takes_its_settings_and_starts_without_a_rate() -> None:
    optim = OptimConfig(beta1=0.8, beta2=0.7, eps=1e-3, weight_decay=0.2)
    optimizer = build_optimizer(_parameters(), optim, is_offloaded=False)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.0, (0.8, 0.7), 1e-3, 0.2)


def test_step_count_survives_a_step() -> None:
    parameters = _parameters()
    optimizer = build_optimizer(parameters, OptimConfig(), is_offloaded=False)
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    allocate_state(optimizer, tensors)
    assert step_count(optimizer) == 0
    for tensor in tensors:
        tensor.grad = torch.ones_like(tensor)
    optimizer.step()
    assert step_count(optimizer) == 1
    set_step_count(optimizer, 41)
    optimizer.step()
    assert step_count(optimizer) == 42

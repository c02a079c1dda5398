"""Both dispatchers against one rank that has all tokens and all experts: outputs and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gptoughts.config.experiment import ParallelConfig
from tests.distributed import run_distributed

EXPERTS, TOPK, HIDDEN, WIDTH, TOKENS = 8, 2, 12, 6, 10
RELATIVE = 1e-5
"""Of the largest value; the two sides add the same fp32 numbers in another order."""


def choices(routing: str, tokens: int, generator: torch.Generator) -> Tensor:
    """int64 [tokens, TOPK], distinct experts of each token."""
    if routing == "one expert":
        # Experts 2 and 3 for everyone: with two or four ranks, one rank has all of the load.
        return torch.tensor([2, 3]).repeat(tokens, 1)
    return torch.rand(tokens, EXPERTS, generator=generator).topk(TOPK, dim=1).indices


def inputs_of(rank: int, routing: str, is_uneven: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, gates, choices of a rank and the weights of its loss."""
    generator = torch.Generator().manual_seed(100 + rank)
    tokens = TOKENS + 3 * rank if is_uneven else TOKENS
    x, weight = (torch.randn(tokens, HIDDEN, generator=generator) for _ in range(2))
    gates = torch.rand(tokens, TOPK, generator=generator)
    return x.requires_grad_(), gates.requires_grad_(), choices(routing, tokens, generator), weight


def weights() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    fc1 = torch.randn(EXPERTS, 2 * WIDTH, HIDDEN, generator=generator)
    return fc1, torch.randn(EXPERTS, HIDDEN, WIDTH, generator=generator)


def experts_with(fc1: Tensor, fc2: Tensor, expert_parallel_size: int) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from gptoughts.models.grouped_experts import GroupedExperts

    config = TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=1, num_moe_experts=EXPERTS, moe_ffn_hidden_size=WIDTH
    )
    experts = GroupedExperts(config, fc1.size(0), 1, expert_parallel_size)
    with torch.no_grad():
        experts.linear_fc1_weight.copy_(fc1)
        experts.linear_fc2_weight.copy_(fc2)
    return experts


def dispatched(name: str, routing: str, is_uneven: bool) -> dict[str, Tensor]:
    """This rank's output and gradients; the experts of a rank are those that it holds."""
    from gptoughts.models.token_dispatch import DISPATCHERS
    from gptoughts.parallel import deepspeed_mpu, groups

    size = torch.distributed.get_world_size()
    groups.initialize(ParallelConfig(expert=size), seed=1)
    rank, local = groups.expert_parallel_rank(), EXPERTS // size
    experts = experts_with(*(w[rank * local : (rank + 1) * local] for w in weights()), expert_parallel_size=size)
    x, gates, chosen, weight = inputs_of(rank, routing, is_uneven)
    output = DISPATCHERS[name](x, gates, chosen, experts, local, deepspeed_mpu.expert_parallel_group())
    (output * weight).sum().backward()
    return {
        "output": output.detach(), "x": x.grad, "gates": gates.grad,
        "fc1": experts.linear_fc1_weight.grad, "fc2": experts.linear_fc2_weight.grad,
    }  # fmt: skip


def alone(ranks: int, routing: str, is_uneven: bool) -> dict[str, Tensor]:
    """The same of all ranks' tokens on one."""
    from gptoughts.models.grouped_experts import assign
    from gptoughts.parallel import groups

    groups.initialize(ParallelConfig(), seed=1)
    x, gates, chosen, weight = (
        torch.cat(parts) for parts in zip(*(inputs_of(r, routing, is_uneven) for r in range(ranks)), strict=True)
    )
    x, gates = x.detach().requires_grad_(), gates.detach().requires_grad_()
    experts = experts_with(*weights(), expert_parallel_size=1)
    output = experts(x, gates, assign(chosen, EXPERTS))
    (output * weight).sum().backward()
    return {
        "output": output.detach(), "x": x.grad, "gates": gates.grad,
        "fc1": experts.linear_fc1_weight.grad, "fc2": experts.linear_fc2_weight.grad,
    }  # fmt: skip


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("routing", ["random", "one expert"])
@pytest.mark.parametrize(("name", "is_uneven"), [("allgather", False), ("alltoall", False), ("alltoall", True)])
def test_a_dispatcher_equals_one_rank(name: str, is_uneven: bool, routing: str, ranks: int) -> None:
    (expected,) = run_distributed(alone, 1, ranks, routing, is_uneven)
    found = run_distributed(dispatched, ranks, name, routing, is_uneven)
    for what, value in expected.items():
        together = torch.cat([rank[what] for rank in found])
        assert together.shape == value.shape, what
        assert float((together - value).abs().max() / value.abs().max()) <= RELATIVE, what
    if routing == "one expert":
        assert not expected["fc1"][[0, 1, 4, 5, 6, 7]].any()

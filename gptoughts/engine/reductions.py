"""Sums over ranks that are neither the schedule's nor DeepSpeed's: denominators, log values, replicated parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from gptoughts.engine.pipeline import is_last_stage


def sum_over_world(values: Tensor, device: torch.device) -> Tensor:
    """Elementwise sum over all ranks, on the CPU, the same on every rank. Collective: every rank of the world."""
    if dist.get_world_size() > 1:
        values = values.to(device)
        dist.all_reduce(values)
    return values.cpu()


def is_replica_contributor() -> bool:
    """Whether this rank speaks for its data-parallel replica: ranks that share its samples stay silent."""
    return (
        parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_pipeline_model_parallel_rank() == 0
        and parallel_state.get_context_parallel_rank() == 0
    )


def is_log_contributor() -> bool:
    """Whether this rank's losses count: the last stage has them, context-parallel ranks have parts of them."""
    return parallel_state.get_tensor_model_parallel_rank() == 0 and is_last_stage()


def broadcast_from_last_stage(names: list[str]) -> list[str]:
    """The last stage's names, on all stages. Collective: pipeline-parallel group."""
    group = parallel_state.get_pipeline_model_parallel_group()
    box = [names if is_last_stage() else None]
    dist.broadcast_object_list(box, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    assert box[0] is not None
    return box[0]


def sum_tensor_parallel_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Make the gradients of sequence-parallel parameters whole, ahead of DeepSpeed's hooks.

    Under sequence parallelism each tensor-parallel rank sees a part of the sequence, so that the gradients of
    replicated parameters (marked ``sequence_parallel``) are partial sums. megatron-core adds them up after the last
    microbatch (distributed/finalize_model_grads.py:353 of 0.16.1), when ZeRO 2 and 3 have partitioned them already; so
    here each gradient is summed before it is accumulated.
    Collective: tensor-parallel group, in every backward.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return
    for parameter in parameters:
        if getattr(parameter, "sequence_parallel", False) and parameter.requires_grad:
            parameter.register_hook(_summing_hook(group))


def _summing_hook(group: dist.ProcessGroup) -> Callable[[Tensor], Tensor]:
    def sum_over_tensor_parallel_ranks(gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    return sum_over_tensor_parallel_ranks

"""Initial weights, keyed by (seed, global parameter name): equal for every layout, with and without ZeRO-3.

Matrices are drawn from N(0, std^2); those that write to the residual stream (attention output, second feed-forward
projection) from N(0, std^2 / (2 L)), as GPT-2 does (Radford et al. 2019, section 2.3; Shoeybi et al.,
arXiv:1909.08053), so that the stream's variance does not grow with depth. Norm weights are 1, biases 0.
Every rank draws the whole tensor, one expert after the other where there are experts, and keeps its part.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import Parameter

from gptoughts.parallel import partition

Gathered = Callable[[list[Parameter]], AbstractContextManager[object]]
"""Makes parameters whole inside the context and shares what was written (ZeRO-3's GatheredParameters)."""

_RESIDUAL_OUTPUTS = ("linear_proj.weight", "linear_fc2.weight", "linear_fc2_weight")


def keep_as_is(_parameters: list[Parameter]) -> AbstractContextManager[object]:
    """``Gathered`` for parameters that are whole already."""
    return nullcontext()


def initialize_parameters(
    parameters: dict[str, Parameter],
    *,
    seed: int,
    std: float,
    num_layers: int,
    tensor_parallel_rank: int = 0,
    tensor_parallel_size: int = 1,
    expert_parallel_rank: int = 0,
    expert_parallel_size: int = 1,
    gathered: Gathered = keep_as_is,
) -> None:
    """Write every parameter's initial value.

    Args:
        parameters: By global name (``models.parameter_names``); those on the meta device have no values.
        seed: The run's seed.
        std: Standard deviation of matrices.
        num_layers: Layers of the whole model, for the residual outputs' scale.
        tensor_parallel_rank: Which slice of divided parameters is this rank's.
        tensor_parallel_size: How many slices there are.
        expert_parallel_rank: Which share of the experts is this rank's.
        expert_parallel_size: How many shares there are.
        gathered: Makes a parameter whole while it is written.

    Collective: the data-parallel group where ``gathered`` is ZeRO-3's.
    """
    for name, parameter in parameters.items():
        if parameter.is_meta:
            continue
        with gathered([parameter]), torch.no_grad():
            dim, stride = partition_of(parameter)
            shape = list(parameter.shape)
            if dim is not None:
                shape[dim] *= tensor_parallel_size
            first, count = 0, shape[0]
            if partition.is_expert_parallel(parameter):
                first = count * expert_parallel_rank
                shape[0] *= expert_parallel_size
            value = initial_value(
                name, tuple(shape), seed=seed, std=std, num_layers=num_layers, experts=range(first, first + count)
            )
            parameter.copy_(partition.split(value, dim, stride, tensor_parallel_rank, tensor_parallel_size))


def initial_value(
    name: str, shape: tuple[int, ...], *, seed: int, std: float, num_layers: int, experts: range | None = None
) -> Tensor:
    """The whole initial value of a parameter: fp32 on the CPU, a function of the arguments alone.

    Args:
        name: Global name.
        shape: Of the whole.
        seed: The run's seed.
        std: Standard deviation of matrices.
        num_layers: Layers of the whole model.
        experts: Of a tensor of three dimensions [experts, ...] these are returned; unset: all.
    """
    if len(shape) < 2:
        is_norm = "norm" in name.rsplit(".", 2)[-2] or name.endswith("norm_weight")
        return torch.ones(shape) if is_norm and name.endswith("weight") else torch.zeros(shape)
    scaled = std / math.sqrt(2.0 * num_layers) if name.endswith(_RESIDUAL_OUTPUTS) else std
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    if len(shape) < 3:
        return torch.empty(shape).normal_(0.0, scaled, generator=generator)
    kept = range(shape[0]) if experts is None else experts
    value = torch.empty(len(kept), *shape[1:])
    rest = torch.empty(shape[1:])
    for expert in range(kept.stop):
        (value[expert - kept.start] if expert in kept else rest).normal_(0.0, scaled, generator=generator)
    return value


def partition_of(parameter: Tensor) -> tuple[int | None, int]:
    """The dimension that tensor parallelism divides (None: every rank has the whole), and megatron-core's stride."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return None, 1
    return int(parameter.partition_dim), int(parameter.partition_stride)  # type: ignore[attr-defined]

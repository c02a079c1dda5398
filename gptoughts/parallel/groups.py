"""Process groups: torch.distributed, megatron-core's model-parallel groups, and the random states they imply."""

from __future__ import annotations

import datetime
import logging
import math
import os

import torch
import torch.distributed as dist

from gptoughts.config.experiment import ParallelConfig
from gptoughts.errors import ConfigError
from gptoughts.platform import device, gloo, mcore_cpu

logger = logging.getLogger(__name__)

_REPLICA_SEED_STRIDE = 1_000_003
_MODEL_PARALLEL_GROUPS: list[dist.ProcessGroup] = []
"""What megatron-core made for the present layout."""


def initialize(parallel: ParallelConfig, *, seed: int) -> None:
    """Make every process group of this run and seed the generators of its ranks.

    Groups that already exist are replaced, so that one process may change its layout (tests do). Without a launcher's
    environment the world is this one process.

    Args:
        parallel: The layout; data parallelism takes what tensor, pipeline and context leave of the world.
        seed: The run's seed.

    Raises:
        ConfigError: the world size is not divisible by tensor x pipeline x context, or what is left (context
            included) not by expert.
        PlatformError: unsupported megatron-core, or fewer devices than ranks.

    Collective: every rank of the world.
    """
    device.claim_device()
    mcore_cpu.install()
    # megatron-core asks for the CUDA device at import in places: only import it once the replacements stand.
    from megatron.core import parallel_state

    _initialize_world(parallel.timeout_seconds)
    _check_divides(parallel, dist.get_world_size())
    _destroy_model_parallel()
    before = _existing_groups()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        # Each expert's width is divided over the tensor-parallel ranks, as everything else is.
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.tensor,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        distributed_timeout_minutes=math.ceil(parallel.timeout_seconds / 60),
        create_gloo_process_groups=device.is_cuda(),
    )
    _MODEL_PARALLEL_GROUPS.extend(_existing_groups() - before)
    seed_ranks(seed)


def _check_divides(parallel: ParallelConfig, world_size: int) -> None:
    """Raise ConfigError where the axes do not divide the world."""
    context = f" x parallel.context={parallel.context}" if parallel.context > 1 else ""
    model_ranks = parallel.tensor * parallel.pipeline * parallel.context
    if world_size % model_ranks:
        raise ConfigError(
            f"parallel.tensor={parallel.tensor} x parallel.pipeline={parallel.pipeline}{context}: the world size "
            f"{world_size} is not divisible by {model_ranks}"
        )
    replicas = world_size // (parallel.tensor * parallel.pipeline)
    if replicas % parallel.expert:
        kind = "data- and context-parallel" if parallel.context > 1 else "data-parallel"
        raise ConfigError(f"parallel.expert={parallel.expert}: the {replicas} {kind} ranks are not divisible by it")


def seed_ranks(seed: int) -> None:
    """Seed torch and megatron-core's tracker, so that dropout differs wherever samples or activations differ.

    The default generator is equal on tensor-parallel ranks (they drop the same residual elements) and differs between
    replicas, parts of a sequence and stages; the tracker's model-parallel state differs between tensor-parallel ranks
    as well.

    Collective: none (reads the groups).
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    # Megatron-LM's spacing of pipeline stages (training/initialize.py): tensor-parallel ranks stay within 100.
    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    replica_seed = stage_seed + _REPLICA_SEED_STRIDE * parallel_state.get_data_parallel_rank(with_context_parallel=True)
    device.seed_device(replica_seed)
    model_parallel_cuda_manual_seed(replica_seed)


def destroy() -> None:
    """Take down megatron-core's groups and the world. Collective: every rank of the world."""
    _destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _existing_groups() -> set[dist.ProcessGroup]:
    return set(dist.distributed_c10d._world.pg_map)


def _destroy_model_parallel() -> None:
    """Take down megatron-core's groups; its own destroy_model_parallel forgets them and leaves their sockets open."""
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    existing = _existing_groups() if dist.is_initialized() else set()
    for group in _MODEL_PARALLEL_GROUPS:
        if group in existing:
            dist.destroy_process_group(group)
    _MODEL_PARALLEL_GROUPS.clear()


def _initialize_world(timeout_seconds: float) -> None:
    gloo.share_device()
    if dist.is_initialized():
        return
    timeout = datetime.timedelta(seconds=timeout_seconds)
    backend = device.communication_backend()
    device_id = device.current_device() if device.is_cuda() else None
    if "WORLD_SIZE" in os.environ and "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout, device_id=device_id)
        return
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout, device_id=device_id)


def tensor_parallel_size() -> int:
    """Ranks of this rank's tensor-parallel group."""
    from megatron.core import parallel_state

    return int(parallel_state.get_tensor_model_parallel_world_size())


def tensor_parallel_rank() -> int:
    """This rank's place in its tensor-parallel group."""
    from megatron.core import parallel_state

    return int(parallel_state.get_tensor_model_parallel_rank())


def tensor_parallel_group() -> dist.ProcessGroup:
    """This rank's tensor-parallel group."""
    from megatron.core import parallel_state

    return parallel_state.get_tensor_model_parallel_group()


def amax_reduction_group() -> dist.ProcessGroup:
    """The ranks that share FP8's scales: all tensor-, context- and data-parallel peers of this rank's stage."""
    from megatron.core import parallel_state

    return parallel_state.get_amax_reduction_group(with_context_parallel=True)


def expert_parallel_size() -> int:
    """Ranks that share each layer's routed experts."""
    from megatron.core import parallel_state

    return int(parallel_state.get_expert_model_parallel_world_size())


def expert_parallel_rank() -> int:
    """Which of the equal shares of the experts this rank holds."""
    from megatron.core import parallel_state

    return int(parallel_state.get_expert_model_parallel_rank())


def pipeline_parallel_size() -> int:
    """Pipeline stages."""
    from megatron.core import parallel_state

    return int(parallel_state.get_pipeline_model_parallel_world_size())


def pipeline_parallel_rank() -> int:
    """This rank's stage, from 0."""
    from megatron.core import parallel_state

    return int(parallel_state.get_pipeline_model_parallel_rank())


def pipeline_parallel_group() -> dist.ProcessGroup:
    """The ranks that hold the stages of this rank's copy of the model."""
    from megatron.core import parallel_state

    return parallel_state.get_pipeline_model_parallel_group()


def context_parallel_size() -> int:
    """Ranks that share each sequence."""
    from megatron.core import parallel_state

    return int(parallel_state.get_context_parallel_world_size())


def context_parallel_rank() -> int:
    """Which part of each sequence this rank has, from 0."""
    from megatron.core import parallel_state

    return int(parallel_state.get_context_parallel_rank())


def context_parallel_group() -> dist.ProcessGroup:
    """The ranks that share this rank's sequences."""
    from megatron.core import parallel_state

    return parallel_state.get_context_parallel_group()


def data_parallel_group() -> dist.ProcessGroup:
    """The ranks with samples of their own that hold the same shard of the model."""
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_group()


def data_parallel_size() -> int:
    """Ranks, or groups of context-parallel ranks, with samples of their own."""
    from megatron.core import parallel_state

    return int(parallel_state.get_data_parallel_world_size())


def data_parallel_rank() -> int:
    """Which share of the samples is this rank's and its context-parallel peers'."""
    from megatron.core import parallel_state

    return int(parallel_state.get_data_parallel_rank())


def layout() -> dict[str, int]:
    """How the world is divided: size of each axis."""
    return {
        "tensor": tensor_parallel_size(),
        "pipeline": pipeline_parallel_size(),
        "context": context_parallel_size(),
        "data": data_parallel_size(),
    }


def rank() -> int:
    """Rank in the world; 0 before it exists."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Ranks in the world; 1 before it exists."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rendezvous_store() -> dist.Store:
    """The store through which the ranks found each other."""
    return dist.distributed_c10d._get_default_store()


def rng_tracker_states() -> dict[str, torch.Tensor]:
    """States of megatron-core's tracker by name (part of a bitwise resume); clones."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    return {name: state.clone() for name, state in get_cuda_rng_tracker().get_states().items()}


def set_rng_tracker_states(states: dict[str, torch.Tensor]) -> None:
    """Set what :func:`rng_tracker_states` returned."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    get_cuda_rng_tracker().set_states({name: state.clone() for name, state in states.items()})

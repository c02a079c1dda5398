"""megatron-core's process groups under the names that DeepSpeed asks its ``mpu`` for.

DeepSpeed sums gradients and shards ZeRO's state over its "data-parallel" group. Context-parallel ranks hold the same
weights and see different tokens, so every data-parallel answer here includes them. DeepSpeed's "model-parallel" group
is the one over which it adds up gradient norms: tensor times pipeline ranks.

Routed experts that expert parallelism divides have data-parallel groups of their own. DeepSpeed keeps such groups in
tables by name and finds them through marks on a parameter: :func:`register_experts`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from megatron.core import parallel_state
from torch import nn
from torch.distributed import ProcessGroup, get_process_group_ranks

from gptoughts.parallel.partition import is_expert_parallel

EXPERTS = "experts"
"""The name under which DeepSpeed knows the groups of routed experts."""


def expert_data_parallel_group() -> ProcessGroup:
    """Ranks with the same routed experts, context parallelism included."""
    return parallel_state.get_expert_data_parallel_group()


def expert_parallel_group() -> ProcessGroup:
    """Ranks that hold different routed experts of the same layers, and each the same part of their width."""
    return parallel_state.get_expert_model_parallel_group()


def register_experts(parameters: Iterable[nn.Parameter]) -> bool:
    """Tell DeepSpeed which parameters are experts that are divided, and over which ranks; whether there are any.

    Stages 1 and 2 read ``group_name`` and look the expert-data-parallel group up. Stage 3 reads the marks of its own
    expert layers: with them gradients are divided by all data-parallel ranks, as they have to be (each rank's is a sum
    over the samples of a whole expert-parallel group already), and added to the norm over the ranks of the named
    expert-parallel group (stage3.py:675-720 and 1991-1997 of 0.19.8). That sum takes the place of the one over the
    model-parallel group, so the named group is expert x tensor x pipeline.

    Collective: none.
    """
    from deepspeed.utils import groups

    whole_model = parallel_state.get_expert_tensor_model_pipeline_parallel_group()
    for table, group in (
        ("EXPERT_PARALLEL_GROUP", whole_model),
        ("EXPERT_DATA_PARALLEL_GROUP", expert_data_parallel_group()),
    ):
        getattr(groups, f"_{table}")[EXPERTS] = group
        getattr(groups, f"_{table}_RANKS")[EXPERTS] = get_process_group_ranks(group)
    experts: list[Any] = [parameter for parameter in parameters if is_expert_parallel(parameter)]
    for parameter in experts:
        parameter.group_name = EXPERTS
        parameter.ds_zero_placement_family = "autoep_expert"
        parameter.ds_zero_partition_group_name = EXPERTS
    return bool(experts)


def forget_mpu(mpu: object) -> None:
    """Let DeepSpeed forget the ``mpu`` of a closed engine; an engine made without one would ask it. Collective: none.

    DeepSpeed stores the last one that it was given for the whole process (utils/groups.py:51 of 0.19.8). That of a
    later engine stays: DeepSpeed also destroys engines when they are collected as garbage.
    """
    from deepspeed.utils import groups

    if groups.mpu is mpu:
        groups.mpu = None


class DeepSpeedMpu:
    """Answers DeepSpeed's questions from ``megatron.core.parallel_state``, which has to be initialised.

    Collective: none; every method only reads groups that exist.
    """

    def get_model_parallel_group(self) -> ProcessGroup:
        """Tensor x pipeline ranks: one whole copy of the model."""
        return parallel_state.get_model_parallel_group()

    def get_model_parallel_world_size(self) -> int:
        """Ranks that share one copy of the model."""
        return self.get_model_parallel_group().size()

    def get_model_parallel_rank(self) -> int:
        """The tensor-parallel rank: where it is 0, parameters that tensor parallelism replicates count in norms.

        ZeRO-3 asks for this rank and nothing finer (runtime/zero/stage3.py:376 of 0.19.8). The rank within tensor x
        pipeline would leave the norms of later stages without their replicated parameters.
        """
        return self.get_tensor_model_parallel_rank()

    def get_tensor_model_parallel_group(self) -> ProcessGroup:
        """Ranks that divide each matrix."""
        return parallel_state.get_tensor_model_parallel_group()

    def get_tensor_model_parallel_world_size(self) -> int:
        """Ranks that divide each matrix."""
        return parallel_state.get_tensor_model_parallel_world_size()

    def get_tensor_model_parallel_rank(self) -> int:
        """Which part of each matrix this rank has."""
        return parallel_state.get_tensor_model_parallel_rank()

    def get_tensor_model_parallel_src_rank(self) -> int:
        """Global rank of the first of this rank's tensor-parallel peers."""
        return parallel_state.get_tensor_model_parallel_src_rank()

    def get_pipeline_model_parallel_group(self) -> ProcessGroup:
        """Ranks that hold the stages of one copy of the model."""
        return parallel_state.get_pipeline_model_parallel_group()

    def get_pipeline_model_parallel_world_size(self) -> int:
        """Pipeline stages."""
        return parallel_state.get_pipeline_model_parallel_world_size()

    def get_pipeline_model_parallel_rank(self) -> int:
        """This rank's stage."""
        return parallel_state.get_pipeline_model_parallel_rank()

    def get_data_parallel_group(self) -> ProcessGroup:
        """Ranks with the same weights, context parallelism included."""
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    def get_data_parallel_world_size(self) -> int:
        """Ranks with the same weights."""
        return self.get_data_parallel_group().size()

    def get_data_parallel_rank(self) -> int:
        """This rank's place among those with the same weights."""
        return self.get_data_parallel_group().rank()

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Global ranks of the group with the same weights."""
        return get_process_group_ranks(self.get_data_parallel_group())

"""The training state that DeepSpeed shards, as named pieces: what portable checkpoints are made of.

Where the fp32 weights and moments of a parameter are:

- stage 0: whole, in the optimizer's masters (the parameter itself in fp32);
- stages 1 and 2: all parameters of an optimizer group lie one after the other in a flat tensor of which each
  data-parallel rank has an equal slice;
- stage 3: each parameter is cut into equal pieces over the data-parallel ranks (the last ones padded), and a rank's
  pieces lie one after the other in flat sub-groups; with offload to NVMe these are in files (``swapped_state``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from gptoughts.engine.file_tensor import MappedFile
from gptoughts.engine.interface import InitialOfBuffer, NamedBuffers, StateFragment
from gptoughts.engine.optimizer import allocate_state, set_step_count, shard_shape, step_count
from gptoughts.engine.replicated_optimizer import ReplicatedOptimizer
from gptoughts.engine.swapped_state import MOMENTS, WEIGHT, SwappedState
from gptoughts.engine.zero_engine import ZeroEngine
from gptoughts.errors import CheckpointError
from gptoughts.parallel.deepspeed_mpu import expert_data_parallel_group, expert_parallel_group
from gptoughts.parallel.partition import is_expert_parallel

BUFFER = "buffer"
LOSS_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class _Slice:
    """``flat[offset : offset + numel]`` holds ``numel`` elements, from ``start``, of a parameter's flattened shard."""

    name: str
    flat: Tensor
    """Flat fp32 tensor that the basic optimizer updates."""
    offset: int
    start: int
    numel: int


class TrainingState:
    """Reads and writes the optimizer behind an engine.

    Args:
        engine: DeepSpeed's engine.
        parameters: Global name to parameter.
        named_buffers: Makes the table of buffers; asked each time, since moving a model replaces them.
        initial_of_buffer: Says which of them a checkpoint may lack.
    """

    def __init__(
        self,
        engine: ZeroEngine,
        parameters: Mapping[str, nn.Parameter],
        named_buffers: NamedBuffers = dict,
        initial_of_buffer: InitialOfBuffer = lambda _: None,
    ) -> None:
        self._named_buffers = named_buffers
        self._initial_of_buffer = initial_of_buffer
        self._optimizer: Any = engine.optimizer
        self._stage = engine.zero_optimization_stage()
        # Any: DeepSpeed and megatron-core keep what they know of a parameter in attributes of it.
        self._parameters: dict[str, Any] = {name: p for name, p in parameters.items() if p.requires_grad}
        self._basic: torch.optim.Optimizer = self._optimizer.optimizer
        self._swapped = SwappedState(self._optimizer)
        in_files = {id(flat) for flat in self._swapped.flats}
        allocate_state(self._basic, [flat for flat in self._flat_tensors() if id(flat) not in in_files])
        self._swapped.allocate(lambda flat: allocate_state(self._basic, [flat]))
        set_step_count(self._basic, 0)

    def fragments(self) -> list[StateFragment]:
        """This rank's pieces, parameter by parameter, then the buffers. Collective: none."""
        return self._fragments(self._mapped())

    def _mapped(self) -> dict[int, dict[str, MappedFile]]:
        """Of each flat tensor whose state is in files (its id), the files."""
        return {id(flat): self._swapped.tensors(flat) for flat in self._swapped.flats}

    def _fragments(self, mapped: Mapping[int, Mapping[str, MappedFile]]) -> list[StateFragment]:
        is_first_replica = parallel_state.get_data_parallel_group(with_context_parallel=True).rank() == 0
        is_first_expert_replica = expert_data_parallel_group().rank() == 0
        is_first_shard = parallel_state.get_tensor_model_parallel_rank() == 0
        fragments = []
        for piece in self._slices():
            parameter: Any = self._parameters[piece.name]
            is_divided = bool(getattr(parameter, "tensor_model_parallel", False))
            is_first = is_first_expert_replica if is_expert_parallel(parameter) else is_first_replica
            shape, offset = _over_all_experts(parameter)
            in_files = mapped.get(id(piece.flat))
            for kind, flat in self._tensors(piece.flat) if in_files is None else _contents(in_files):
                fragments.append(
                    StateFragment(
                        name=piece.name,
                        kind=kind,
                        tensor=flat.view(-1).narrow(0, piece.offset, piece.numel),
                        start=offset + piece.start,
                        shard_shape=shape,
                        partition_dim=parameter.partition_dim if is_divided else None,
                        partition_stride=getattr(parameter, "partition_stride", 1) if is_divided else 1,
                        is_owner=(self._stage > 0 or is_first) and (is_divided or is_first_shard),
                        folder=None if in_files is None else self._swapped.folder,
                    )
                )
        is_first = is_first_replica and is_first_shard
        initial_of = self._initial_of_buffer
        return fragments + [
            _buffer_fragment(name, buffer, is_first, initial_of(name)) for name, buffer in self._named_buffers().items()
        ]

    def scalars(self) -> dict[str, Any]:
        """Step count and loss scaler, as numbers that JSON holds. Collective: none."""
        return {"optimizer_steps": step_count(self._basic), "loss_scaler": self.loss_scaler()}

    def loss_scaler(self) -> dict[str, Any]:
        """The loss scaler's numbers. Collective: none."""
        scaler = self._optimizer.loss_scaler
        return {field: getattr(scaler, field) for field in LOSS_SCALER_FIELDS if hasattr(scaler, field)}

    def set_loss_scaler(self, numbers: Mapping[str, Any]) -> None:
        """Put back what :meth:`loss_scaler` gave, as far as this scaler knows it. Collective: none."""
        for field, value in numbers.items():
            if hasattr(self._optimizer.loss_scaler, field):
                setattr(self._optimizer.loss_scaler, field, value)

    def load(self, read: Callable[[StateFragment], Tensor], scalars: Mapping[str, Any]) -> None:
        """Fill all fragments, then bring the model's own weights up to date.

        Raises:
            CheckpointError: a piece of another length.
        Collective: data-parallel group.
        """
        mapped = self._mapped()
        with torch.no_grad():
            for fragment in self._fragments(mapped):
                piece = read(fragment)
                if piece.numel() != fragment.tensor.numel():
                    raise CheckpointError(
                        f"{fragment.name} ({fragment.kind}): {piece.numel()} elements from offset {fragment.start}, "
                        f"this layout needs {fragment.tensor.numel()}",
                        is_rank_local=True,
                    )
                fragment.tensor.copy_(piece.reshape(-1))
            for files in mapped.values():
                for file in files.values():
                    file.flush()
            set_step_count(self._basic, int(scalars["optimizer_steps"]))
            self.set_loss_scaler(scalars.get("loss_scaler", {}))
            self._refresh_weights()

    def _flat_tensors(self) -> list[Tensor]:
        if self._stage == 0:
            return list(self._optimizer.masters)
        if self._stage < 3:
            return list(self._optimizer.single_partition_of_fp32_groups)
        return list(self._optimizer.fp32_partitioned_groups_flat)

    def _tensors(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        yield WEIGHT, flat.detach()
        for kind in MOMENTS:
            yield kind, self._basic.state[flat][kind]

    def _slices(self) -> Iterator[_Slice]:
        by_stage = {0: self._whole_slices, 1: self._flat_slices, 2: self._flat_slices, 3: self._partition_slices}
        return by_stage[self._stage]()

    def _whole_slices(self) -> Iterator[_Slice]:
        optimizer: ReplicatedOptimizer = self._optimizer
        masters = {id(p): m for p, m in zip(optimizer.parameters, optimizer.masters, strict=True)}
        for name, parameter in self._parameters.items():
            yield _Slice(name, masters[id(parameter)], 0, 0, parameter.numel())

    def _flat_slices(self) -> Iterator[_Slice]:
        # deepspeed/utils/tensor_fragment.py: each parameter knows its part of this rank's flat slice, if it has one.
        for name, parameter in self._parameters.items():
            mapping = parameter._hp_mapping
            if mapping is None:
                continue
            flat = self._optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
            low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
            yield _Slice(name, flat, high.start, low.start, low.numel)

    def _partition_slices(self) -> Iterator[_Slice]:
        optimizer = self._optimizer
        for name, parameter in self._parameters.items():
            group, offset, padded_numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
            rank = torch.distributed.get_rank(group=parameter.ds_process_group)
            start = rank * padded_numel
            numel = min(padded_numel, parameter.ds_numel - start)
            if numel > 0:
                yield _Slice(name, optimizer.fp32_partitioned_groups_flat[group], offset, start, numel)

    def _refresh_weights(self) -> None:
        optimizer = self._optimizer
        if self._stage == 0:
            optimizer.refresh_parameters()
        elif self._stage < 3:
            optimizer.update_lp_params()
        else:
            # As at the end of a step (stage3.py:2835-2870): the shards, then the parameters that stay whole.
            for group in range(len(optimizer.fp16_groups)):
                if self._swapped.is_swapped(group):
                    self._swapped.refresh_weights(group)
                else:
                    optimizer._reassign_or_swap_out_partitioned_parameters(group)
            if optimizer.persistent_parameters:
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def _contents(files: Mapping[str, MappedFile]) -> Iterator[tuple[str, Tensor]]:
    return ((kind, file.tensor) for kind, file in files.items())


def _over_all_experts(parameter: nn.Parameter) -> tuple[tuple[int, ...], int]:
    """Shape of the tensor-parallel shard with the experts of all ranks, and where this rank's begin when flattened.

    Experts are the first dimension, so that those of a rank are one run of elements: to a checkpoint expert parallelism
    is a cut of the flattened shard like ZeRO's.
    """
    shape = shard_shape(parameter)
    if not is_expert_parallel(parameter):
        return shape, 0
    group = expert_parallel_group()
    return (shape[0] * group.size(), *shape[1:]), group.rank() * math.prod(shape)


def _buffer_fragment(name: str, buffer: Tensor, is_owner: bool, initial: float | None) -> StateFragment:
    return StateFragment(
        name=name,
        kind=BUFFER,
        tensor=buffer.detach().view(-1),
        start=0,
        shard_shape=tuple(buffer.shape),
        partition_dim=None,
        partition_stride=1,
        is_owner=is_owner,
        initial=initial,
    )

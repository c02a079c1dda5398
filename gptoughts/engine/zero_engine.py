"""DeepSpeed's engine, adapted to a caller that owns the schedule, the accumulation and the learning rate."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed import comm as deepspeed_comm
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import ZERO_OPTIMIZATION, DeepSpeedEngine
from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler
from deepspeed.runtime.zero.partition_parameters import restore_init_context, shutdown_init_context
from torch import nn

from gptoughts.engine.module_trace import compare_within_data_parallel_group
from gptoughts.engine.parameter_swapper import UNUSED_BUFFERS, ParameterSwapper
from gptoughts.engine.replicated_optimizer import ReplicatedOptimizer
from gptoughts.engine.sub_groups import join_norms
from gptoughts.engine.swap_folder import SwapFolder
from gptoughts.engine.weight_gathering import gather_in_place_on_gloo
from gptoughts.errors import PlatformError
from gptoughts.parallel.deepspeed_mpu import (
    DeepSpeedMpu,
    expert_data_parallel_group,
    expert_parallel_group,
    forget_mpu,
    register_experts,
)
from gptoughts.parallel.partition import is_expert_parallel
from gptoughts.platform.device import local_rank


class ZeroEngine(DeepSpeedEngine):
    """Differences to DeepSpeed's engine, each for a reason given at the method (lines of 0.19.8)."""

    event_monitor: Any
    """The monitors that the JSON switches on."""
    swap_folders: Sequence[SwapFolder] = ()
    """Where this rank's state is on a disk; removed with the engine."""

    def destroy(self) -> None:
        """Take DeepSpeed's hooks off the model, its groups out of DeepSpeed's globals, and its files off the disk."""
        super().destroy()
        forget_mpu(self.mpu)
        for swapper in _parameter_swappers(self.module):
            swapper.close()
        for folder in self.swap_folders:
            folder.remove()

    def _configure_distributed_model(self, model: nn.Module) -> None:
        has_experts = register_experts(model.parameters())
        super()._configure_distributed_model(model)
        # engine.py:2101 knows its own expert layers only. With this, stages 1 and 2 sum each gradient over the ranks
        # with the same experts, of whichever layer (stage_1_and_2.py:1640); stage 3 goes by the parameters' marks.
        self.has_moe_layers = has_experts and self.zero_optimization_stage() in (1, 2)

    def _configure_optimizer(self, client_optimizer: torch.optim.Optimizer, model_parameters: Any) -> None:
        # Stage 0 is ours, see replicated_optimizer.py.
        if self.zero_optimization():
            super()._configure_optimizer(client_optimizer, model_parameters)
            return
        self.enable_backward_allreduce = False
        self.basic_optimizer = client_optimizer
        mpu = self.mpu
        self.optimizer = ReplicatedOptimizer(
            client_optimizer,
            clip_grad=self.gradient_clipping(),
            data_parallel_group=mpu.get_data_parallel_group(),
            expert_data_parallel_group=expert_data_parallel_group(),
            expert_parallel_group=expert_parallel_group(),
            model_parallel_group=mpu.get_model_parallel_group(),
            tensor_parallel_rank=mpu.get_tensor_model_parallel_rank(),
            loss_scaler=CreateLossScaler(
                dtype=self.get_data_types()[0],
                static_loss_scale=self.loss_scale(),
                dynamic_scaling=self.dynamic_loss_scale(),
                dynamic_loss_args=self.dynamic_loss_scale_args(),
            ),
            reduce_bucket_size=int(self.zero_reduce_bucket_size()),
        )

    def _do_optimizer_sanity_check(self, basic_optimizer: torch.optim.Optimizer) -> str:
        # engine.py:2305 sends bf16 with fp32 accumulation at stage 1 to BF16_Optimizer, which asserts that the norm is
        # not 0 and applies non-finite gradients; ZeRO's own optimizer accumulates in fp32 as well.
        return ZERO_OPTIMIZATION

    def zero_reduce_scatter(self) -> bool:
        """Whether gradients are reduce-scattered, where the JSON leaves it open: where that costs less.

        Stages 1 and 2 all-reduce either way, and with reduce-scatter copy each bucket before and after it (zero/
        stage_1_and_2.py:1545). gloo's reduce-scatter costs more than its all-reduce. Experts of their own ranks,
        offload, and fp16, whose sums may overflow before they are divided, stay with DeepSpeed's default.
        """
        if "reduce_scatter" in self.config["zero_optimization"]:
            return bool(super().zero_reduce_scatter())
        if self.has_moe_layers or self.zero_offload_optimizer() is not None or self.fp16_enabled():
            return True
        is_on_gloo = dist.get_backend(self.mpu.get_data_parallel_group()) == dist.Backend.GLOO
        return self.zero_optimization_stage() == 3 and not is_on_gloo

    def clip_fp32_gradients(self) -> None:
        """Nothing: the stage 0 optimizer clips, with the norm that it reports."""

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Forward of one chunk and microbatch; prepares its backward."""
        if not self.zero_optimization():
            # The hooks that DeepSpeed puts on an output refuse a direct backward at stage 0 (engine.py:3131).
            return self.module(*inputs, **kwargs)
        return super().forward(*inputs, **kwargs)

    def _backward_prologue(self) -> None:
        # Under pipelining forwards and backwards of several microbatches alternate: what DeepSpeed resets in each
        # forward (engine.py:2992) has to be reset before each backward, else one never reaches its epilogue.
        optimizer: Any = self.optimizer
        optimizer.clear_backward_seen_flag()
        if self.zero_optimization_partition_weights() and optimizer.micro_step_id == 0:
            self._clear_partitioned_gradients()
        # The schedule scales the loss itself (grad_scale_func); without this engine.py:3205 refuses its backward.
        self._manual_backward_expected = True
        super()._backward_prologue()

    def _clear_partitioned_gradients(self) -> None:
        """At a step's first backward: ZeRO-3 is to add to zeros all gradients of the step.

        In the first backward it overwrites the gradients of the step before, in the others it adds to them (zero/
        stage3.py:2024). With interleaved stages each backward reaches one of this rank's chunks, so that the others'
        first gradients would be added to the former step's.
        """
        if len(self.module.chunks) > 1:
            optimizer: Any = self.optimizer
            optimizer.grad_partitions_flat_buffer.zero_()
            optimizer.micro_step_id = 1


def build_zero_engine(
    module: nn.Module, optimizer: torch.optim.Optimizer, deepspeed_json: Mapping[str, Any]
) -> ZeroEngine:
    """``deepspeed.initialize`` for :class:`ZeroEngine`. Collective: every rank of the world."""
    shutdown_init_context()
    initialize_communication()
    compare_within_data_parallel_group()
    gather_in_place_on_gloo()
    config = engine_config(deepspeed_json)
    folders = claim_swap_folders(config, "offload_optimizer")
    mpu = DeepSpeedMpu()
    engine = ZeroEngine(
        args=None,
        model=module,
        optimizer=optimizer,
        mpu=mpu,
        dist_init_required=False,
        config=config,
        config_class=DeepSpeedConfig(config, mpu),
    )
    restore_init_context()
    # With caller-owned accumulation its sample counter stays 0, so that engine.step would log at x = 0
    # (engine.py:3646); events are written with our own step instead.
    engine.swap_folders = folders
    if engine.zero_optimization_partition_weights():
        join_norms(engine.optimizer)
    engine.event_monitor = engine.monitor
    engine.monitor = SimpleNamespace(enabled=False)
    return engine


def initialize_communication() -> None:
    """Give DeepSpeed its wrapper around the process group that exists. Collective: every rank of the world."""
    # engine.py:1972 (0.19.8) refuses a process without it, also one that no launcher started.
    os.environ.setdefault("LOCAL_RANK", str(local_rank()))
    deepspeed_comm.init_distributed(
        dist_backend=get_accelerator().communication_backend_name(), dist_init_required=False
    )


def engine_config(deepspeed_json: Mapping[str, Any]) -> dict[str, Any]:
    """What DeepSpeed is given: the resolved JSON with the settings that the schedule and exactness demand."""
    config = copy.deepcopy(dict(deepspeed_json))
    config["gradient_accumulation_steps"] = 1
    config["managed_gradient_accumulation"] = False
    for ours in ("train_batch_size", "optimizer", "scheduler"):
        config.pop(ours, None)
    config.setdefault("train_micro_batch_size_per_gpu", 1)
    zero = config.setdefault("zero_optimization", {})
    if (zero.get("offload_param") or {}).get("device") == "nvme":
        zero["offload_param"] |= UNUSED_BUFFERS
    if config.get("bf16", {}).get("enabled"):
        # Without it ZeRO 1 and 2 apply non-finite gradients in bf16 (stage_1_and_2.py:3042).
        config["bf16"]["check_grad_overflow"] = True
    if is_half_precision(config) and zero.get("stage", 0) > 0:
        config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    return config


def claim_swap_folders(config: dict[str, Any], block: str) -> list[SwapFolder]:
    """Put a folder of this rank's own in place of the JSON's, where ``block`` offloads to NVMe.

    Raises:
        PlatformError: it cannot be made.
    """
    offload = config["zero_optimization"].get(block) or {}
    if offload.get("device") != "nvme":
        return []
    parent = Path(offload["nvme_path"])
    try:
        folder = SwapFolder(parent)
    except OSError as error:
        raise PlatformError(
            f"zero_optimization.{block}.nvme_path={parent}: cannot be used: {error.strerror}", is_rank_local=True
        ) from None
    offload["nvme_path"] = str(folder.path)
    return [folder]


def is_half_precision(config: Mapping[str, Any]) -> bool:
    """Whether forward and backward run in bf16 or fp16."""
    return any(bool(config.get(block, {}).get("enabled")) for block in ("bf16", "fp16"))


def zero_stage(deepspeed_json: Mapping[str, Any]) -> int:
    """The ZeRO stage that a resolved JSON asks for."""
    return int(deepspeed_json.get("zero_optimization", {}).get("stage", 0))


def has_optimizer_offload(deepspeed_json: Mapping[str, Any]) -> bool:
    """Whether ZeRO-Offload keeps the optimizer on the CPU (or on disk)."""
    offload = deepspeed_json.get("zero_optimization", {}).get("offload_optimizer") or {}
    return offload.get("device", "none") != "none"


class _Init(deepspeed.zero.Init):
    """Shards experts that expert parallelism divides over the ranks that have the same ones."""

    def _convert_to_deepspeed_param(self, param: Any) -> None:
        if is_expert_parallel(param):
            # What partition_parameters.py:1302 (0.19.8) takes in place of the context's group.
            param.ds_zero_partition_process_group = expert_data_parallel_group()
        super()._convert_to_deepspeed_param(param)


def _build_parameter_swapper(config: dict[str, Any], mpu: DeepSpeedMpu, dtype: torch.dtype) -> ParameterSwapper | None:
    """What keeps weights in files, where the configuration says so."""
    folders = claim_swap_folders(config, "offload_param")
    return ParameterSwapper(DeepSpeedConfig(config, mpu), dtype, folders[0]) if folders else None


def _parameter_swappers(module: nn.Module) -> set[ParameterSwapper]:
    found = {getattr(parameter, "nvme_swapper", None) for parameter in module.parameters()}
    return {swapper for swapper in found if swapper is not None}


def partitioned_construction(deepspeed_json: Mapping[str, Any], dtype: torch.dtype) -> Callable[[], Any]:
    """A context in which ZeRO-3 shards every parameter over the data-parallel group as soon as it is made."""
    config = engine_config(deepspeed_json)
    # It would replace torch.nn.functional.linear for the rest of the process; megatron-core's linears have their own.
    config["zero_optimization"].setdefault("memory_efficient_linear", False)

    swappers: list[ParameterSwapper | None] = []

    def enter() -> Any:
        initialize_communication()
        gather_in_place_on_gloo()
        mpu = DeepSpeedMpu()
        # One for all chunks of the model: DeepSpeed takes the first parameter's for all (zero/stage3.py:1018, 0.19.8).
        if not swappers:
            swappers.append(_build_parameter_swapper(config, mpu, dtype))
        context = _Init(
            data_parallel_group=mpu.get_data_parallel_group(),
            config_dict_or_path=config,
            mpu=mpu,
            param_swapper=swappers[0],
        )
        # Given as an argument it would be bf16 wherever fp16 is not supported, whatever was asked for: a conditional
        # expression without brackets (runtime/zero/partition_parameters.py:409 of 0.19.8).
        context.dtype = dtype
        return context

    return enter

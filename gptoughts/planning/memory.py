"""Bytes on the fullest rank of a layout: what it holds all the time, and the most that a step adds.

ZeRO (arXiv:1910.02054, section 3) of P parameters on a rank of a stage and n data-parallel ranks, in bytes:

    stage    weights     gradients   optimizer
    0        w P         4 P         8 P + masters
    1        w P         g P         12 P / n
    2        w P         g P / n     12 P / n
    3        w P / n     g P / n     12 P / n

with w bytes per weight and g of an accumulated gradient (4 unless data_types.grad_accum_dtype says otherwise). Masters
are 4 P where weights are not fp32. DeepSpeed keeps fp32 masters beside fp32 weights as well, from stage 1 on. Routed
experts are divided by n / (expert-parallel ranks). What a step adds is the greater of two moments:

    backward   activations (``activations``), one operator's temporaries, ZeRO's bucket, and what ZeRO-3 has gathered
    update     the bucket and a flat copy of the gradients that are updated here

Weights that stage 3 does not divide because they are small (norms), padding and the optimizer's step counts are left
out: below 1% of any model that needs more than one rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gptoughts.config.experiment import ExperimentConfig
from gptoughts.models.flops import StageParameters, stage_parameters
from gptoughts.planning import activations
from gptoughts.planning.activations import WIDTHS, Microbatch

_FP32 = 4
_MOMENTS = 8
_DEFAULT_BUCKET_ELEMENTS = 500_000_000
_DEFAULT_REUSE_ELEMENTS = 1_000_000_000
"""DeepSpeed 0.19.8, runtime/zero/config.py:113 and 251."""


@dataclass(frozen=True)
class ZeroSettings:
    """What DeepSpeed's JSON says about memory and exchange."""

    stage: int
    gradient_width: int
    """Bytes of an accumulated gradient."""
    communication_width: int
    """Bytes of a gradient on its way to other ranks."""
    bucket_elements: int
    """Gradients reduced at once."""
    prefetch_elements: int
    """Weights that stage 3 fetches ahead."""
    reuse_elements: int
    """Stage 3 keeps a weight whose next use is nearer than this."""
    num_buckets: int
    """2 where reduction overlaps with backward at stage 2."""
    offloads_optimizer: bool
    offloads_parameters: bool

    @staticmethod
    def read(deepspeed: Mapping[str, Any], precision: str) -> ZeroSettings:
        """From what ``deepspeed.initialize`` would be given."""
        zero = deepspeed.get("zero_optimization", {})
        stage = int(zero.get("stage", 0))
        accumulated = deepspeed.get("data_types", {}).get("grad_accum_dtype", "fp32")
        gradient_width = WIDTHS[accumulated] if stage else _FP32
        sent = deepspeed.get("communication_data_type", precision if stage else "fp32")
        return ZeroSettings(
            stage=stage,
            gradient_width=gradient_width,
            communication_width=WIDTHS[sent],
            bucket_elements=int(zero.get("reduce_bucket_size", _DEFAULT_BUCKET_ELEMENTS)),
            prefetch_elements=int(zero.get("stage3_prefetch_bucket_size", 0)),
            reuse_elements=int(zero.get("stage3_max_reuse_distance", _DEFAULT_REUSE_ELEMENTS)),
            num_buckets=2 if stage == 2 and zero.get("overlap_comm") else 1,
            offloads_optimizer=_is_on_cpu(zero, "offload_optimizer"),
            offloads_parameters=_is_on_cpu(zero, "offload_param"),
        )


def _is_on_cpu(zero: Mapping[str, Any], block: str) -> bool:
    return (zero.get(block) or {}).get("device", "none") == "cpu"


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    """Of them activations that the output layer and the loss keep (0 before the last stage); counted once, here."""
    buffers: int
    """Gathered weights, buckets and operators' temporaries at the fullest moment."""
    host: int = 0
    """In the host's memory (offload)."""

    @property
    def total(self) -> int:
        """On the device."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.logits + self.buffers


@dataclass(frozen=True)
class Division:
    """How a rank's parameters are divided for ZeRO."""

    dense: int
    """Parameters on a rank beside routed experts."""
    routed: int
    data: int
    """Data-parallel ranks."""
    expert: int
    """Expert-parallel ranks among them."""

    @property
    def whole(self) -> int:
        """Without ZeRO."""
        return self.dense + self.routed

    @property
    def part(self) -> float:
        """With ZeRO."""
        return self.dense / self.data + self.routed / (self.data // self.expert)


def divide(stage: StageParameters, config: ExperimentConfig, data: int) -> Division:
    """Of one stage, over ``data`` data-parallel ranks."""
    tensor, expert = config.parallel.tensor, config.parallel.expert
    return Division(stage.dense_on_rank(tensor), stage.routed_on_rank(tensor, expert), data, expert)


def state_bytes(division: Division, zero: ZeroSettings, width: int) -> dict[str, float]:
    """Weights, gradients and optimizer state, wherever they are.

    Args:
        division: The rank's parameters.
        zero: DeepSpeed's settings.
        width: Bytes of a weight.
    """
    whole, part = division.whole, division.part
    masters = 0 if width == _FP32 and zero.stage == 0 else _FP32
    return {
        "parameters": width * (part if zero.stage >= 3 else whole),
        "gradients": zero.gradient_width * (part if zero.stage >= 2 else whole),
        "optimizer": (_MOMENTS + masters) * (part if zero.stage >= 1 else whole),
    }


def gathered_elements(division: Division, zero: ZeroSettings, layer_elements: int) -> int:
    """Most weights that ZeRO-3 has whole at one time.

    Between a layer's forward and its backward lie twice the weights above it, so that those of the last half of the
    reuse distance stay (DeepSpeed 0.19.8, runtime/zero/partitioned_param_coordinator.py:653); beside them the layer at
    work, the one before it, and what is fetched ahead.
    """
    if zero.stage < 3:
        return 0
    return min(division.whole, zero.reuse_elements // 2 + zero.prefetch_elements + 2 * layer_elements)


def buffer_bytes(
    division: Division, zero: ZeroSettings, width: int, *, layer_elements: int, kept: int, temporaries: int
) -> int:
    """What the fullest moment of a step has beyond state and kept activations.

    Args:
        division: The rank's parameters.
        zero: DeepSpeed's settings.
        width: Bytes of a weight.
        layer_elements: Parameters of the largest layer on this rank.
        kept: Activations at their fullest, which the update no longer has.
        temporaries: Of one operator.
    """
    bucket = zero.num_buckets * min(zero.bucket_elements, max(division.whole, 1))
    if zero.stage >= 1:
        bucket = zero.num_buckets * zero.bucket_elements  # allocated whole
    backward, update = float(temporaries), 0.0
    if zero.stage == 0:
        update = _FP32 * bucket if division.data > 1 else 0
    elif zero.stage == 1:
        # Nothing is reduced before the update; the bucket holds accumulated gradients.
        update = zero.gradient_width * bucket + _FP32 * division.part
    else:
        backward += zero.communication_width * bucket
        update = _FP32 * division.part
        if zero.stage == 3:
            update += zero.communication_width * bucket
            backward += width * gathered_elements(division, zero, layer_elements)
    if zero.offloads_optimizer:
        update = 0.0  # in the host's memory
    return int(max(backward, update - kept))


def temporary_bytes(config: ExperimentConfig, batch: Microbatch, *, is_last_stage: bool) -> int:
    """The largest operator's tensors that nobody keeps: an estimate.

    The loss works on fp32 logits where weights are not fp32; SwiGLU's backward has the gradients of its input and
    output beside each other, attention's those of queries, keys and values.
    """
    model = config.model
    widest = max(3 * model.ffn_hidden_size // batch.tensor, 2 * model.attention_width() // batch.tensor)
    layer = batch.tokens * batch.width * (widest + 2 * model.hidden_size)
    logits = batch.tokens * model.padded_vocab_size // batch.tensor * _FP32 if batch.width < _FP32 else 0
    return max(layer, logits * is_last_stage)


def stage_memory(
    config: ExperimentConfig, zero: ZeroSettings, stage: int, *, data: int, num_microbatches: int
) -> RankMemory:
    """Bytes on a rank of one stage, with the output layer at every position (the most that can occur).

    Args:
        config: A resolved configuration.
        zero: DeepSpeed's settings.
        stage: Pipeline stage.
        data: Data-parallel ranks.
        num_microbatches: Per step and rank.
    """
    batch, parallel, model = activations.microbatch(config), config.parallel, config.model
    stages = stage_parameters(model, parallel)
    division = divide(stages[stage], config, data)
    is_last = stage == parallel.pipeline - 1
    kept = activations.stage_activation_bytes(config, batch, stage, num_microbatches)
    logits = activations.last_stage_bytes(model, batch) if is_last else 0
    sent = activations.pipeline_output_bytes(config, batch, stage, num_microbatches)
    layer = max(model.parameters_of_layer(index) for index in (0, model.num_layers - 1))
    routed = model.routed_parameters_of_layer(model.num_layers - 1)
    layer_elements = (layer - routed + routed // parallel.expert) // parallel.tensor
    temporaries = temporary_bytes(config, batch, is_last_stage=is_last)
    if is_last and parallel.pipeline > 1 and not model.untie_embeddings_and_output_weights:
        # The copy of a tied embedding and its gradient.
        temporaries += model.embedding_parameters() // parallel.tensor * (batch.width + _FP32)
    state = state_bytes(division, zero, batch.width)
    buffers = buffer_bytes(
        division, zero, batch.width, layer_elements=layer_elements, kept=kept + sent, temporaries=temporaries
    )
    on_host = [name for name, is_there in _offloaded(zero).items() if is_there]
    return RankMemory(
        **{name: 0 if name in on_host else int(count) for name, count in state.items()},
        activations=kept + sent - logits,
        logits=logits,
        buffers=buffers,
        host=int(sum(state[name] for name in on_host)),
    )


def _offloaded(zero: ZeroSettings) -> dict[str, bool]:
    """Whether weights, gradients and optimizer state are in the host's memory.

    Stage 1 keeps whole gradients on the device; from stage 2 on each rank's part goes where the optimizer is.
    """
    return {
        "parameters": zero.offloads_parameters,
        "gradients": zero.offloads_optimizer and zero.stage >= 2,
        "optimizer": zero.offloads_optimizer,
    }


def largest_memory(config: ExperimentConfig, zero: ZeroSettings, *, data: int, num_microbatches: int) -> RankMemory:
    """Bytes on the fullest rank of all stages; arguments as in :func:`stage_memory`."""
    stages = range(config.parallel.pipeline)
    every = (stage_memory(config, zero, stage, data=data, num_microbatches=num_microbatches) for stage in stages)
    return max(every, key=lambda memory: memory.total)

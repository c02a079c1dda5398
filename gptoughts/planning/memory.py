"""Bytes on the fullest rank of a layout: what it holds all the time, and the most that a step adds.

ZeRO (arXiv:1910.02054, section 3) of P parameters on a rank of a stage and n data-parallel ranks (context-parallel ones
are among them), in bytes:

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

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gptoughts.config.experiment import ExperimentConfig, ParallelConfig
from gptoughts.config.model import ModelConfig
from gptoughts.models.expert_shape import ExpertFields
from gptoughts.models.flops import StageParameters, stage_parameters
from gptoughts.planning import activations
from gptoughts.planning.fp8 import scaling_bytes
from gptoughts.planning.layers import WIDTHS, Microbatch, microbatch
from gptoughts.planning.offload import places, swap_buffer_bytes
from gptoughts.planning.zero import ZeroSettings

_FP32 = 4
_MOMENTS = 8
_COPIES_OF_BUFFERS = 2
"""The engine copies them before each step, so that a step can be refused (``engine.deepspeed_engine``)."""


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
    scaling: int = 0
    """FP8's histories and scales, with the copy that a step begins with (``planning.fp8``)."""
    host: int = 0
    """In the host's memory: offload, and the stability guard's snapshot."""
    disk: int = 0
    """On the disk of an offload to NVMe: state, gradients of the step, and copies of the state."""

    @property
    def total(self) -> int:
        """On the device."""
        state = self.parameters + self.gradients + self.optimizer + self.scaling
        return state + self.activations + self.logits + self.buffers


@dataclass(frozen=True)
class Division:
    """How a rank's parameters are divided for ZeRO."""

    dense: int
    """Parameters on a rank beside routed experts."""
    routed: int
    data: int
    """Data-parallel ranks, times the context-parallel ones: those with the same weights."""
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
    """Of one stage, over ``data`` data-parallel ranks and the context-parallel ones."""
    tensor, expert = config.parallel.tensor, config.parallel.expert
    replicas = data * config.parallel.context
    return Division(stage.dense_on_rank(tensor), stage.routed_on_rank(tensor, expert), replicas, expert)


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


def snapshot_bytes(division: Division, zero: ZeroSettings) -> int:
    """Of fp32 weights and moments in the stability guard's snapshot (``training.snapshot``), which has buffers, too."""
    return (_FP32 + _MOMENTS) * int(division.part if zero.stage >= 1 else division.whole)


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
        # In the host's memory; but on their way to a disk gradients pass the device (DeepSpeed 0.19.8, stage3.py:1467).
        update = _FP32 * division.part if zero.swaps_optimizer else 0.0
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


@dataclass(frozen=True)
class StageNeeds:
    """What a rank of one stage needs, whatever the ZeRO stage."""

    division: Division
    kept: int
    """Activations, logits and outputs that it has sent on."""
    logits: int
    temporaries: int
    copied_elements: int
    """Of an embedding that another stage owns."""
    layer_elements: int
    """Parameters of the largest layer on a rank."""
    tensor_elements: int = 0
    """Parameters of the largest tensor on a rank."""
    scaling: int = 0
    """Bytes of FP8's histories and scales."""


def cut_gradient_bytes(needs: StageNeeds, zero: ZeroSettings, width: int) -> int:
    """Most that stage 2 keeps of gradients beyond a rank's part.

    Where gradients have the weights' dtype (fp32), tensors that the two ends of the part cut are kept whole (DeepSpeed
    0.19.8, runtime/zero/stage_1_and_2.py:1259); else they are copied into a buffer of the part's size.
    """
    is_cut = zero.stage == 2 and zero.gradient_width == width and needs.division.data > 1
    return 2 * zero.gradient_width * needs.tensor_elements if is_cut else 0


def largest_tensor(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Parameters of a rank's largest tensor: embedding, gate and up, or all gates and ups of its experts."""
    tensors = [model.embedding_parameters(), 2 * model.hidden_size * model.ffn_hidden_size]
    if isinstance(model, ExpertFields):
        experts = model.num_moe_experts // parallel.expert
        tensors.append(experts * 2 * model.hidden_size * model.moe_ffn_hidden_size)
    return max(tensors) // parallel.tensor


def stage_needs(
    config: ExperimentConfig, *, data: int, num_microbatches: int, output_fraction: float = 1.0
) -> list[StageNeeds]:
    """Of every stage.

    Args:
        config: A resolved configuration.
        data: Data-parallel ranks.
        num_microbatches: Per step and rank.
        output_fraction: Part of the positions at which the output layer runs, where the objective selects some; all of
            them is the most that can occur.
    """
    batch, parallel, model = microbatch(config), config.parallel, config.model
    layer = max(model.parameters_of_layer(index) for index in (0, model.num_layers - 1))
    routed = model.routed_parameters_of_layer(model.num_layers - 1)
    layer_elements = (layer - routed + routed // parallel.expert) // parallel.tensor
    found = []
    for stage, parameters in enumerate(stage_parameters(model, parallel)):
        is_last = stage == parallel.pipeline - 1
        needs_embedding = not model.untie_embeddings_and_output_weights or model.mtp_depths() > 0
        is_copied = is_last and parallel.pipeline > 1 and needs_embedding
        kept = activations.stage_activation_bytes(config, batch, stage, num_microbatches, output_fraction)
        sent = activations.pipeline_output_bytes(config, batch, stage, num_microbatches)
        found.append(
            StageNeeds(
                division=divide(parameters, config, data),
                kept=kept + sent,
                logits=activations.last_stage_bytes(model, batch, output_fraction) if is_last else 0,
                temporaries=temporary_bytes(config, batch, is_last_stage=is_last),
                copied_elements=model.embedding_parameters() // parallel.tensor if is_copied else 0,
                layer_elements=layer_elements,
                tensor_elements=largest_tensor(model, parallel),
                scaling=scaling_bytes(config, stage),
            )
        )
    return found


def rank_memory(needs: StageNeeds, zero: ZeroSettings, width: int) -> RankMemory:
    """Bytes on a rank of one stage.

    Args:
        needs: The stage's.
        zero: DeepSpeed's settings.
        width: Bytes of a weight.
    """
    state = state_bytes(needs.division, zero, width)
    state["parameters"] += width * needs.copied_elements
    buffers = buffer_bytes(
        needs.division,
        zero,
        width,
        layer_elements=needs.layer_elements,
        kept=needs.kept,
        # The copy of an embedding has an fp32 gradient during a step.
        temporaries=needs.temporaries + _FP32 * needs.copied_elements + cut_gradient_bytes(needs, zero, width),
    )
    place_of = places(zero)
    by_place = {place: sum(state[name] for name in state if place_of[name] == place) for place in ("host", "disk")}
    if zero.swaps_optimizer:
        by_place["disk"] += _FP32 * needs.division.part  # gradients, on their way to the update
    return RankMemory(
        **{name: int(count) if place_of[name] == "device" else 0 for name, count in state.items()},
        activations=needs.kept - needs.logits,
        logits=needs.logits,
        buffers=buffers,
        scaling=_COPIES_OF_BUFFERS * needs.scaling,
        host=int(by_place["host"] + swap_memory(needs, zero, width)),
        disk=int(by_place["disk"]),
    )


def swap_memory(needs: StageNeeds, zero: ZeroSettings, width: int) -> int:
    """Bytes of the host's memory that a rank of one stage locks for what goes to a disk and comes from it."""
    division = needs.division
    return swap_buffer_bytes(
        zero,
        width,
        part=division.part,
        tensor_part=needs.tensor_elements / division.data,
        gathered_part=gathered_elements(division, zero, needs.layer_elements) / division.data,
    )


def largest_memory(config: ExperimentConfig, zero: ZeroSettings, needs: Sequence[StageNeeds]) -> RankMemory:
    """Bytes on the fullest rank of all stages."""
    width = WIDTHS[config.train.precision or "bf16"]
    fullest = max(needs, key=lambda of_stage: rank_memory(of_stage, zero, width).total)
    memory = rank_memory(fullest, zero, width)
    stability = config.stability
    has_snapshot = stability.enabled and stability.snapshot_interval_steps > 0
    copy = snapshot_bytes(fullest.division, zero)
    host = memory.host + has_snapshot * fullest.scaling
    if zero.swaps_optimizer:
        # Copies of what is on a disk are made there (StateFragment.empty_copy), also what a save is written from.
        return replace(memory, host=host, disk=memory.disk + copy * (has_snapshot + config.checkpoint.asynchronous))
    return replace(memory, host=host + has_snapshot * copy)

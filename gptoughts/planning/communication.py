"""Bytes that a rank sends per step along each axis, and how long its links take for them.

A ring over r ranks sends (r - 1) / r of a tensor per rank to gather or reduce-scatter it, and twice that to all-reduce
it. Of one microbatch's n = s b / c tokens on a rank and w bytes per element a layer sends

    tensor             2 (t - 1)/t n w (C + R)      all-reduces: inputs' gradients of column-parallel layers, outputs of
                                                    row-parallel ones
    with sequence      (t - 1)/t n w (3 C + 2 R)    gathered, scattered back, and gathered once more in backward
    expert             4 (e - 1)/e n k h w          to the experts and back, forward and backward (alltoall)
    context            2 (c - 1)/c n/t A w          queries, keys and values for heads, and outputs back, and gradients
    with a ring        n/t B (2 (c - 1) w + 4 c)    keys and values, twice round, and their fp32 gradients, home
    pipeline           2 n' h w per chunk           activations on, gradients back

with C and R the summed widths of column-parallel inputs and row-parallel outputs, and A the width of all that attention
takes and gives (keys and values as often as they are copied), B that of keys and values. Per step, for P parameters on
a rank and d data- and context-parallel ranks, with g bytes per gradient on its way:

    ZeRO 0             2 (d - 1)/d 4 P
    ZeRO 1             (d - 1)/d (g + w) P          gradients to their owners, weights back
    ZeRO 2             (d - 1)/d (M g + w) P        after every one of M microbatches
    ZeRO 3             (d - 1)/d M (2 w + g) P      weights gathered in forward and backward

(Megatron-LM, arXiv:1909.08053, section 3; arXiv:2205.05198, section 4.2; arXiv:2104.04473, section 3.2;
arXiv:1910.02054, section 7.) The latency of messages is left out: many small ones take longer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gptoughts.config.experiment import ExperimentConfig
from gptoughts.config.pipeline import stage_layers
from gptoughts.models.expert_shape import ExpertFields
from gptoughts.models.gpt.config import GPTConfig
from gptoughts.models.mla.config import MLAConfig
from gptoughts.planning.layers import Microbatch, exchanged_groups, microbatch
from gptoughts.planning.memory import Division
from gptoughts.planning.recompute import stage_parts
from gptoughts.planning.zero import ZeroSettings

_FP32 = 4


@dataclass(frozen=True)
class Links:
    """Bytes per second that a rank can send."""

    intra_node: float
    inter_node: float
    ranks_per_node: int

    def of_group(self, stride: int, size: int) -> float:
        """Of a group of ``size`` ranks, each ``stride`` behind the one before; the slowest link decides."""
        return self.intra_node if stride * size <= self.ranks_per_node else self.inter_node


def tensor_bytes(config: ExperimentConfig, batch: Microbatch, layers: list[int], *, is_last: bool) -> float:
    """Sent along the tensor axis for one microbatch of a stage."""
    if batch.tensor == 1:
        return 0.0
    model = config.model
    columns = [model.hidden_size]
    if isinstance(model, MLAConfig):
        columns = [2 * model.hidden_size, model.q_lora_rank or 0, model.kv_lora_rank]
    total = 0.0
    for index in layers:
        has_experts = isinstance(model, ExpertFields) and model.has_experts(index)
        shared = isinstance(model, ExpertFields) and model.moe_shared_expert_intermediate_size > 0
        halves = 1 + (has_experts and shared)  # routed experts, and shared ones beside them
        column, row = sum(columns) + halves * model.hidden_size, (1 + halves) * model.hidden_size
        total += 3 * column + 2 * row if batch.is_sequence_divided else 2 * (column + row)
        if has_experts and batch.is_sequence_divided:
            total -= model.hidden_size  # routed experts keep what they have gathered
    if is_last:
        total += (3 if batch.is_sequence_divided else 2) * model.hidden_size
    return (batch.tensor - 1) / batch.tensor * batch.tokens * batch.width * total


def expert_bytes(config: ExperimentConfig, batch: Microbatch, layers: list[int]) -> float:
    """Sent along the expert axis for one microbatch, where the load is even."""
    model, expert = config.model, batch.expert
    if expert == 1 or not isinstance(model, ExpertFields):
        return 0.0
    travels = (expert - 1) / expert * model.moe_router_topk
    if model.moe_token_dispatcher_type == "allgather":
        travels = expert - 1
    with_experts = sum(map(model.has_experts, layers))
    return 4 * with_experts * travels * batch.tokens * model.hidden_size * batch.width


def context_bytes(config: ExperimentConfig, batch: Microbatch, layers: list[int]) -> float:
    """Sent along the context axis for one microbatch of a stage."""
    model, context = config.model, batch.context
    if context == 1:
        return 0.0
    heads = model.num_attention_heads
    if isinstance(model, MLAConfig):
        ring = heads * (model.qk_head_dim + model.qk_pos_emb_head_dim + model.v_head_dim)
        width = 2 * ring
    else:
        assert isinstance(model, GPTConfig)
        assert model.num_query_groups is not None, "a resolved shape is filled in"
        assert model.kv_channels is not None
        ring = 2 * model.num_query_groups * model.kv_channels
        width = 2 * (heads + exchanged_groups(model.num_query_groups, batch)) * model.kv_channels
    numbers = len(layers) * batch.tokens / batch.tensor
    if batch.is_ring:
        return numbers * ring * (2 * (context - 1) * batch.width + _FP32 * context)
    return 2 * (context - 1) / context * numbers * width * batch.width


def second_forward_bytes(config: ExperimentConfig, batch: Microbatch, stage: int) -> dict[str, float]:
    """Sent once more for one microbatch of a stage where parts of its layers are recomputed, by axis."""
    found = {"tensor": 0.0, "expert": 0.0, "context": 0.0}
    h = config.model.hidden_size
    for index, parts in stage_parts(config.model, config.parallel, stage):
        # Backward sends as much as forward along these two axes.
        if parts & {"layer", "moe"}:
            found["expert"] += expert_bytes(config, batch, [index]) / 2
        if parts & {"layer", "core_attn"}:
            found["context"] += context_bytes(config, batch, [index]) / 2
        # Per half of a layer: a sum of its outputs, or its inputs gathered and its outputs scattered.
        halves = 2 if "layer" in parts else len(parts & {"mlp", "moe"})
        found["tensor"] += (batch.tensor - 1) / batch.tensor * batch.tokens * batch.width * 2 * halves * h
    return found


def pipeline_bytes(config: ExperimentConfig, batch: Microbatch) -> float:
    """Sent to neighbours for one microbatch by a stage in the middle."""
    parallel = config.parallel
    if parallel.pipeline == 1:
        return 0.0
    return 2 * parallel.virtual_pipeline * batch.own_tokens * config.model.hidden_size * batch.width


def data_bytes(
    division: Division, zero: ZeroSettings, width: int, num_microbatches: int, recomputed_fraction: float = 0.0
) -> float:
    """Sent along the data axis in a step.

    Args:
        division: The rank's parameters.
        zero: DeepSpeed's settings.
        width: Bytes of a weight.
        num_microbatches: Of a step.
        recomputed_fraction: Part of the weights whose products run forward twice; ZeRO-3 gathers them once more.
    """

    def exchanged(elements: int, ranks: int) -> float:
        reduced, returned = float(zero.communication_width), float(width)
        if zero.stage == 0:
            reduced, returned = 2.0 * _FP32, 0.0
        elif zero.stage == 2:
            reduced *= num_microbatches
        elif zero.stage == 3:
            reduced *= num_microbatches
            returned *= (2 + recomputed_fraction) * num_microbatches
        return (ranks - 1) / ranks * elements * (reduced + returned)

    return exchanged(division.dense, division.data) + exchanged(division.routed, division.data // division.expert)


@dataclass(frozen=True)
class Traffic:
    """What a rank sends in a step, and how long that takes."""

    num_bytes: Mapping[str, float]
    """Axis -> bytes."""
    seconds: Mapping[str, float]
    """Axis -> seconds on its links."""


def step_traffic(
    config: ExperimentConfig,
    division: Division,
    zero: ZeroSettings,
    stage: int,
    *,
    num_microbatches: int,
    links: Links,
) -> Traffic:
    """Of a rank of one stage, per step."""
    batch, parallel = microbatch(config), config.parallel
    layers = [index for chunk in stage_layers(config.model.num_layers, parallel)[stage] for index in chunk]
    is_last = stage == parallel.pipeline - 1
    if is_last:
        layers += [config.model.num_layers] * config.model.mtp_depths()
    replicas = parallel.tensor * division.data
    again = second_forward_bytes(config, batch, stage)
    # A layer's weights are mostly those of its feed-forward half.
    parts_of_layers = [parts for _, parts in stage_parts(config.model, parallel, stage)]
    recomputed = sum(bool(parts & {"layer", "mlp", "moe"}) for parts in parts_of_layers) / max(1, len(parts_of_layers))
    num_bytes = {
        "tensor": num_microbatches * (tensor_bytes(config, batch, layers, is_last=is_last) + again["tensor"]),
        "expert": num_microbatches * (expert_bytes(config, batch, layers) + again["expert"]),
        "context": num_microbatches * (context_bytes(config, batch, layers) + again["context"]),
        "pipeline": num_microbatches * pipeline_bytes(config, batch),
        "data": data_bytes(division, zero, batch.width, num_microbatches, recomputed),
    }
    rates = {
        "tensor": links.of_group(1, parallel.tensor),
        "expert": links.of_group(parallel.tensor, parallel.expert),
        "context": links.of_group(parallel.tensor, parallel.context),
        "pipeline": links.of_group(replicas, 2),
        "data": links.of_group(parallel.tensor, division.data),
    }
    return Traffic(num_bytes, {axis: count / rates[axis] for axis, count in num_bytes.items()})

"""How long a step takes: products of the slowest stage, the bubble, and links that nothing hides.

With c seconds of products and x of tensor, context, expert and pipeline exchange per microbatch of the slowest stage,
P stages, V virtual ones, M microbatches and D seconds of ZeRO's exchange (arXiv:2104.04473, section 2.2, for the
bubble):

    step = (M + (P - 1) / V) (c + x) + D

Products run at a fraction of the device's peak (``efficiency_fraction``); what is not a product is in that fraction.
ZeRO-3's exchange runs beside products and counts only where it takes longer; all other exchange is waited for.
"""

from __future__ import annotations

from dataclasses import dataclass

from gptoughts.config.experiment import ExperimentConfig
from gptoughts.config.pipeline import bubble_fraction, stage_layers
from gptoughts.models.family import Family
from gptoughts.models.flops import flops_of_ends_per_token, flops_of_layers_per_token, stage_parameters
from gptoughts.planning.communication import Links, Traffic, step_traffic
from gptoughts.planning.memory import divide
from gptoughts.planning.recompute import second_forward_flops_per_token
from gptoughts.planning.zero import ZeroSettings


@dataclass(frozen=True)
class Machine:
    """What runs the layout."""

    flops_per_second: float
    """Of matrix products, as reached."""
    links: Links


@dataclass(frozen=True)
class StepTime:
    """One step of a layout."""

    seconds: float
    compute_seconds: float
    """Products of the slowest stage."""
    exchange_seconds: float
    """Links that nothing hides."""
    bubble_fraction: float
    """Share of the pipelined part that stages wait."""
    traffic: Traffic
    """Of the stage that sends most."""
    tokens_per_second: float


def stage_flops_per_token(family: Family, config: ExperimentConfig) -> list[int]:
    """Floating-point operations per token of each stage, recompute included, over all its tensor- and context-parallel
    ranks."""
    model, parallel = config.model, config.parallel
    length = config.block_size or model.seq_length
    found = []
    for stage, chunks in enumerate(stage_layers(model.num_layers, parallel)):
        layers = [index for chunk in chunks for index in chunk]
        flops = flops_of_layers_per_token(family, model, layers, length)
        if stage == parallel.pipeline - 1:
            flops += flops_of_ends_per_token(family, model, length)
        flops += second_forward_flops_per_token(family, model, parallel, stage, length)
        found.append(flops)
    return found


def step_time(
    family: Family,
    config: ExperimentConfig,
    zero: ZeroSettings,
    machine: Machine,
    *,
    data: int,
    num_microbatches: int,
) -> StepTime:
    """Predict one step.

    Args:
        family: The model's.
        config: A resolved configuration.
        zero: DeepSpeed's settings.
        machine: Rates.
        data: Data-parallel ranks.
        num_microbatches: Per step and rank.
    """
    parallel, count = config.parallel, num_microbatches
    tokens = (config.block_size or config.model.seq_length) * (config.batch_size or 1)
    flops = max(stage_flops_per_token(family, config))
    compute = count * tokens * flops / (parallel.tensor * parallel.context) / machine.flops_per_second
    traffic = max(
        (
            step_traffic(config, divide(stage, config, data), zero, number, num_microbatches=count, links=machine.links)
            for number, stage in enumerate(stage_parameters(config.model, parallel))
        ),
        key=lambda found: sum(found.seconds.values()),
    )
    waited = sum(seconds for axis, seconds in traffic.seconds.items() if axis != "data")
    exchange = traffic.seconds["data"]
    if zero.stage == 3:
        exchange = max(0.0, exchange - compute)
    bubble = bubble_fraction(parallel, count)
    seconds = (compute + waited) / (1.0 - bubble) + exchange
    return StepTime(
        seconds=seconds,
        compute_seconds=compute,
        exchange_seconds=waited + exchange,
        bubble_fraction=bubble,
        traffic=traffic,
        tokens_per_second=tokens * count * data / seconds,
    )

"""Which activations are thrown away in forward and made again in backward, in megatron-core's words.

``full``: of a group of layers only its input stays. With ``uniform`` all layers of a chunk belong to groups of
``recompute_num_layers``; with ``block`` the first ``recompute_num_layers`` of each chunk are groups of one, and the
others keep everything. ``selective``: parts of every layer, by name (Korthikanti et al., arXiv:2205.05198, section 5).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from gptoughts.config.experiment import ExperimentConfig, ParallelConfig
from gptoughts.config.options import did_you_mean
from gptoughts.config.pipeline import chunk_layers

DEFAULT_MODULES = ("core_attn",)
"""megatron-core's."""
REFUSED_MODULES: Mapping[str, str] = {
    "moe_act": "the routed experts never keep their activation: they make it again from its input",
    "gdn_norm_out": "no model here has gated delta nets",
}
"""megatron-core's names of parts that these models do not have, or have no use for."""


class LayerGroup(NamedTuple):
    """Neighbouring layers of a chunk."""

    layers: range
    """Counted from 0 within the chunk."""
    is_recomputed: bool
    """Only their input stays."""


def layer_groups(num_layers: int, parallel: ParallelConfig) -> list[LayerGroup]:
    """How the layers of one chunk are recomputed together.

    Args:
        num_layers: Of the chunk.
        parallel: The layout.
    """
    if parallel.recompute_granularity != "full":
        return [LayerGroup(range(index, index + 1), False) for index in range(num_layers)]
    size = parallel.recompute_num_layers or 1
    if parallel.recompute_method == "block":
        return [LayerGroup(range(index, index + 1), index < size) for index in range(num_layers)]
    starts = range(0, num_layers, size)
    return [LayerGroup(range(start, min(start + size, num_layers)), True) for start in starts]


def recomputed_modules(parallel: ParallelConfig) -> tuple[str, ...]:
    """Parts of a layer that are recomputed by name; none unless the granularity is selective."""
    if parallel.recompute_granularity != "selective":
        return ()
    if parallel.recompute_modules is None:
        return DEFAULT_MODULES
    return tuple(name.strip() for name in parallel.recompute_modules.split(","))


def recompute_problems(config: ExperimentConfig, sources: Mapping[str, str], *, is_model_sound: bool) -> list[str]:
    """Whatever forbids the recompute that was asked for, one line each."""
    parallel = config.parallel
    granularity = parallel.recompute_granularity
    problems = []
    for name, value, needed in (
        ("recompute_method", parallel.recompute_method, "full"),
        ("recompute_num_layers", parallel.recompute_num_layers, "full"),
        ("recompute_modules", parallel.recompute_modules, "selective"),
    ):
        if value is not None and granularity != needed:
            problems.append(
                f"parallel.{name}={value} ({sources[f'parallel.{name}']}): belongs to "
                f"parallel.recompute_granularity={needed}, which is {granularity} "
                f"({sources['parallel.recompute_granularity']})"
            )
    if problems or not is_model_sound:
        return problems
    if granularity == "full":
        return _number_problems(config, sources)
    return _module_problems(config, sources) if granularity == "selective" else []


def _number_problems(config: ExperimentConfig, sources: Mapping[str, str]) -> list[str]:
    count = config.parallel.recompute_num_layers
    chunks = config.parallel.pipeline * config.parallel.virtual_pipeline
    try:
        most = max(chunk_layers(config.model.num_layers, config.parallel))
    except ValueError:  # a layout that is no list of numbers: config.pipeline says so
        return []
    if count is None or count <= most or most < 1:
        return []
    where = "the model has" if chunks == 1 else "the largest chunk of a stage has"
    return [
        f"parallel.recompute_num_layers={count} ({sources['parallel.recompute_num_layers']}): {where} {most} layers; "
        f"allowed: 1 to {most}"
    ]


def _module_problems(config: ExperimentConfig, sources: Mapping[str, str]) -> list[str]:
    known = config.model.recompute_modules()
    source = sources["parallel.recompute_modules"]
    given = recomputed_modules(config.parallel)
    problems = []
    for name in dict.fromkeys(given):
        is_name = f"parallel.recompute_modules={name} ({source})"
        if given.count(name) > 1:
            problems.append(f"{is_name}: stands there {given.count(name)} times")
        elif name in REFUSED_MODULES:
            problems.append(f"{is_name}: {REFUSED_MODULES[name]}; allowed: {', '.join(known)}")
        elif name not in known:
            guess = did_you_mean(name, known)
            problems.append(f"{is_name}: no part of this model's layers{guess}; allowed: {', '.join(known)}")
    if "mla_up_proj" in given and "core_attn" not in given and config.parallel.context > 1:
        problems.append(
            f"parallel.recompute_modules=mla_up_proj ({source}): with parallel.context={config.parallel.context} "
            f"({sources['parallel.context']}) attention keeps what ranks have sent, not what the projections make; "
            "name core_attn as well"
        )
    if "mla_up_proj" in given and "core_attn" not in given and config.use_fp8:
        problems.append(
            f"parallel.recompute_modules=mla_up_proj ({source}): with FP8 the projections would be cast with later "
            "scales in backward; name core_attn as well"
        )
    if "moe" in given and "shared_experts" in given:
        problems.append(f"parallel.recompute_modules=shared_experts ({source}): moe holds them already; leave one out")
    return problems

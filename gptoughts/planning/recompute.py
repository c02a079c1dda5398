"""What recompute costs in time, and which kinds of it are worth a try where memory is short."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gptoughts.config.experiment import ParallelConfig
from gptoughts.config.model import ModelConfig
from gptoughts.config.pipeline import stage_layers
from gptoughts.config.recompute import layer_groups, recomputed_modules
from gptoughts.models.expert_shape import ExpertFields
from gptoughts.models.family import Family
from gptoughts.models.flops import flops_of_layers_per_token
from gptoughts.models.mla.config import MLAConfig


def ladder(model: ModelConfig) -> list[Mapping[str, Any]]:
    """Fields of a layout, cheapest first: norms alone, every part by name, whole layers."""
    names = [name for name in model.recompute_modules() if name != "shared_experts"]
    return [
        {"recompute_granularity": "selective", "recompute_modules": "layernorm"},
        {"recompute_granularity": "selective", "recompute_modules": ",".join(names)},
        {"recompute_granularity": "full"},
    ]


def describe(parallel: ParallelConfig) -> str:
    """A word or two for a table; empty where nothing is recomputed."""
    if parallel.recompute_granularity != "full":
        names = recomputed_modules(parallel)
        return names[0] if len(names) == 1 else f"{len(names)} parts" * bool(names)
    count = parallel.recompute_num_layers or 1
    if parallel.recompute_method == "block":
        return f"full, {count} of a chunk"
    return "full" if count == 1 else f"full by {count}"


def stage_parts(model: ModelConfig, parallel: ParallelConfig, stage: int) -> Iterator[tuple[int, frozenset[str]]]:
    """Layers of a stage and, of each, the parts that run forward twice (all of it: ``layer``); none without recompute.

    The depths of multi-token prediction are the last stage's, numbered after the layers.
    """
    if parallel.recompute_granularity == "none":
        return
    modules = frozenset(recomputed_modules(parallel))
    for chunk in stage_layers(model.num_layers, parallel)[stage]:
        for group in layer_groups(len(chunk), parallel):
            for place in group.layers:
                yield chunk[place], frozenset({"layer"}) if group.is_recomputed else modules
    if stage == parallel.pipeline - 1:
        is_whole = parallel.recompute_granularity == "full" and parallel.recompute_method != "block"
        for _ in range(model.mtp_depths()):
            yield model.num_layers, frozenset({"layer"}) if is_whole else modules


def second_forward_flops_per_token(
    family: Family, model: ModelConfig, parallel: ParallelConfig, stage: int, seq_length: int
) -> int:
    """Floating-point operations per token that a stage does once more, over its tensor-parallel ranks."""
    return sum(
        _flops_of_parts(family, model, index, parts, seq_length)
        for index, parts in stage_parts(model, parallel, stage)
        if parts
    )


def _flops_of_parts(family: Family, model: ModelConfig, index: int, parts: frozenset[str], seq_length: int) -> int:
    whole = flops_of_layers_per_token(family, model, [index], seq_length)
    if "layer" in parts:
        return whole // 3  # two thirds are backward
    found = 0
    if "core_attn" in parts:
        found += (whole - 6 * model.active_parameters_of_layer(index)) // 3
    if "mla_up_proj" in parts and isinstance(model, MLAConfig):
        heads = model.num_attention_heads
        rank = model.q_lora_rank or ("core_attn" in parts) * model.hidden_size
        found += 2 * model.kv_lora_rank * heads * (model.qk_head_dim + model.v_head_dim)
        found += 2 * rank * heads * (model.qk_head_dim + model.qk_pos_emb_head_dim)
    return found + 2 * second_forward_parameters(model, index, parts)


def second_forward_parameters(model: ModelConfig, index: int, parts: frozenset[str]) -> int:
    """Parameters of the feed-forward parts that a token passes once more."""
    h = model.hidden_size
    if not (isinstance(model, ExpertFields) and model.has_experts(index)):
        return 3 * h * model.ffn_hidden_size * ("mlp" in parts)
    shared = 3 * h * model.moe_shared_expert_intermediate_size
    if "moe" in parts:
        return shared + 3 * h * model.moe_router_topk * model.moe_ffn_hidden_size + h * model.num_moe_experts
    return shared * ("shared_experts" in parts)

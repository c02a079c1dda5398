"""What FP8 adds to a rank's memory: histories and scales, and weights that Transformer Engine keeps cast.

Per product (an expert counts as one), with L = ``amax_history_len``:

    state     20 (L + 1)    fp32 histories and scales of three tensors forward and two backward, on every rank of the
                            stage, those of all experts; and once more: a step begins with a copy of what it may undo
    weights   2             per weight that a rank multiplies with, from a forward to its backward: one byte as it lies
                            and one transposed, since Hopper and Ada multiply rows with rows only (Transformer Engine
                            2.20, pytorch/module/linear.py ``_linear_forward_impl``, tensor/float8_tensor.py
                            ``Float8Quantizer``); Blackwell needs the first alone

The weights are those of linear layers, which ZeRO-3 does not divide while they are cast, once per microbatch in flight.
Nothing else keeps a cast weight: emulated layers and experts cast theirs anew in backward. ``auto`` is taken for
``te``, the larger one. Inputs are counted in their own precision, as the emulation keeps them; Transformer Engine's
take one byte, so that a run with it needs somewhat less than is said here.

Legend: h hidden, np heads, f feed-forward width, e experts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from gptoughts.config.experiment import ExperimentConfig
from gptoughts.config.fp8 import is_kept
from gptoughts.config.model import ModelConfig
from gptoughts.config.pipeline import stage_layers
from gptoughts.models.expert_shape import ExpertFields
from gptoughts.models.gpt.config import GPTConfig
from gptoughts.models.mla.config import MLAConfig
from gptoughts.planning.layers import Kept

_FP32 = 4
_STATE_COLUMNS = 5
_CAST_WIDTH = 2
_REMADE_BY = {
    "mla_up_proj": ("self_attention.linear_q_up_proj", "self_attention.linear_kv_up_proj"),
    "mlp": ("mlp.linear_fc1", "mlp.linear_fc2"),
    "moe": ("mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2"),
    "shared_experts": ("mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2"),
}
"""Part of a layer that is recomputed -> products whose first forward keeps nothing."""


@dataclass(frozen=True)
class Product:
    """A product of a layer that can run in FP8."""

    name: str
    """Within the layer."""
    weights: int
    """Of a linear layer, over all tensor-parallel ranks; 0: experts', which nobody keeps cast."""
    count: int = 1
    """Products with a history of their own."""
    is_whole: bool = False
    """Whether every tensor-parallel rank has all of it."""


def layer_products(model: ModelConfig, index: int) -> list[Product]:
    """Of one layer, by its index over the whole model; multi-token prediction's are like those at the top."""
    attention = _latent_products(model) if isinstance(model, MLAConfig) else _grouped_query_products(model)
    h = model.hidden_size
    if not (isinstance(model, ExpertFields) and model.has_experts(index)):
        return [*attention, *_swiglu_products("mlp", h, model.ffn_hidden_size)]
    experts = [Product(f"mlp.experts.linear_fc{i}", 0, model.num_moe_experts) for i in (1, 2)]
    shared = model.moe_shared_expert_intermediate_size
    return [*attention, *experts, *(_swiglu_products("mlp.shared_experts", h, shared) if shared else ())]


def _swiglu_products(name: str, hidden_size: int, ffn_hidden_size: int) -> list[Product]:
    half = hidden_size * ffn_hidden_size
    return [Product(f"{name}.linear_fc1", 2 * half), Product(f"{name}.linear_fc2", half)]


def _grouped_query_products(model: ModelConfig) -> list[Product]:
    assert isinstance(model, GPTConfig)
    heads, groups, size = model.num_attention_heads, model.num_query_groups, model.kv_channels
    assert groups is not None, "a resolved shape is filled in"
    assert size is not None
    return [
        Product("self_attention.linear_qkv", model.hidden_size * (heads + 2 * groups) * size),
        Product("self_attention.linear_proj", model.hidden_size * heads * size),
    ]


def _latent_products(model: MLAConfig) -> list[Product]:
    h, heads = model.hidden_size, model.num_attention_heads
    wide = heads * (model.qk_head_dim + model.qk_pos_emb_head_dim)
    if model.q_lora_rank is None:
        queries = [("linear_q_proj", h * wide, False)]
    else:
        queries = [
            ("linear_q_down_proj", h * model.q_lora_rank, True), ("linear_q_up_proj", model.q_lora_rank * wide, False),
        ]  # fmt: skip
    others = [
        ("linear_kv_down_proj", h * (model.kv_lora_rank + model.qk_pos_emb_head_dim), True),
        ("linear_kv_up_proj", model.kv_lora_rank * heads * (model.qk_head_dim + model.v_head_dim), False),
        ("linear_proj", heads * model.v_head_dim * h, False),
    ]
    return [
        Product(f"self_attention.{name}", weights, is_whole=is_whole) for name, weights, is_whole in queries + others
    ]


def _running(config: ExperimentConfig, index: int, prefix: str) -> list[Product]:
    """Products of a layer that run in FP8; ``fp8.keep_bf16=auto`` is not known before its report is read."""
    words = config.fp8.keep_bf16 or []
    products = layer_products(config.model, index)
    return [one for one in products if not is_kept(f"{prefix}.{one.name}", words, config.model.num_layers)]


def _stage_products(config: ExperimentConfig, stage: int) -> Iterator[Product]:
    model, parallel = config.model, config.parallel
    for chunk in stage_layers(model.num_layers, parallel)[stage]:
        for index in chunk:
            yield from _running(config, index, f"decoder.layers.{index}")
    if stage == parallel.pipeline - 1:
        for depth in range(model.mtp_depths()):
            yield from _running(config, model.num_layers, f"mtp.layers.{depth}.transformer_layer")


def scaling_bytes(config: ExperimentConfig, stage: int) -> int:
    """Histories and scales on a rank of a stage, once."""
    if not config.use_fp8:
        return 0
    length = config.fp8.amax_history_len
    assert length is not None, "a resolved run with FP8 says so"
    return _FP32 * (length + 1) * _STATE_COLUMNS * sum(one.count for one in _stage_products(config, stage))


def cast_weights(config: ExperimentConfig, index: int, modules: Collection[str] = ()) -> Kept:
    """What one microbatch's forward of a layer keeps of cast weights, and what its backward casts again besides.

    Args:
        config: A resolved configuration.
        index: The layer's, over the whole model; behind the last one: multi-token prediction's.
        modules: Parts that are recomputed by name.
    """
    if not config.use_fp8 or config.fp8.backend == "emulated":
        return Kept(0)
    model, tensor = config.model, config.parallel.tensor
    prefix = f"decoder.layers.{index}" if index < model.num_layers else "mtp.layers.0.transformer_layer"
    remade_names = {name for module in modules for name in _REMADE_BY.get(module, ())}
    kept = remade = 0
    for one in _running(config, index, prefix):
        num_bytes = _CAST_WIDTH * (one.weights if one.is_whole else one.weights // tensor)
        if one.name in remade_names:
            remade += num_bytes
        else:
            kept += num_bytes
    return Kept(kept, remade)

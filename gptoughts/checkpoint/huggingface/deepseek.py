"""DeepSeek-V2 and V3 whose layers are all dense, as the family ``mla``; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from gptoughts.checkpoint.huggingface.base import (
    Entry,
    Format,
    block,
    common_fields,
    common_values,
    ends,
    in_layers,
    rope_of,
)
from gptoughts.checkpoint.huggingface.transforms import InterleavedRotary
from gptoughts.models.mla.config import MLAConfig

_LATENT_EPSILON = 1e-6
"""transformers' DeepSeek models add this in their latent norms whatever rms_norm_eps is."""


def entries(model: MLAConfig) -> list[Entry]:
    """Every tensor of the model."""
    return ends(model) + in_layers(range(model.num_layers), partial(dense_layer, model))


def dense_layer(model: MLAConfig, ours: str, theirs: str) -> list[Entry]:
    """A layer without experts."""
    return [*block(model, ours, theirs), *attention_entries(model, ours, theirs)]


def attention_entries(model: MLAConfig, ours: str, theirs: str) -> list[Entry]:
    """A layer's latent attention."""
    hidden, heads, rank = model.hidden_size, model.num_attention_heads, model.kv_lora_rank
    plain, rotary, value = model.qk_head_dim, model.qk_pos_emb_head_dim, model.v_head_dim
    query = heads * (plain + rotary)

    def entry(our_name: str, their_name: str, *shape: int, rotated: InterleavedRotary | None = None) -> Entry:
        names = f"{ours}self_attention.{our_name}.weight", {f"{theirs}self_attn.{their_name}.weight": shape}
        return Entry(names[0], shape, names[1]) if rotated is None else Entry(names[0], shape, names[1], rotated)

    turned = InterleavedRotary(heads, plain, rotary)
    if model.q_lora_rank is None:
        queries = [entry("linear_q_proj", "q_proj", query, hidden, rotated=turned)]
    else:
        queries = [
            entry("linear_q_down_proj", "q_a_proj", model.q_lora_rank, hidden),
            entry("q_layernorm", "q_a_layernorm", model.q_lora_rank),
            entry("linear_q_up_proj", "q_b_proj", query, model.q_lora_rank, rotated=turned),
        ]
    shared = InterleavedRotary(1, rank, rotary)
    return [
        *queries,
        entry("linear_kv_down_proj", "kv_a_proj_with_mqa", rank + rotary, hidden, rotated=shared),
        entry("kv_layernorm", "kv_a_layernorm", rank),
        entry("linear_kv_up_proj", "kv_b_proj", heads * (plain + value), rank),
        entry("linear_proj", "o_proj", hidden, heads * value),
    ]


def is_dense(config: Mapping[str, Any]) -> bool:
    """Whether no layer has experts."""
    first, layers = config.get("first_k_dense_replace"), config.get("num_hidden_layers")
    return isinstance(first, int) and isinstance(layers, int) and first >= layers


def _read(config: Mapping[str, Any], problems: list[str]) -> MLAConfig | None:
    values = common_values(config, problems) | latent_values(config, problems)
    kind = rope_of(config)["rope_type"]
    if kind != "default":
        problems.append(f"rope_type={kind!r}: has no place in the family mla; allowed: 'default'")
    return None if problems else MLAConfig(**values)


def latent_values(config: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Our fields of latent attention from config.json; what cannot be held goes to ``problems``."""
    if config.get("attention_bias") or config.get("mlp_bias"):
        problems.append("attention_bias, mlp_bias: biases have no place here; allowed: false")
    if config.get("rope_interleave", True) is not True:
        problems.append("rope_interleave=false: rotary pairs that are not neighbours are not read")
    if config.get("rms_norm_eps") != _LATENT_EPSILON:
        problems.append(
            f"rms_norm_eps={config.get('rms_norm_eps')}: latent norms have {_LATENT_EPSILON} whatever it says, and "
            f"here all norms are alike; allowed: {_LATENT_EPSILON}"
        )
    named = {"kv_lora_rank": "kv_lora_rank", "qk_head_dim": "qk_nope_head_dim",
             "qk_pos_emb_head_dim": "qk_rope_head_dim", "v_head_dim": "v_head_dim"}  # fmt: skip
    problems += [f"{theirs}: missing" for theirs in named.values() if config.get(theirs) is None]
    if "q_lora_rank" not in config:
        problems.append("q_lora_rank: missing; null where queries are not compressed")
    return {ours: config.get(theirs) for ours, theirs in named.items()} | {"q_lora_rank": config.get("q_lora_rank")}


def latent_fields(model: MLAConfig) -> dict[str, Any]:
    """What config.json says of everything but experts and rotary scaling."""
    return common_fields(model) | {
        "num_key_value_heads": model.num_attention_heads,
        "q_lora_rank": model.q_lora_rank,
        "kv_lora_rank": model.kv_lora_rank,
        "qk_nope_head_dim": model.qk_head_dim,
        "qk_rope_head_dim": model.qk_pos_emb_head_dim,
        "v_head_dim": model.v_head_dim,
        "attention_bias": False,
    }


def _write(model: MLAConfig, *, own: Mapping[str, Any]) -> dict[str, Any]:
    # No layer of experts: this says so; counts of experts then describe nothing.
    return latent_fields(model) | {"first_k_dense_replace": model.num_layers, **own}


def latent_refusals(model: MLAConfig, *, needs_divisible: bool) -> list[str]:
    """Why transformers' DeepSeek classes cannot hold this attention."""
    found = []
    if model.layernorm_epsilon != _LATENT_EPSILON:
        found.append(f"layernorm_epsilon={model.layernorm_epsilon} (its latent norms always have {_LATENT_EPSILON})")
    if needs_divisible and model.hidden_size % model.num_attention_heads:
        found.append(f"num_attention_heads={model.num_attention_heads} does not divide hidden_size={model.hidden_size}")
    return found


MTP_FIELD = "num_nextn_predict_layers"
V3_FIELDS = {"rope_interleave": True, MTP_FIELD: 0}
V2_FIELDS = {"mlp_bias": False}
FORMATS = (
    Format(
        "deepseek_v3", "DeepseekV3ForCausalLM", "mla", _read, partial(_write, own=V3_FIELDS),
        partial(latent_refusals, needs_divisible=False), entries, is_dense,
    ),
    Format(
        "deepseek_v2", "DeepseekV2ForCausalLM", "mla", _read, partial(_write, own=V2_FIELDS),
        partial(latent_refusals, needs_divisible=True), entries, is_dense,
    ),
)  # fmt: skip
"""In the order in which an export tries them."""

"""Llama, Mistral, Qwen 2 and Qwen 3 (dense) as the family ``gpt``; imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from gptoughts.checkpoint.huggingface.transforms import GroupedHeads
from gptoughts.models.gpt.config import GPTConfig

_LLAMA3 = {
    "rotary_low_freq_factor": "low_freq_factor",
    "rotary_high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_max_position_embeddings",
}


def entries(model: GPTConfig) -> list[Entry]:
    """Every tensor of the model."""
    return ends(model) + in_layers(range(model.num_layers), partial(layer_entries, model))


def layer_entries(model: GPTConfig, ours: str, theirs: str) -> list[Entry]:
    """A layer."""
    filled = model.filled()
    assert filled.num_query_groups is not None
    assert filled.kv_channels is not None
    groups, size, hidden = filled.num_query_groups, filled.kv_channels, model.hidden_size
    query, key = model.num_attention_heads * size, groups * size
    heads = GroupedHeads(groups, model.num_attention_heads // groups, size)

    def projections(suffix: str, columns: tuple[int, ...]) -> Entry:
        rows = {"q_proj": query, "k_proj": key, "v_proj": key}
        return Entry(
            f"{ours}self_attention.linear_qkv.{suffix}",
            (query + 2 * key, *columns),
            {f"{theirs}self_attn.{name}.{suffix}": (count, *columns) for name, count in rows.items()},
            heads,
        )

    found = block(model, ours, theirs)
    found.append(projections("weight", (hidden,)))
    if model.add_qkv_bias:
        found.append(projections("bias", ()))
    if model.qk_layernorm:
        norms = [(f"{ours}self_attention.{x}_layernorm", f"{theirs}self_attn.{x}_norm") for x in ("q", "k")]
        found += [Entry(f"{our}.weight", (size,), {f"{their}.weight": (size,)}) for our, their in norms]
    our_output, their_output = f"{ours}self_attention.linear_proj.weight", f"{theirs}self_attn.o_proj.weight"
    found.append(Entry(our_output, (hidden, query), {their_output: (hidden, query)}))
    return found


def _read(
    config: Mapping[str, Any], problems: list[str], *, has_bias: bool, has_norms: bool, stated: tuple[str, ...]
) -> GPTConfig | None:
    values = common_values(config, problems)
    # Without them transformers would take its class's default, the shape of one published size.
    problems += [f"{name}: missing" for name in stated if name not in config]
    for name in ("attention_bias", "mlp_bias"):
        if config.get(name):
            problems.append(f"{name}=true: biases of output and feed-forward projections have no place here")
    _refuse_windows(config, problems)
    values |= _read_scaling(rope_of(config), problems)
    if problems:
        return None
    return GPTConfig(
        **values,
        num_query_groups=config.get("num_key_value_heads"),
        kv_channels=config.get("head_dim"),
        add_qkv_bias=has_bias,
        qk_layernorm=has_norms,
    ).filled()


def _refuse_windows(config: Mapping[str, Any], problems: list[str]) -> None:
    window = config.get("sliding_window")
    is_used = config.get("use_sliding_window", True) and window is not None
    if is_used and window < config.get("max_position_embeddings", 0):
        problems.append(f"sliding_window={window}: attention within a window has no place here; every token is seen")
    others = sorted(set(config.get("layer_types") or []) - {"full_attention"})
    if others:
        problems.append(f"layer_types: {', '.join(others)} have no place here; allowed: full_attention")


def _read_scaling(rope: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    kind = rope["rope_type"]
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append(f"partial_rotary_factor={rope['partial_rotary_factor']}: whole heads are turned; allowed: 1.0")
    if kind == "default":
        return {}
    if kind not in ("linear", "llama3"):
        problems.append(f"rope_type={kind!r}: not built; allowed: 'default', 'linear', 'llama3'")
        return {}
    names = {"rotary_scaling_factor": "factor"} | (_LLAMA3 if kind == "llama3" else {})
    problems += [f"rope_scaling.{theirs}: missing" for theirs in names.values() if rope.get(theirs) is None]
    return {"rotary_scaling": kind} | {ours: rope.get(theirs) for ours, theirs in names.items()}


def _write(model: GPTConfig) -> dict[str, Any]:
    filled = model.filled()
    found = common_fields(filled) | {"num_key_value_heads": filled.num_query_groups, "head_dim": filled.kv_channels}
    if model.rotary_scaling is not None:
        names = {"rotary_scaling_factor": "factor"} | (_LLAMA3 if model.rotary_scaling == "llama3" else {})
        scaling = {theirs: getattr(model, ours) for ours, theirs in names.items()}
        found["rope_scaling"] = {"rope_type": model.rotary_scaling} | scaling
    return found


def _write_llama(model: GPTConfig) -> dict[str, Any]:
    return _write(model) | {"attention_bias": False, "mlp_bias": False}


def _write_mistral(model: GPTConfig) -> dict[str, Any]:
    return _write(model) | {"sliding_window": None}


def _write_qwen(model: GPTConfig) -> dict[str, Any]:
    return _write(model) | {"use_sliding_window": False}


def _refusals(model: GPTConfig, *, has_bias: bool, has_norms: bool, needs_divisible: bool) -> list[str]:
    found = []
    if model.add_qkv_bias != has_bias:
        found.append(f"add_qkv_bias={model.add_qkv_bias}")
    if model.qk_layernorm != has_norms:
        found.append(f"qk_layernorm={model.qk_layernorm}")
    if needs_divisible and model.hidden_size % model.num_attention_heads:
        found.append(f"num_attention_heads={model.num_attention_heads} does not divide hidden_size={model.hidden_size}")
    return found


def _format(
    model_type: str,
    architecture: str,
    write: Callable[[GPTConfig], dict[str, Any]],
    *,
    stated: tuple[str, ...] = (),
    bias: bool = False,
    norms: bool = False,
    divisible: bool = False,
) -> Format:
    return Format(
        model_type,
        architecture,
        "gpt",
        read=partial(_read, has_bias=bias, has_norms=norms, stated=stated),
        write=write,
        refusals=partial(_refusals, has_bias=bias, has_norms=norms, needs_divisible=divisible),
        entries=entries,
    )


FORMATS = (
    _format("llama", "LlamaForCausalLM", _write_llama, divisible=True),
    _format(
        "mistral", "MistralForCausalLM", _write_mistral, stated=("num_key_value_heads", "sliding_window")
    ),
    _format("qwen2", "Qwen2ForCausalLM", _write_qwen, bias=True, stated=("num_key_value_heads", "use_sliding_window")),
    _format(
        "qwen3", "Qwen3ForCausalLM", _write_qwen, norms=True,
        stated=("num_key_value_heads", "head_dim", "use_sliding_window"),
    ),
)  # fmt: skip
"""In the order in which an export tries them."""

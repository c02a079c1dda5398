"""DeepSeek-V2 and V3 with layers of experts, as the family ``deepseek``; imports no torch.

Published files hold each routed expert's three matrices by themselves; ours are two tensors per layer,
``experts.linear_fc1_weight`` [e, 2 f, h] (gate above up) and ``experts.linear_fc2_weight`` [e, h, f].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from gptoughts.checkpoint.huggingface.base import (
    Entry,
    Format,
    common_values,
    ends,
    in_layers,
    layer_norms,
    rope_of,
    swiglu,
)
from gptoughts.checkpoint.huggingface.deepseek import (
    MTP_FIELD,
    V2_FIELDS,
    V3_FIELDS,
    attention_entries,
    dense_layer,
    is_dense,
    latent_fields,
    latent_refusals,
    latent_values,
)
from gptoughts.checkpoint.huggingface.transforms import Stacked
from gptoughts.models.deepseek.config import DeepSeekConfig

_YARN = {
    "rotary_scaling_factor": "factor",
    "original_max_position_embeddings": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}
_YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}
_ROUTING = {
    "num_moe_experts": "n_routed_experts",
    "moe_router_topk": "num_experts_per_tok",
    "moe_ffn_hidden_size": "moe_intermediate_size",
    "moe_router_topk_scaling_factor": "routed_scaling_factor",
}


def entries(model: DeepSeekConfig) -> list[Entry]:
    """Every tensor of the model."""
    first = model.first_k_dense_layers
    dense = in_layers(range(first), partial(dense_layer, model))
    main = dense + in_layers(range(first, model.num_layers), partial(expert_layer, model))
    return prediction_ends(model) + main + prediction_entries(model)


def prediction_ends(model: DeepSeekConfig) -> list[Entry]:
    """Embedding, final norm and output layer; each depth of multi-token prediction publishes copies of two of them."""
    places = [f"model.layers.{model.num_layers + depth}." for depth in range(model.mtp_num_layers)]
    copies = {
        "model.embed_tokens.weight": tuple(f"{place}embed_tokens.weight" for place in places),
        "lm_head.weight": tuple(f"{place}shared_head.head.weight" for place in places),
    }
    return [replace(entry, copies=copies.get(next(iter(entry.theirs)), ())) for entry in ends(model)]


def prediction_entries(model: DeepSeekConfig) -> list[Entry]:
    """Multi-token prediction's depths, published as layers above the last (README_WEIGHTS.md of DeepSeek-V3).

    Columns of ``eh_proj`` multiply first the embedding's half, then the hidden state's, on both sides.
    """
    hidden, found = model.hidden_size, []
    for depth in range(model.mtp_num_layers):
        ours, theirs = f"mtp.layers.{depth}.", f"model.layers.{model.num_layers + depth}."
        for our_name, their_name, shape in (
            ("enorm", "enorm", (hidden,)), ("hnorm", "hnorm", (hidden,)), ("eh_proj", "eh_proj", (hidden, 2 * hidden)),
            ("final_layernorm", "shared_head.norm", (hidden,)),
        ):  # fmt: skip
            found.append(Entry(f"{ours}{our_name}.weight", shape, {f"{theirs}{their_name}.weight": shape}))
        found += expert_layer(model, f"{ours}transformer_layer.", theirs)
    return found


def expert_layer(model: DeepSeekConfig, ours: str, theirs: str) -> list[Entry]:
    """A layer with experts."""
    attention = attention_entries(model, ours, theirs)
    return [*layer_norms(model, ours, theirs), *attention, *expert_entries(model, f"{ours}mlp.", f"{theirs}mlp.")]


def expert_entries(model: DeepSeekConfig, ours: str, theirs: str) -> list[Entry]:
    """A layer's router, routed experts and shared experts."""
    experts, hidden, width = model.num_moe_experts, model.hidden_size, model.moe_ffn_hidden_size
    shared = model.moe_shared_expert_intermediate_size
    names = [f"{theirs}experts.{number}." for number in range(experts)]
    gates_and_ups = {f"{name}{half}_proj.weight": (width, hidden) for name in names for half in ("gate", "up")}
    downs = {f"{name}down_proj.weight": (hidden, width) for name in names}
    gate = f"{theirs}gate."
    found = [Entry(f"{ours}router.weight", (experts, hidden), {f"{gate}weight": (experts, hidden)})]
    if model.moe_router_enable_expert_bias:
        bias = {f"{gate}e_score_correction_bias": (experts,)}
        found.append(Entry(f"{ours}router.expert_bias", (experts,), bias, kind="buffer"))
    found += [
        Entry(
            f"{ours}experts.linear_fc1_weight", (experts, 2 * width, hidden), gates_and_ups,
            Stacked((width, width)), slices=experts,
        ),
        Entry(f"{ours}experts.linear_fc2_weight", (experts, hidden, width), downs, slices=experts),
    ]  # fmt: skip
    if shared:
        found += swiglu(f"{ours}shared_experts.", f"{theirs}shared_experts.", hidden=hidden, width=shared)
    return found


def _has_experts(config: Mapping[str, Any]) -> bool:
    return not is_dense(config)


def _read(config: Mapping[str, Any], problems: list[str], *, is_v3: bool) -> DeepSeekConfig | None:
    values = common_values(config, problems) | latent_values(config, problems)
    stated = (*_ROUTING.values(), "n_shared_experts", "norm_topk_prob", "first_k_dense_replace", "n_group",
              "topk_group")  # fmt: skip
    # Without them transformers would take its class's default, the shape of one published size.
    problems += [f"{name}: missing" for name in stated if name not in config]
    problems += [f"{name}={config[name]}: a number is needed" for name in _ROUTING.values()
                 if name in config and not isinstance(config[name], int | float)]  # fmt: skip
    if (frequency := config.get("moe_layer_freq", 1)) != 1:
        problems.append(f"moe_layer_freq={frequency}: every layer above the dense ones has experts here; allowed: 1")
    _check_rules(config, problems, is_v3=is_v3)
    scaling = _read_scaling(rope_of(config), problems)
    if problems:
        return None
    has_groups = is_v3 or config.get("topk_method") == "group_limited_greedy"
    defaults = DeepSeekConfig()
    return DeepSeekConfig(
        **values,
        **scaling,
        **{ours: config[theirs] for ours, theirs in _ROUTING.items()},
        first_k_dense_layers=config["first_k_dense_replace"] or 0,
        moe_shared_expert_intermediate_size=(config["n_shared_experts"] or 0) * config["moe_intermediate_size"],
        moe_router_score_function="sigmoid" if is_v3 else "softmax",
        moe_router_num_groups=(config["n_group"] or 1) if has_groups else 1,
        moe_router_group_topk=(config["topk_group"] or 1) if has_groups else 1,
        moe_router_normalize_gates=bool(config["norm_topk_prob"]),
        moe_router_enable_expert_bias=is_v3,
        moe_aux_loss_coeff=config.get("aux_loss_alpha", defaults.moe_aux_loss_coeff),
        mtp_num_layers=config.get(MTP_FIELD) or 0,
    )


def _check_rules(config: Mapping[str, Any], problems: list[str], *, is_v3: bool) -> None:
    """How experts are chosen: each version has one rule that its class in transformers follows."""
    methods = ("noaux_tc",) if is_v3 else ("greedy", "group_limited_greedy")
    scores = "sigmoid" if is_v3 else "softmax"
    # Absent where transformers wrote the file: its class has one rule only.
    for name, allowed in (("topk_method", methods), ("scoring_func", (scores,))):
        if config.get(name, allowed[0]) not in allowed:
            problems.append(f"{name}={config[name]!r}: allowed for {config['model_type']}: {', '.join(allowed)}")
    if not is_v3 and config.get("norm_topk_prob"):
        problems.append(
            "norm_topk_prob=true: DeepSeek's own code leaves the scaling factor out then, transformers the division; "
            "allowed for deepseek_v2: false"
        )


def _read_scaling(rope: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    kind = rope["rope_type"]
    if kind == "default":
        return {}
    if kind != "yarn":
        problems.append(f"rope_type={kind!r}: not built; allowed: 'default', 'yarn'")
        return {}
    found = {ours: rope.get(theirs, _YARN_DEFAULTS.get(theirs)) for ours, theirs in _YARN.items()}
    missing = [f"rope_scaling.{theirs}: missing" for ours, theirs in _YARN.items() if found[ours] is None]
    if rope.get("attention_factor") is not None or rope.get("truncate", True) is not True:
        missing.append("rope_scaling.attention_factor, truncate: not built; leave them out")
    problems += missing
    if not missing and _is_amplitude_unclear(found["mscale"], found["mscale_all_dim"]):
        problems.append(
            f"rope_scaling.mscale={found['mscale']}, mscale_all_dim={found['mscale_all_dim']}: DeepSeek's own code and "
            "transformers disagree unless both are given, or mscale is 1"
        )
    return found


def _is_amplitude_unclear(mscale: float, mscale_all_dim: float) -> bool:
    """transformers takes m(1) for cos and sin where one of the two is 0 (modeling_rope_utils.py:437, 5.23)."""
    return not (mscale and mscale_all_dim) and not (mscale == 1 and mscale_all_dim == 0)


def _write(model: DeepSeekConfig, *, is_v3: bool) -> dict[str, Any]:
    has_groups = model.moe_router_num_groups > 1
    found = latent_fields(model) | {theirs: getattr(model, ours) for ours, theirs in _ROUTING.items()}
    found |= {
        "first_k_dense_replace": model.first_k_dense_layers,
        "moe_layer_freq": 1,
        "n_shared_experts": model.moe_shared_expert_intermediate_size // model.moe_ffn_hidden_size,
        "n_group": model.moe_router_num_groups,
        "topk_group": model.moe_router_group_topk,
        "norm_topk_prob": model.moe_router_normalize_gates,
        "scoring_func": model.moe_router_score_function,
        "topk_method": "noaux_tc" if is_v3 else "group_limited_greedy" if has_groups else "greedy",
        "aux_loss_alpha": model.moe_aux_loss_coeff,
        "seq_aux": True,
        **(V3_FIELDS | {MTP_FIELD: model.mtp_num_layers} if is_v3 else V2_FIELDS),
    }
    if model.rotary_scaling_factor != 1:
        found["rope_scaling"] = {"type": "yarn"} | {theirs: getattr(model, ours) for ours, theirs in _YARN.items()}
        stretched = int(model.rotary_scaling_factor * model.original_max_position_embeddings)
        found["max_position_embeddings"] = max(model.seq_length, stretched)
    return found


def _refusals(model: DeepSeekConfig, *, is_v3: bool) -> list[str]:
    found = latent_refusals(model, needs_divisible=not is_v3)
    function, shared = model.moe_router_score_function, model.moe_shared_expert_intermediate_size
    if (function == "sigmoid") != is_v3:
        found.append(f"moe_router_score_function={function}")
    if is_v3 and not model.moe_router_enable_expert_bias:
        found.append("moe_router_enable_expert_bias=False")
    if not is_v3 and model.mtp_num_layers:
        found.append(f"mtp_num_layers={model.mtp_num_layers}")
    if not is_v3 and model.moe_router_normalize_gates:
        found.append("moe_router_normalize_gates=True")
    if shared == 0 or shared % model.moe_ffn_hidden_size:
        found.append(
            f"moe_shared_expert_intermediate_size={shared} (a multiple of moe_ffn_hidden_size="
            f"{model.moe_ffn_hidden_size}, not 0)"
        )
    if model.rotary_scaling_factor != 1 and _is_amplitude_unclear(model.mscale, model.mscale_all_dim):
        found.append(f"mscale={model.mscale} with mscale_all_dim={model.mscale_all_dim} (transformers takes mscale=1)")
    return found


def _format(model_type: str, architecture: str, *, is_v3: bool) -> Format:
    return Format(
        model_type, architecture, "deepseek", partial(_read, is_v3=is_v3), partial(_write, is_v3=is_v3),
        partial(_refusals, is_v3=is_v3), entries, _has_experts,
    )  # fmt: skip


FORMATS = (
    _format("deepseek_v3", "DeepseekV3ForCausalLM", is_v3=True),
    _format("deepseek_v2", "DeepseekV2ForCausalLM", is_v3=False),
)
"""In the order in which an export tries them."""

"""LLaDA as it is published (GSAI-ML/LLaDA-8B-Base and -Instruct), as the family ``llada``; imports no torch.

The block is Llama's under OLMo's names: ``ff_proj`` is the gate, ``up_proj`` the other half, ``ff_out`` the way down
(modeling_llada.py of that repository, class LLaDALlamaBlock; configuration_llada.py, class ModelConfig, for what an
absent field means). The embedding has ``embedding_size`` rows, of which one is the mask token's.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from gptoughts.checkpoint.huggingface.base import Entry, Format, ends, in_layers
from gptoughts.checkpoint.huggingface.fp8 import read_quantization
from gptoughts.checkpoint.huggingface.llama import layer_entries
from gptoughts.config.model import ModelConfig
from gptoughts.models.llada.config import LLaDAConfig

_NAMES = {
    "model.embed_tokens": "model.transformer.wte", "model.norm": "model.transformer.ln_f",
    "lm_head": "model.transformer.ff_out",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ff_norm",
    "self_attn.q_proj": "q_proj", "self_attn.k_proj": "k_proj", "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "mlp.gate_proj": "ff_proj", "mlp.up_proj": "up_proj", "mlp.down_proj": "ff_out",
}  # fmt: skip
_LAYER = re.compile(r"model\.layers\.(\d+)\.")

_ONLY: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "block_type": ("sequential", ("llama",)), "activation_type": ("swiglu", ("silu",)),
    "layer_norm_type": ("default", ("rms",)), "rope": (False, (True,)), "alibi": (False, (False,)),
    "attention_layer_norm": (False, (False,)), "input_emb_norm": (False, (False,)), "include_bias": (False, (False,)),
    "bias_for_layer_norm": (None, (False, None)), "layer_norm_with_affine": (True, (True,)),
    "scale_logits": (False, (False,)), "block_group_size": (1, (1,)),
}  # fmt: skip
"""Field -> what its absence means, and what is held here."""
_NAMED = {
    "num_layers": "n_layers", "hidden_size": "d_model", "num_attention_heads": "n_heads",
    "seq_length": "max_sequence_length", "mask_token_id": "mask_token_id", "vocab_size": "vocab_size",
}  # fmt: skip


def entries(model: LLaDAConfig) -> list[Entry]:
    """Every tensor of the model."""
    layers = in_layers(range(model.num_layers), partial(layer_entries, model))
    return [_renamed(entry) for entry in ends(model, _rows(model)) + layers]


def _renamed(entry: Entry) -> Entry:
    return dataclasses.replace(entry, theirs={_published_name(name): shape for name, shape in entry.theirs.items()})


def _published_name(name: str) -> str:
    module, _, suffix = name.rpartition(".")
    layer = _LAYER.match(module)
    if layer is None:
        return f"{_NAMES[module]}.{suffix}"
    return f"model.transformer.blocks.{layer[1]}.{_NAMES[module[layer.end() :]]}.{suffix}"


def _rows(model: LLaDAConfig) -> int:
    """Rows of the published embedding: the tokenizer's entries, and the mask token where it lies beyond them."""
    mask = model.filled().mask_token_id
    assert mask is not None
    return max(model.vocab_size, mask + 1)


def _read(config: Mapping[str, Any], problems: list[str]) -> LLaDAConfig | None:
    read_quantization(config, problems)
    for name, (absent, allowed) in _ONLY.items():
        if (value := config.get(name, absent)) not in allowed:
            problems.append(f"{name}={value!r}: has no place here; allowed: {', '.join(map(repr, allowed))}")
    problems += [f"{theirs}: missing" for theirs in _NAMED.values() if config.get(theirs) is None]
    base = config.get("rope_theta", 10000.0)
    if base != int(base):
        problems.append(f"rope_theta={base}: a whole number is needed")
    if problems:
        return None
    rows = config.get("embedding_size", 50304) or config["vocab_size"]
    if config["mask_token_id"] >= rows:
        problems.append(f"mask_token_id={config['mask_token_id']}: the embedding has {rows} rows (embedding_size)")
    heads = config["n_heads"]
    groups = config.get("n_kv_heads") or (1 if config.get("multi_query_attention") else heads)
    if config.get("multi_query_attention") is not None and groups != (1 if config["multi_query_attention"] else heads):
        problems.append(f"multi_query_attention={config['multi_query_attention']}: contradicts n_kv_heads={groups}")
    values = {ours: config[theirs] for ours, theirs in _NAMED.items()} | {"vocab_size": rows}
    return LLaDAConfig(
        **values,
        ffn_hidden_size=config.get("mlp_hidden_size") or config.get("mlp_ratio", 4) * config["d_model"],
        num_query_groups=groups,
        rotary_base=int(base),
        layernorm_epsilon=config.get("rms_norm_eps", 1e-5),
        attention_dropout=config.get("attention_dropout", 0.1),
        hidden_dropout=config.get("residual_dropout", 0.1),
        init_method_std=config.get("init_std", 0.02),
        add_qkv_bias=bool(config.get("include_qkv_bias")),
        untie_embeddings_and_output_weights=not config.get("weight_tying", True),
    ).filled()


def _write(model: LLaDAConfig) -> dict[str, Any]:
    filled = model.filled()
    rows = _rows(filled)
    found = {theirs: getattr(filled, ours) for ours, theirs in _NAMED.items()}
    return found | {name: allowed[0] for name, (_, allowed) in _ONLY.items()} | {
        "vocab_size": rows,
        "embedding_size": rows,
        "mlp_hidden_size": filled.ffn_hidden_size,
        "n_kv_heads": filled.num_query_groups,
        "multi_query_attention": None,
        "include_qkv_bias": filled.add_qkv_bias,
        "rope_theta": float(filled.rotary_base),
        "rope_full_precision": True,
        "rms_norm_eps": filled.layernorm_epsilon,
        "attention_dropout": filled.attention_dropout,
        "residual_dropout": filled.hidden_dropout,
        "embedding_dropout": filled.hidden_dropout,
        "attention_layer_norm_with_affine": True,
        "alibi_bias_max": 8.0,
        "flash_attention": False,
        "init_fn": "normal",
        "init_std": filled.init_method_std,
        "init_cutoff_factor": None,
        "init_device": "meta",
        "precision": None,
        "use_cache": False,
        "weight_tying": not filled.untie_embeddings_and_output_weights,
    }  # fmt: skip


def _refusals(model: ModelConfig) -> list[str]:
    if not isinstance(model, LLaDAConfig):
        return ["its layers have multi-head or grouped-query attention and no experts"]
    found = [
        f"{name}={getattr(model, name)}"
        for name, held in {"qk_layernorm": False, "rotary_scaling": None, "is_shifted": False}.items()
        if getattr(model, name) != held
    ]
    if model.filled().kv_channels != model.hidden_size / model.num_attention_heads:
        found.append(f"kv_channels={model.kv_channels} (hidden_size / num_attention_heads)")
    return found


FORMATS = (
    Format("llada", "LLaDAModelLM", "llada", _read, _write, _refusals, entries, is_in_transformers=False),
)  # fmt: skip

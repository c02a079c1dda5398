"""What a published format is: its configuration in our words, and a table of tensors with shapes and transforms."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from gptoughts.checkpoint.huggingface.fp8 import read_quantization
from gptoughts.checkpoint.huggingface.transforms import PaddedRows, Same, Stacked, Transform
from gptoughts.config.model import ModelConfig

Shape = tuple[int, ...]

EMBEDDING = "embedding.word_embeddings.weight"
_NO_WEIGHTS = re.compile(r"rotary_emb\.inv_freq$")
"""Tensors in older files that are no weights."""


@dataclass(frozen=True)
class Entry:
    """One of our tensors and the published ones that make it."""

    ours: str
    our_shape: Shape
    theirs: Mapping[str, Shape]
    """Published name -> shape, in the transform's order."""
    transform: Transform = field(default_factory=Same)
    slices: int | None = None
    """Slices along our first dim that the transform makes one by one, each of the same number of published tensors
    in a row (experts); unset: it makes the whole."""
    kind: Literal["weight", "buffer"] = "weight"
    """A buffer is no parameter (the bias of a router) and keeps its dtype whatever is asked for the weights."""

    copies: tuple[str, ...] = ()
    """Further published names of what the first of ``theirs`` holds; written, and compared where they are there."""

    def published(self) -> dict[str, Shape]:
        """Every published name -> shape, copies right after the first."""
        (first, shape), *others = self.theirs.items()
        return {first: shape} | dict.fromkeys(self.copies, shape) | dict(others)

    def sources(self) -> list[list[str]]:
        """Published names of each slice, in order; one list where there are no slices."""
        names = list(self.theirs)
        size = len(names) // (self.slices or 1)
        return [names[start : start + size] for start in range(0, len(names), size)]


@dataclass(frozen=True)
class Format:
    """One kind of published model.

    Configurations are read and written as plain dictionaries (config.json), so that no torch is needed for them.
    """

    model_type: str
    """``model_type`` in config.json."""
    architecture: str
    """Class in transformers that loads it."""
    family: str
    """Our family."""
    read: Callable[[Mapping[str, Any], list[str]], ModelConfig | None]
    """config.json -> our shape; what our family cannot hold goes to the list of problems."""
    write: Callable[[Any], dict[str, Any]]
    """Our shape -> what config.json says of it."""
    refusals: Callable[[Any], list[str]]
    """Why a shape of ours cannot be written in this format; empty: it can."""
    entries: Callable[[Any], list[Entry]]
    """Our shape -> table of tensors."""
    is_for: Callable[[Mapping[str, Any]], bool] = lambda config: True
    """Whether a config.json of this ``model_type`` is one of this family."""
    is_in_transformers: bool = True
    """Whether transformers has the class; elsewhere it comes with the model, and is never run here."""


def is_ignorable(name: str) -> bool:
    """Whether a published tensor carries no weight."""
    return _NO_WEIGHTS.search(name) is not None


def ends(model: ModelConfig, rows: int | None = None) -> list[Entry]:
    """Embedding, final norm and output layer, under the names that Llama gave them; ``rows`` of the vocabulary (unset:
    as many as the tokenizer has entries) are published.
    """
    rows = model.vocab_size if rows is None else rows
    hidden, padded = model.hidden_size, model.padded_vocab_size
    padding = PaddedRows(rows, padded) if rows != padded else Same()

    def vocabulary(ours: str, theirs: str) -> Entry:
        return Entry(ours, (padded, hidden), {theirs: (rows, hidden)}, padding)

    found = [
        vocabulary(EMBEDDING, "model.embed_tokens.weight"),
        Entry("decoder.final_layernorm.weight", (hidden,), {"model.norm.weight": (hidden,)}),
    ]
    if model.untie_embeddings_and_output_weights:
        found.append(vocabulary("output_layer.weight", "lm_head.weight"))
    return found


def block(model: ModelConfig, ours: str, theirs: str) -> list[Entry]:
    """A layer's two norms and its SwiGLU, under the names that Llama gave them."""
    return layer_norms(model, ours, theirs) + swiglu(
        f"{ours}mlp.", f"{theirs}mlp.", hidden=model.hidden_size, width=model.ffn_hidden_size
    )


def padded_rows(entries: Sequence[Entry]) -> int:
    """Rows that the vocabulary has here beyond the published ones."""
    (embedding,) = (entry for entry in entries if entry.ours == EMBEDDING)
    (published,) = embedding.theirs.values()
    return embedding.our_shape[0] - published[0]


def layer_norms(model: ModelConfig, ours: str, theirs: str) -> list[Entry]:
    """A layer's two norms."""
    hidden = model.hidden_size
    return [
        Entry(f"{ours}input_layernorm.weight", (hidden,), {f"{theirs}input_layernorm.weight": (hidden,)}),
        Entry(f"{ours}pre_mlp_layernorm.weight", (hidden,), {f"{theirs}post_attention_layernorm.weight": (hidden,)}),
    ]


def swiglu(ours: str, theirs: str, *, hidden: int, width: int) -> list[Entry]:
    """A SwiGLU's matrices; gate and up are one of ours."""
    matrix = (width, hidden)
    return [
        Entry(
            f"{ours}linear_fc1.weight",
            (2 * width, hidden),
            {f"{theirs}gate_proj.weight": matrix, f"{theirs}up_proj.weight": matrix},
            Stacked((width, width)),
        ),
        Entry(f"{ours}linear_fc2.weight", (hidden, width), {f"{theirs}down_proj.weight": (hidden, width)}),
    ]


def in_layers(numbers: Iterable[int], layer: Callable[[str, str], Sequence[Entry]]) -> list[Entry]:
    """``layer(our prefix, their prefix)`` for each of these layers, counted from 0."""
    return [entry for number in numbers for entry in layer(f"decoder.layers.{number}.", f"model.layers.{number}.")]


def common_fields(model: ModelConfig) -> dict[str, Any]:
    """What every format's config.json says alike."""
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "hidden_act": "silu",
        "max_position_embeddings": model.seq_length,
        "rms_norm_eps": model.layernorm_epsilon,
        "initializer_range": model.init_method_std,
        "attention_dropout": model.attention_dropout,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "rope_theta": float(model.rotary_base),
    }


def common_values(config: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Our common fields from config.json; what is missing or cannot be held goes to ``problems``."""
    if config.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act={config['hidden_act']!r}: the feed-forward layer here is SwiGLU; allowed: 'silu'")
    read_quantization(config, problems)
    base = rope_of(config).get("rope_theta", 10000)
    if base != int(base):
        problems.append(f"rope_theta={base}: a whole number is needed")
    named = {
        "vocab_size": "vocab_size", "hidden_size": "hidden_size", "ffn_hidden_size": "intermediate_size",
        "num_layers": "num_hidden_layers", "num_attention_heads": "num_attention_heads",
        "seq_length": "max_position_embeddings", "layernorm_epsilon": "rms_norm_eps",
    }  # fmt: skip
    problems += [f"{theirs}: missing" for theirs in named.values() if config.get(theirs) is None]
    return {ours: config.get(theirs) for ours, theirs in named.items()} | {
        "rotary_base": int(base),
        "attention_dropout": float(config.get("attention_dropout") or 0.0),
        "init_method_std": float(config.get("initializer_range") or 0.02),
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
    }


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings in one form; transformers 5 has ``rope_parameters``, before it ``rope_theta, rope_scaling``."""
    found = {"rope_theta": config["rope_theta"]} if config.get("rope_theta") is not None else {}
    found |= config.get("rope_scaling") or {}
    found |= config.get("rope_parameters") or {}
    found["rope_type"] = found.get("rope_type") or found.pop("type", None) or "default"
    return found

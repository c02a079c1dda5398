"""How many parameters a shape has and how many floating-point operations a token costs; imports no torch.

Training costs 2 operations per parameter and token forward and 4 backward (scaling laws, arXiv:2001.08361, section
2.1), where the embedding's lookup costs nothing and the output layer counts once; attention scores add, per layer,
6 x s x heads x (query-key size + value size) (12 h s where heads x size = h; PaLM, arXiv:2204.02311, appendix B),
of which a causal mask needs half. An objective that predicts only some positions needs the output layer at these alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from gptoughts.config.model import ModelConfig
from gptoughts.models.family import Family


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of one model, the vocabulary's padding included."""

    total: int
    """All parameters but multi-token prediction's."""
    embedding: int
    """The embedding matrix (also the output layer's where they are tied)."""
    active: int
    """Parameters that a token is multiplied with: without the embedding, with the output layer, chosen experts only."""
    mtp: int = 0
    """Parameters of multi-token prediction, which share the model's embedding and output layer."""
    active_mtp: int = 0
    """Those of them that a token is multiplied with in training, the output layer once per depth."""


def count_parameters(family: Family, model: ModelConfig) -> ParameterCount:
    """Exact parameter counts of the model that ``family`` builds from ``model``."""
    assert family.holds(model), f"{type(model).__name__} is no shape of family {family.name}"
    embedding = model.embedding_parameters()
    active = embedding + model.active_layers_parameters() + model.hidden_size
    return ParameterCount(
        total=model.total_parameters(),
        embedding=embedding,
        active=active,
        mtp=model.mtp_parameters(),
        active_mtp=model.active_mtp_parameters() + model.mtp_depths() * embedding,
    )


def flops_per_token(family: Family, model: ModelConfig, seq_length: int) -> int:
    """Floating-point operations of forward and backward per token at ``seq_length`` tokens per sequence."""
    attention = 6 * (model.num_layers + model.mtp_depths()) * seq_length * model.attention_width()
    if family.is_causal:
        attention //= 2
    count = count_parameters(family, model)
    unneeded_output = round((1.0 - model.output_layer_fraction()) * count.embedding)
    return 6 * (count.active + count.active_mtp - unneeded_output) + attention

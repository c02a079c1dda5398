"""How many parameters a shape has and how many floating-point operations a token costs; imports no torch.

Training costs 2 operations per parameter and token forward and 4 backward (scaling laws, arXiv:2001.08361, section
2.1), where the embedding's lookup costs nothing and the output layer counts once; attention scores add, per layer,
6 x s x heads x (query-key size + value size) (12 h s where heads x size = h; PaLM, arXiv:2204.02311, appendix B),
of which a causal mask needs half. An objective that predicts only some positions needs the output layer at these alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from gptoughts.config.experiment import ParallelConfig
from gptoughts.config.model import ModelConfig
from gptoughts.config.pipeline import stage_layers
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


@dataclass(frozen=True)
class StageParameters:
    """Parameters of one pipeline stage by what divides them."""

    divided: int
    """By tensor parallelism."""
    replicated: int
    """By nothing: norms and routers."""
    routed: int
    """Routed experts': by tensor and expert parallelism."""

    @property
    def total(self) -> int:
        """All of the stage."""
        return self.divided + self.replicated + self.routed

    def dense_on_rank(self, tensor: int) -> int:
        """What a rank holds without routed experts."""
        return self.divided // tensor + self.replicated

    def routed_on_rank(self, tensor: int, expert: int) -> int:
        """What a rank holds of the routed experts."""
        return self.routed // (tensor * expert)


@lru_cache(maxsize=256)
def stage_parameters(model: ModelConfig, parallel: ParallelConfig) -> tuple[StageParameters, ...]:
    """Parameters of each pipeline stage; a tied embedding belongs to the first one, multi-token prediction to the last.

    Args:
        model: A shape without problems.
        parallel: A layout that divides its layers.
    """
    found = []
    for stage, chunks in enumerate(stage_layers(model.num_layers, parallel)):
        is_first, is_last = stage == 0, stage == parallel.pipeline - 1
        layers = [index for chunk in chunks for index in chunk]
        replicated = sum(map(model.replicated_parameters_of_layer, layers)) + is_last * model.hidden_size
        routed = sum(map(model.routed_parameters_of_layer, layers))
        matrices = is_first + (is_last and model.untie_embeddings_and_output_weights)
        total = sum(map(model.parameters_of_layer, layers)) + matrices * model.embedding_parameters()
        total += is_last * (model.hidden_size + model.mtp_parameters())
        if is_last and model.mtp_depths():
            behind = model.num_layers  # its layers are like those at the top of the model
            routed += model.mtp_depths() * model.routed_parameters_of_layer(behind)
            ends = 2 * model.hidden_size**2 + 3 * model.hidden_size
            replicated += model.mtp_depths() * (model.replicated_parameters_of_layer(behind) + ends)
        found.append(StageParameters(total - replicated - routed, replicated, routed))
    return tuple(found)


def flops_of_layers_per_token(family: Family, model: ModelConfig, layers: Sequence[int], seq_length: int) -> int:
    """Floating-point operations of forward and backward per token of some layers, by their indices."""
    active = sum(map(model.active_parameters_of_layer, layers))
    return 6 * active + len(layers) * _attention_scores(family, model, seq_length)


def flops_of_ends_per_token(family: Family, model: ModelConfig, seq_length: int) -> int:
    """The same of what the last stage has beside layers: final norm, output layer, multi-token prediction."""
    embedding, depths = model.embedding_parameters(), model.mtp_depths()
    unneeded = round((1.0 - model.output_layer_fraction()) * embedding)
    active = (1 + depths) * embedding - unneeded + model.hidden_size + model.active_mtp_parameters()
    return 6 * active + depths * _attention_scores(family, model, seq_length)


def _attention_scores(family: Family, model: ModelConfig, seq_length: int) -> int:
    """Of one layer's scores and weighted values, per token."""
    whole = 6 * seq_length * model.attention_width()
    return whole // 2 if family.is_causal else whole


def flops_per_token(family: Family, model: ModelConfig, seq_length: int) -> int:
    """Floating-point operations of forward and backward per token at ``seq_length`` tokens per sequence."""
    assert family.holds(model), f"{type(model).__name__} is no shape of family {family.name}"
    layers = range(model.num_layers)
    return flops_of_layers_per_token(family, model, layers, seq_length) + flops_of_ends_per_token(
        family, model, seq_length
    )

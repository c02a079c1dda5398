"""The shape of a model in megatron-core's words, and the arithmetic that follows from it; families extend it
(``models/<f>/config.py``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

VOCABULARY_MULTIPLE = 128


@dataclass(frozen=True)
class ModelConfig:
    """Fields that every family has. A preset fills all of them; flags and YAML override single ones."""

    RUN_ONLY_FIELDS: ClassVar[frozenset[str]] = frozenset({
        "attention_dropout", "hidden_dropout", "init_method_std", "moe_aux_loss_coeff", "moe_router_bias_update_rate",
        "moe_token_dispatcher_type", "moe_z_loss_coeff", "seq_length",
    })  # fmt: skip
    """Fields that may change between a checkpoint and its resumption."""
    LATER_FIELDS: ClassVar[Mapping[str, Any]] = {}
    """Fields that checkpoints of earlier versions do not name -> what their models had."""
    CHOICES: ClassVar[tuple[str, ...]] = ()
    """Fields that choose between the classes of a family with several (:meth:`is_chosen_by`)."""

    num_layers: int = 4
    """Transformer layers."""
    hidden_size: int = 256
    """Width of the residual stream."""
    ffn_hidden_size: int = 704
    """Width of the feed-forward layer (of each half of SwiGLU)."""
    num_attention_heads: int = 4
    """Query heads."""
    vocab_size: int = 8192
    """Entries of the tokenizer; the embedding is padded up to a multiple of 128. Not given: the corpus's."""
    seq_length: int = 512
    """Sequence length in tokens that the preset was made for; --block_size overrides it."""
    rotary_base: int = 10000
    """Base of the rotary embedding's wavelengths."""
    layernorm_epsilon: float = 1e-5
    """Added to the variance in RMSNorm."""
    attention_dropout: float = 0.0
    """Dropout of attention probabilities, a probability."""
    hidden_dropout: float = 0.0
    """Dropout of each block's output, a probability."""
    untie_embeddings_and_output_weights: bool = True
    """Separate matrices for the embedding and the output layer."""
    add_qkv_bias: bool = False
    """Bias in the query, key and value projections."""
    init_method_std: float = 0.02
    """Standard deviation of initial weights; output projections have it divided by sqrt(2 x num_layers)."""

    @classmethod
    def is_chosen_by(cls, stated: Mapping[str, str]) -> bool:
        """Whether this class, of those that its family has, holds a shape whose ``CHOICES`` read so (unset: absent)."""
        return True

    @property
    def padded_vocab_size(self) -> int:
        """vocab_size rounded up to a multiple of 128, the same for every layout."""
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    def filled(self) -> Self:
        """This shape with every field that follows from others filled in."""
        return self

    def special_tokens(self) -> dict[str, int]:
        """Special tokens that the model has to have, whether or not the corpus's tokenizer knows them: name -> id."""
        return {}

    def token_roles(self) -> dict[str, int | None]:
        """Special tokens that the model knows by a field ``ROLE_token_id``: role -> id (None: not known yet)."""
        return {}

    @classmethod
    def adopted(cls, other: ModelConfig) -> dict[str, Any] | None:
        """Fields with which a model of this family can start from weights of another family's shape; None: never."""
        return None

    def output_layer_fraction(self) -> float:
        """Fraction of a training row's positions that need the output layer, in expectation."""
        return 1.0

    def problems(self) -> list[str]:
        """Everything about this shape that cannot be built, one line each (``field=value: reason``)."""
        found = []
        for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "vocab_size", "seq_length",
                     "rotary_base", "layernorm_epsilon", "init_method_std"):  # fmt: skip
            value = getattr(self, name)
            if not value > 0:
                found.append(f"{name}={value}: must be greater than 0")
        for name in ("attention_dropout", "hidden_dropout"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                found.append(f"{name}={value}: a probability from 0 up to, but not including, 1")
        return found

    def tensor_parallel_divisors(self) -> dict[str, int]:
        """What tensor parallelism divides: name -> count; each has to be a multiple of ``parallel.tensor``."""
        return {
            "num_attention_heads": self.num_attention_heads,
            "ffn_hidden_size": self.ffn_hidden_size,
            "padded vocab_size": self.padded_vocab_size,
        }

    def recompute_modules(self) -> tuple[str, ...]:
        """Parts of a layer that can be recomputed by name (``config.recompute``)."""
        has_dense = not all(self.has_experts(index) for index in range(self.num_layers))
        return ("core_attn", "layernorm", *(("mlp",) if has_dense else ()))

    def expert_parallel_divisors(self) -> dict[str, int]:
        """What expert parallelism divides: name -> count, a multiple of ``parallel.expert``; empty: no experts."""
        return {}

    def expert_parallel_parameters(self) -> int:
        """Parameters that expert parallelism divides."""
        return 0

    def rotary_dim(self) -> int:
        """Size of the part of a head that the rotary embedding turns."""
        raise NotImplementedError(f"{type(self).__name__} does not say what the rotary embedding turns")

    def rotary_frequencies(self) -> tuple[float, ...] | None:
        """Radians per position of each rotary pair; None where the base alone says them."""
        return None

    def rotary_amplitude(self) -> float:
        """What cos and sin of the rotary embedding are multiplied by."""
        return 1.0

    def attention_parameters(self) -> int:
        """Parameters of one layer's attention, with the norms inside it."""
        raise NotImplementedError(f"{type(self).__name__} does not say how large its attention is")

    def attention_width(self) -> int:
        """Multiply-adds of one layer's attention per (query, key) pair: heads x (query-key size + value size)."""
        raise NotImplementedError(f"{type(self).__name__} does not say how wide its attention is")

    def feed_forward_parameters(self) -> int:
        """Parameters of one layer's feed-forward part (SwiGLU: gate, up and down matrix)."""
        return 3 * self.hidden_size * self.ffn_hidden_size

    def layer_parameters(self) -> int:
        """Parameters of one layer, its two norms included."""
        return self.attention_parameters() + self.feed_forward_parameters() + 2 * self.hidden_size

    def has_experts(self, index: int) -> bool:
        """Whether the layer with this index, counted from 0 over the whole model, is a mixture of experts."""
        return False

    def parameters_of_layer(self, index: int) -> int:
        """Parameters of the layer with this index, counted from 0 over the whole model."""
        return self.layer_parameters()

    def replicated_parameters_of_layer(self, index: int) -> int:
        """Those of a layer's parameters that every tensor-parallel rank has whole: its two norms here."""
        return 2 * self.hidden_size

    def routed_parameters_of_layer(self, index: int) -> int:
        """Those of a layer's parameters that belong to routed experts."""
        return 0

    def active_layer_parameters(self) -> int:
        """Parameters of one layer that a token passes; fewer than all where experts are chosen."""
        return self.layer_parameters()

    def active_parameters_of_layer(self, index: int) -> int:
        """Parameters of the layer with this index that a token passes."""
        return self.active_layer_parameters()

    def all_layers_parameters(self) -> int:
        """Parameters of all layers."""
        return self.num_layers * self.layer_parameters()

    def active_layers_parameters(self) -> int:
        """Parameters of all layers that a token passes."""
        return self.num_layers * self.active_layer_parameters()

    def mtp_depths(self) -> int:
        """Depths of multi-token prediction."""
        return 0

    def mtp_scaling_factor(self) -> float:
        """Factor of the mean loss of those depths in what is learned from."""
        return 0.0

    def mtp_parameters(self) -> int:
        """Parameters of multi-token prediction's own; embedding and output layer are the model's."""
        return 0

    def active_mtp_parameters(self) -> int:
        """Parameters of them that a token passes."""
        return 0

    def embedding_parameters(self) -> int:
        """Parameters of the embedding matrix, padding included."""
        return self.padded_vocab_size * self.hidden_size

    def total_parameters(self) -> int:
        """Parameters of the whole model, padding of the vocabulary included, without multi-token prediction."""
        matrices = 2 if self.untie_embeddings_and_output_weights else 1
        return matrices * self.embedding_parameters() + self.all_layers_parameters() + self.hidden_size

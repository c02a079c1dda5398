"""The shape of a model in megatron-core's words; families extend it (``models/<f>/config.py``)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelConfig:
    """Fields that every family has. A preset fills all of them; flags and YAML override single ones."""

    num_layers: int = 4
    """Transformer layers."""
    hidden_size: int = 256
    """Width of the residual stream."""
    ffn_hidden_size: int = 688
    """Width of the feed-forward layer (of each half of SwiGLU)."""
    num_attention_heads: int = 4
    """Query heads."""
    vocab_size: int = 8192
    """Entries of the tokenizer; the embedding is padded up to a multiple of 128."""
    seq_length: int = 512
    """Sequence length in tokens that the preset was made for; --block_size overrides it."""
    rotary_base: int = 10000
    """Base of the rotary embedding's wavelengths."""
    layernorm_epsilon: float = 1e-5
    """Added to the variance in RMSNorm."""
    attention_dropout: float = 0.0
    """Dropout of attention probabilities."""
    hidden_dropout: float = 0.0
    """Dropout of each block's output."""
    untie_embeddings_and_output_weights: bool = True
    """Separate matrices for the embedding and the output layer."""
    add_qkv_bias: bool = False
    """Bias in the query, key and value projections."""
    init_method_std: float = 0.02
    """Standard deviation of initial weights."""

    @property
    def padded_vocab_size(self) -> int:
        """vocab_size rounded up to a multiple of 128, the same for every layout."""
        return -(-self.vocab_size // 128) * 128

    def problems(self) -> list[str]:
        """Everything about this shape that cannot be built, one line each; empty where it can."""
        return []

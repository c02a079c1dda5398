"""The first stage's embedding matrix on the last pipeline stage: a tensor that is no parameter, and a lookup in it.

``parallel.shared_embedding`` keeps it equal to the first stage's and takes its gradient there.

Legend: v vocabulary on this tensor-parallel rank, h hidden.
"""

from __future__ import annotations

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from gptoughts.parallel import groups
from gptoughts.platform import device


def copy_of_embedding(config: TransformerConfig, vocab_size: int) -> Tensor:
    """[v, h], a leaf that wants a gradient: zeros until it is written for the first time. Collective: none."""
    shape = (vocab_size // groups.tensor_parallel_size(), config.hidden_size)
    return torch.zeros(shape, dtype=config.params_dtype, device=device.current_device()).requires_grad_()


def lookup_in(weight: Tensor, config: TransformerConfig, vocab_size: int, seq_length: int) -> LanguageModelEmbedding:
    """megatron-core's embedding of tokens without a parameter of its own.

    Args:
        weight: [v, h].
        config: megatron-core's configuration.
        vocab_size: Padded vocabulary, whole.
        seq_length: Longest sequence, in tokens.

    Collective: none.
    """
    embedding = LanguageModelEmbedding(config, vocab_size, seq_length, "none", tp_group=groups.tensor_parallel_group())
    words = embedding.word_embeddings
    del words.weight  # a module refuses a plain tensor under a parameter's name
    words.weight = weight
    return embedding

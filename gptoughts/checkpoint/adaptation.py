"""From a next-token model to a masked-diffusion model of the same block: the vocabulary's matrices with a mask token.

A mask token is a new word, or a reserved one that no text had, so that its row was never trained. Its embedding becomes
the mean of all others: what such a row says is then what an average token says, and no direction of the residual stream
is far from those that the layers have seen (Hewitt 2021, "Initializing new word embeddings for pretrained language
models"). The output layer never predicts the mask; where its row is new it is the mean too, which bounds its logit by
the others'.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gptoughts.checkpoint.origin import read_origin
from gptoughts.config.model import ModelConfig
from gptoughts.engine.interface import StateFragment
from gptoughts.errors import CheckpointError
from gptoughts.parallel import partition

if TYPE_CHECKING:
    from torch import Tensor

EMBEDDING = "embedding.word_embeddings.weight"
VOCABULARY_MATRICES = (EMBEDDING, "output_layer.weight")
MULTI_TOKEN_PREDICTION = "mtp."
"""Start of the names of modules that predict later tokens, which masked diffusion has no use for."""


@dataclass(frozen=True)
class Adaptation:
    """How the vocabulary's matrices of the source become those of the model."""

    num_entries: int
    """Rows of the source that stand for tokens; those below are padding."""
    mask_token_id: int

    def matrix(self, name: str, source: Tensor, rows: int) -> Tensor:
        """The whole matrix [rows, h] from the source's [padded entries, h]."""
        is_token = [index for index in range(self.num_entries) if index != self.mask_token_id]
        mean = source[is_token].float().mean(dim=0)
        whole = source.new_zeros((rows, source.size(1)))
        kept = min(rows, source.size(0))
        whole[:kept] = source[:kept]
        if name == EMBEDDING or self.mask_token_id >= self.num_entries:
            whole[self.mask_token_id] = mean.to(whole)
        return whole

    def fragment(self, source: Tensor, wanted: StateFragment, tensor_rank: int, tensor_size: int) -> Tensor:
        """What a live fragment of a vocabulary matrix should hold.

        Raises:
            CheckpointError: the matrices differ in width.
        """
        rows = wanted.shard_shape[0] * (tensor_size if wanted.partition_dim == 0 else 1)
        whole = self.matrix(wanted.name, source, rows)
        part = partition.split(whole, wanted.partition_dim, wanted.partition_stride, tensor_rank, tensor_size)
        if tuple(part.shape) != wanted.shard_shape:
            raise CheckpointError(f"{wanted.name} has shard shape {tuple(part.shape)} there, {wanted.shard_shape} here")
        return part.reshape(-1)[wanted.start : wanted.start + wanted.tensor.numel()]


def read_adaptation(path: Path, model: ModelConfig) -> Adaptation | None:
    """How ``model`` starts from the weights at ``path``; None where they are of its own family.

    Raises:
        CheckpointError, ConfigError: nothing there that a run can start from.
    """
    _, origin = read_origin(str(path))
    if type(model).adopted(origin) is None:
        return None
    mask = model.filled().token_roles()["mask"]
    assert mask is not None
    return Adaptation(origin.vocab_size, mask)

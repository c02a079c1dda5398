"""The face of an objective: rows of tokens in; inputs, labels, weights and a denominator out.

Legend: b microbatch, s sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class ModelInputs:
    """One microbatch as the model and the loss see it; its denominator is known before any forward."""

    input_ids: Tensor
    """int64 [b, s]."""
    position_ids: Tensor
    """int64 [b, s]."""
    labels: Tensor
    """int64 [b, s]: the token to predict at each position."""
    loss_weights: Tensor
    """fp32 [b, s]: weight of each position's loss; 0 where there is nothing to predict."""
    denominator: Tensor
    """fp64 scalar on the CPU: what this microbatch adds to the step's denominator."""

    def to(self, device: torch.device) -> ModelInputs:
        """The same microbatch on ``device`` (the denominator stays on the CPU)."""
        return ModelInputs(
            self.input_ids.to(device, non_blocking=True),
            self.position_ids.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.loss_weights.to(device, non_blocking=True),
            self.denominator,
        )


class Objective(Protocol):
    """What a model is trained to do. Any randomness is a function of (seed, global sample index) alone."""

    num_extra_tokens: int
    """Tokens that a row must have beyond the sequence length (1 where labels are the inputs shifted by one)."""

    def prepare(self, tokens: Tensor, sample_indices: Tensor) -> ModelInputs:
        """Turn rows into a microbatch.

        Args:
            tokens: int64 [b, s + num_extra_tokens].
            sample_indices: int64 [b], global sample index of each row.
        Collective: none.
        """

    def reduce(self, per_token_loss: Tensor, loss_weights: Tensor) -> Tensor:
        """Sum the weighted token losses.

        Args:
            per_token_loss: fp32 [b, s], nats.
            loss_weights: fp32 [b, s].
        Returns:
            fp32 scalar with gradient, nats; the engine divides by the global denominator.
        Raises:
            ValueError: the shapes differ.
        Collective: none.
        """

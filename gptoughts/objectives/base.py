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
    is_counted: Tensor
    """bool [b, s]: positions that the loss is a mean over, whether or not they are predicted this time."""
    selected_positions: Tensor | None = None
    """int64 [n], distinct indices into the flattened [b, s]: the only positions whose loss may have a weight; None:
    all may."""
    attention_mask: Tensor | None = None
    """bool, broadcastable to [b, heads, s, s], True where a query must not look at a key, beyond what the model
    forbids by itself."""
    is_padding: Tensor | None = None
    """bool [b, s], True beyond a row's end, where nothing is meant: routers of experts leave these positions out of
    their balance. None: rows are whole."""

    def to(self, device: torch.device) -> ModelInputs:
        """The same microbatch on ``device`` (the denominator stays on the CPU)."""
        return ModelInputs(
            self.input_ids.to(device, non_blocking=True),
            self.position_ids.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.loss_weights.to(device, non_blocking=True),
            self.denominator,
            self.is_counted.to(device, non_blocking=True),
            None if self.selected_positions is None else self.selected_positions.to(device, non_blocking=True),
            None if self.attention_mask is None else self.attention_mask.to(device, non_blocking=True),
            None if self.is_padding is None else self.is_padding.to(device, non_blocking=True),
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

    def for_validation(self, num_samples: int) -> Objective:
        """The objective as validation on ``num_samples`` samples measures it: the same figure for any run's seed."""

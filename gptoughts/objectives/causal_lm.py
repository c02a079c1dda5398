"""Next-token prediction: the loss of position i is -log p(x_(i+1) | x_1 .. x_i), averaged over all positions."""

from __future__ import annotations

import torch
from torch import Tensor

from gptoughts.config.experiment import ExperimentConfig
from gptoughts.objectives.base import ModelInputs


class CausalLM:
    """Objective of the autoregressive families; it draws no random numbers."""

    num_extra_tokens = 1

    def prepare(self, tokens: Tensor, sample_indices: Tensor) -> ModelInputs:
        """Shift by one: inputs are the first s tokens of each row, labels the last s; every position counts.

        Args:
            tokens: int64 [b, s + 1].
            sample_indices: int64 [b]; this objective draws nothing, so it does not look at them.
        """
        input_ids = tokens[:, :-1].contiguous()
        labels = tokens[:, 1:].contiguous()
        batch_size, sequence_length = input_ids.shape
        position_ids = torch.arange(sequence_length, device=tokens.device).expand(batch_size, -1)
        loss_weights = torch.ones(labels.shape, dtype=torch.float32, device=tokens.device)
        return ModelInputs(
            input_ids,
            position_ids,
            labels,
            loss_weights,
            torch.tensor(float(labels.numel()), dtype=torch.float64),
            is_counted=torch.ones(labels.shape, dtype=torch.bool, device=tokens.device),
        )

    def reduce(self, per_token_loss: Tensor, loss_weights: Tensor) -> Tensor:
        """Weighted sum of token losses [b, s] -> fp32 scalar, nats."""
        if per_token_loss.shape != loss_weights.shape:
            raise ValueError(
                f"per_token_loss {tuple(per_token_loss.shape)} and loss_weights {tuple(loss_weights.shape)} differ"
            )
        return (per_token_loss.float() * loss_weights).sum()

    def for_validation(self, num_samples: int) -> CausalLM:
        """The same: there is no noise to fix."""
        return self


def build_objective(config: ExperimentConfig) -> CausalLM:
    """The objective of a resolved run; next-token prediction has no options."""
    return CausalLM()

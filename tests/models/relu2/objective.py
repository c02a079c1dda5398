"""Next-token prediction that leaves out the first tokens of each sample, which have little context."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from gptoughts.config.experiment import ExperimentConfig
from gptoughts.objectives.base import ModelInputs
from gptoughts.objectives.causal_lm import CausalLM
from tests.models.relu2.config import ReLU2Config


@dataclass(frozen=True)
class LateCausalLM(CausalLM):
    """Objective of the family ``relu2``."""

    unscored_tokens: int
    """Tokens at the start of a sample that are not predicted."""

    def prepare(self, tokens: Tensor, sample_indices: Tensor) -> ModelInputs:
        """As in :class:`CausalLM`, with the first positions out of loss, denominator and count."""
        whole = super().prepare(tokens, sample_indices)
        is_counted = whole.position_ids >= self.unscored_tokens
        return replace(
            whole,
            loss_weights=whole.loss_weights * is_counted,
            denominator=is_counted.sum().double().cpu(),
            is_counted=is_counted,
        )


def build_objective(config: ExperimentConfig) -> LateCausalLM:
    """The objective of a resolved run."""
    assert isinstance(config.model, ReLU2Config)
    return LateCausalLM(unscored_tokens=config.model.unscored_tokens)

"""The shape of a decoder whose feed-forward half is an ungated squared ReLU (Primer, arXiv:2109.08668, section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gptoughts.models.gpt.config import GPTConfig


@dataclass(frozen=True)
class ReLU2Config(GPTConfig):
    """Fields of the family ``relu2``: those of ``gpt``, whose attention it has, and one of its own."""

    RUN_ONLY_FIELDS: ClassVar[frozenset[str]] = GPTConfig.RUN_ONLY_FIELDS | {"unscored_tokens"}

    unscored_tokens: int = 0
    """Tokens at the start of a sample whose prediction is not learned from, for want of context."""

    def problems(self) -> list[str]:
        """Everything about this shape that cannot be built, one line each."""
        found = super().problems()
        if not 0 <= self.unscored_tokens < self.seq_length:
            found.append(f"unscored_tokens={self.unscored_tokens}: from 0 to seq_length - 1 = {self.seq_length - 1}")
        return found

    def feed_forward_parameters(self) -> int:
        """Parameters of one layer's feed-forward half: an up and a down matrix, no gate."""
        return 2 * self.hidden_size * self.ffn_hidden_size

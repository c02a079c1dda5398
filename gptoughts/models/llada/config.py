"""The shape of a masked-diffusion language model: a Llama-style block that looks both ways, and how it is masked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from gptoughts.config.model import VOCABULARY_MULTIPLE
from gptoughts.models.gpt.config import GPTConfig

MASK_TOKEN = "[MASK]"
"""Name that a tokenizer gets for the mask where it has none."""


@dataclass(frozen=True)
class LLaDAConfig(GPTConfig):
    """Fields of the family ``llada``."""

    RUN_ONLY_FIELDS: ClassVar[frozenset[str]] = GPTConfig.RUN_ONLY_FIELDS | {
        "mask_epsilon", "random_length_probability", "is_low_discrepancy",
    }  # fmt: skip

    mask_token_id: int | None = None
    """Id of the mask token: a special token of the tokenizer, or the first id beyond it. Unset: that one."""
    mask_epsilon: float = 1e-3
    """Smallest probability that a position is masked: p = (1 - epsilon) t + epsilon with t uniform in [0, 1)."""
    random_length_probability: float = 0.01
    """Probability that a training sample is cut to a length drawn uniformly from 1 ... block_size."""
    is_low_discrepancy: bool = False
    """Spread the masking levels t of a global batch evenly over [0, 1) (less noisy steps), not independently."""

    @property
    def _mask_id(self) -> int:
        return self.vocab_size if self.mask_token_id is None else self.mask_token_id

    @property
    def padded_vocab_size(self) -> int:
        """vocab_size and the mask token, rounded up to a multiple of 128, the same for every layout."""
        needed = max(self.vocab_size, self._mask_id + 1)
        return -(-needed // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    def filled(self) -> Self:
        """This shape with the mask token's id filled in as well."""
        return replace(super().filled(), mask_token_id=self._mask_id)

    def special_tokens(self) -> dict[str, int]:
        """The mask token."""
        return {MASK_TOKEN: self._mask_id}

    def output_layer_fraction(self) -> float:
        """Expected fraction of masked positions, E[p]: the output layer runs at these alone."""
        return (1.0 + self.mask_epsilon) / 2.0

    def problems(self) -> list[str]:
        """Everything about this shape that cannot be built, one line each."""
        found = super().problems()
        if self.vocab_size > 0 and not 0 <= self._mask_id <= self.vocab_size:
            found.append(
                f"mask_token_id={self._mask_id}: the id of a special token of the tokenizer, or the first free one, "
                f"{self.vocab_size}"
            )
        if not 0 < self.mask_epsilon < 1:
            found.append(f"mask_epsilon={self.mask_epsilon}: a probability between 0 and 1, both excluded")
        if not 0 <= self.random_length_probability <= 1:
            found.append(f"random_length_probability={self.random_length_probability}: a probability from 0 to 1")
        return found

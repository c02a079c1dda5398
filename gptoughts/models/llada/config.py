"""The shape of a masked-diffusion language model: any of our blocks, looking both ways, and how its input is masked.

One class for each choice of ``attention`` and ``num_moe_experts``, joined from the fields of the autoregressive
families, so that every option of a block exists where it has a meaning and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, Self

from gptoughts.config.model import VOCABULARY_MULTIPLE, ModelConfig
from gptoughts.models.deepseek.config import DeepSeekConfig
from gptoughts.models.expert_shape import ExpertFields
from gptoughts.models.gpt.config import GPTConfig
from gptoughts.models.mla.config import MLAConfig
from gptoughts.models.yarn import YarnFields

MASK_TOKEN = "[MASK]"
"""Name that a tokenizer gets for the mask where it has none."""


@dataclass(frozen=True)
class DiffusionFields(ModelConfig):
    """Fields that every shape of the family ``llada`` has."""

    RUN_ONLY_FIELDS: ClassVar[frozenset[str]] = ModelConfig.RUN_ONLY_FIELDS | {
        "mask_epsilon", "random_length_probability", "is_low_discrepancy", "eos_token_id", "eot_token_id",
    }  # fmt: skip
    LATER_FIELDS: ClassVar[Mapping[str, Any]] = {"attention": "mha", "num_moe_experts": 0, "is_shifted": False}
    CHOICES: ClassVar[tuple[str, ...]] = ("attention", "num_moe_experts")

    attention: Literal["mha", "mla"] = "mha"
    """mha: multi-head or grouped-query attention (--model.num_query_groups), as in gpt; mla: multi-head latent
    attention, as in mla. Each has options of its own: --model.attention mla --help lists the latter's."""
    num_moe_experts: int = 0
    """Routed experts of each layer above the first ones, as in deepseek; 0: every layer is dense. With experts --help
    lists their options too."""
    mask_token_id: int | None = None
    """Id of the mask token. Unset: the tokenizer's ([MASK], <|mdm_mask|> ...), else the first id beyond it."""
    eos_token_id: int | None = None
    """Id of the token that ends a text, which samplers stop at. Unset: the tokenizer's, where it has one."""
    eot_token_id: int | None = None
    """Id of the token that ends a turn of a chat. Unset: the tokenizer's (<|eot_id|>, <|im_end|> ...)."""
    is_shifted: bool = False
    """The output at position i restores token i + 1, as in a next-token model; not as published. With --init_from such
    a model: true unless said otherwise."""
    mask_epsilon: float = 1e-3
    """Smallest probability that a position is masked: p = (1 - epsilon) t + epsilon with t uniform in [0, 1)."""
    random_length_probability: float = 0.01
    """Probability that a training sample is cut to a length drawn uniformly from 1 ... block_size."""
    is_low_discrepancy: bool = False
    """Spread the masking levels t of a global batch evenly over [0, 1) (less noisy steps), not independently."""

    @classmethod
    def is_chosen_by(cls, stated: Mapping[str, str]) -> bool:
        """Whether this class has the attention that is stated, and experts where their number is not 0."""
        wants_latent = stated.get("attention") == "mla"
        number = stated.get("num_moe_experts", "0").lstrip("-")
        wants_experts = number.isdecimal() and int(number) > 0
        return issubclass(cls, MLAConfig) == wants_latent and issubclass(cls, ExpertFields) == wants_experts

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

    def token_roles(self) -> dict[str, int | None]:
        """Mask, end of text, end of turn."""
        return {"mask": self.mask_token_id, "eos": self.eos_token_id, "eot": self.eot_token_id}

    @classmethod
    def adopted(cls, other: ModelConfig) -> dict[str, Any] | None:
        """The same block without its causal mask, and its head's alignment: outputs stay those of the next token."""
        if type(other) not in (GPTConfig, MLAConfig, DeepSeekConfig):
            return None  # a class derived from these may be another block
        is_latent = isinstance(other, MLAConfig)
        choices = {
            "attention": "mla" if is_latent else "mha",
            "num_moe_experts": other.num_moe_experts if isinstance(other, ExpertFields) else 0,
        }
        variant = next(c for c in SHAPES if c.is_chosen_by({name: str(value) for name, value in choices.items()}))
        names = {field.name for field in fields(variant)}
        shape = {field.name: getattr(other, field.name) for field in fields(other) if field.name in names}
        return shape | choices | {"is_shifted": True}

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
        for name in ("eos_token_id", "eot_token_id"):
            value = getattr(self, name)
            if value is not None and (not 0 <= value < self.vocab_size or value == self._mask_id):
                found.append(f"{name}={value}: from 0 to vocab_size - 1 = {self.vocab_size - 1}, and not the mask's id")
        if not 0 < self.mask_epsilon < 1:
            found.append(f"mask_epsilon={self.mask_epsilon}: a probability between 0 and 1, both excluded")
        if not 0 <= self.random_length_probability <= 1:
            found.append(f"random_length_probability={self.random_length_probability}: a probability from 0 to 1")
        return found


@dataclass(frozen=True)
class LLaDAConfig(DiffusionFields, GPTConfig):
    """Multi-head or grouped-query attention and dense layers: the published model."""


@dataclass(frozen=True)
class LLaDALatentConfig(DiffusionFields, YarnFields, MLAConfig):
    """Latent attention and dense layers."""

    attention: Literal["mha", "mla"] = "mla"


@dataclass(frozen=True)
class LLaDAExpertConfig(DiffusionFields, ExpertFields, GPTConfig):
    """Multi-head or grouped-query attention and experts."""

    num_moe_experts: int = 8


@dataclass(frozen=True)
class LLaDALatentExpertConfig(DiffusionFields, ExpertFields, YarnFields, MLAConfig):
    """Latent attention and experts."""

    attention: Literal["mha", "mla"] = "mla"
    num_moe_experts: int = 8


SHAPES: tuple[type[DiffusionFields], ...] = (
    LLaDAConfig, LLaDALatentConfig, LLaDAExpertConfig, LLaDALatentExpertConfig,
)  # fmt: skip
"""Every class of the family."""

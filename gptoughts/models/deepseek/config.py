"""The shape of a decoder with latent attention and a fine-grained mixture of experts (DeepSeek-V2 and V3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from gptoughts.models.expert_shape import ExpertFields
from gptoughts.models.mla.config import MLAConfig
from gptoughts.models.yarn import YarnFields


@dataclass(frozen=True)
class DeepSeekConfig(ExpertFields, YarnFields, MLAConfig):
    """Fields of the family ``deepseek``."""

    RUN_ONLY_FIELDS: ClassVar[frozenset[str]] = MLAConfig.RUN_ONLY_FIELDS | {"mtp_loss_scaling_factor"}
    LATER_FIELDS: ClassVar[Mapping[str, Any]] = {**MLAConfig.LATER_FIELDS, "mtp_num_layers": 0}

    mtp_num_layers: int = 0
    """Depths of multi-token prediction: modules behind the model, each of which learns to predict one token further."""
    mtp_loss_scaling_factor: float = 0.3
    """Factor of the mean loss of those depths in what is learned from; it may change when a run goes on."""

    def problems(self) -> list[str]:
        """Everything about this shape that cannot be built, one line each."""
        found = super().problems()
        for name in ("mtp_num_layers", "mtp_loss_scaling_factor"):
            value = getattr(self, name)
            if not value >= 0:
                found.append(f"{name}={value}: must be 0 or greater")
        return found

    def mtp_depths(self) -> int:
        """Depths of multi-token prediction."""
        return self.mtp_num_layers

    def mtp_scaling_factor(self) -> float:
        """Factor of the mean loss of those depths in what is learned from."""
        return self.mtp_loss_scaling_factor

    def mtp_parameters(self) -> int:
        """Parameters of all its depths: each a layer with experts, a projection of [embedding ; state], three norms."""
        return self._mtp(self.num_moe_experts)

    def active_mtp_parameters(self) -> int:
        """Parameters of them that a token passes."""
        return self._mtp(self.moe_router_topk)

    def _mtp(self, experts: int) -> int:
        projection = 2 * self.hidden_size * self.hidden_size
        return self.mtp_num_layers * (self._expert_layer(experts) + projection + 3 * self.hidden_size)

"""The shape of a decoder with latent attention and a fine-grained mixture of experts.

Each token is multiplied with all shared experts and ``moe_router_topk`` of ``num_moe_experts`` routed ones; the first
layers stay dense (DeepSeekMoE, arXiv:2401.06066; DeepSeek-V2, arXiv:2405.04434; DeepSeek-V3, arXiv:2412.19437).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from gptoughts.models.mla.config import MLAConfig


@dataclass(frozen=True)
class DeepSeekConfig(MLAConfig):
    """Fields of the family ``deepseek``."""

    RUN_ONLY_FIELDS: ClassVar[frozenset[str]] = MLAConfig.RUN_ONLY_FIELDS | {"mtp_loss_scaling_factor"}
    LATER_FIELDS: ClassVar[frozenset[str]] = MLAConfig.LATER_FIELDS | {"mtp_num_layers"}

    first_k_dense_layers: int = 1
    """Layers at the bottom whose feed-forward part is dense, ``ffn_hidden_size`` wide."""
    num_moe_experts: int = 8
    """Routed experts of each of the other layers."""
    moe_router_topk: int = 2
    """Routed experts that a token passes."""
    moe_ffn_hidden_size: int = 176
    """Width of a routed expert (of each half of SwiGLU)."""
    moe_shared_expert_intermediate_size: int = 176
    """Width of the shared experts together, which every token passes; 0: none."""
    moe_router_score_function: Literal["sigmoid", "softmax"] = "sigmoid"
    """How a token's affinity to each expert is made: sigmoid (V3) or softmax over all experts (V2)."""
    moe_router_num_groups: int = 1
    """Equal groups of experts; a token's experts come from its best groups only. 1: no groups."""
    moe_router_group_topk: int = 1
    """Groups that a token may use. A group's score: its two best affinities (sigmoid) or its best (softmax)."""
    moe_router_topk_scaling_factor: float = 1.0
    """Factor of the routed experts' weights."""
    moe_router_normalize_gates: bool = True
    """Make the chosen experts' weights add up to 1, before the factor."""
    moe_router_enable_expert_bias: bool = True
    """Balance load by a bias on the choice (never on the weight) that moves after each step; sigmoid only."""
    moe_router_bias_update_rate: float = 1e-3
    """How far an expert's bias moves per step, towards more tokens where it had fewer than the mean."""
    moe_aux_loss_coeff: float = 1e-4
    """Coefficient of the sequence-wise balance loss; 0: none."""
    moe_z_loss_coeff: float = 0.0
    """Coefficient of the mean squared log-sum-exp of the router's logits; 0: none."""
    rotary_scaling_factor: float = 1.0
    """YaRN: how many times longer than ``original_max_position_embeddings`` sequences may be; 1: plain rotary."""
    original_max_position_embeddings: int = 4096
    """YaRN: positions that the model was first trained with."""
    beta_fast: float = 32.0
    """YaRN: wavelengths that turn more often than this over the original positions are left alone."""
    beta_slow: float = 1.0
    """YaRN: wavelengths that turn less often than this are stretched by the whole factor."""
    mscale: float = 1.0
    """YaRN: cos and sin are multiplied by m(mscale) / m(mscale_all_dim), m(x) = 0.1 x ln(factor) + 1."""
    mscale_all_dim: float = 0.0
    """YaRN: attention scores are multiplied by m(mscale_all_dim) squared."""
    mtp_num_layers: int = 0
    """Depths of multi-token prediction: modules behind the model, each of which learns to predict one token further."""
    mtp_loss_scaling_factor: float = 0.3
    """Factor of the mean loss of those depths in what is learned from; it may change when a run goes on."""

    def problems(self) -> list[str]:
        """Everything about this shape that cannot be built, one line each."""
        return super().problems() + self._range_problems() + self._routing_problems()

    def _range_problems(self) -> list[str]:
        found = []
        for name in ("num_moe_experts", "moe_router_topk", "moe_ffn_hidden_size", "moe_router_num_groups",
                     "moe_router_group_topk", "moe_router_topk_scaling_factor", "original_max_position_embeddings",
                     "beta_fast", "beta_slow"):  # fmt: skip
            value = getattr(self, name)
            if not value > 0:
                found.append(f"{name}={value}: must be greater than 0")
        for name in ("moe_shared_expert_intermediate_size", "moe_router_bias_update_rate", "moe_aux_loss_coeff",
                     "moe_z_loss_coeff", "mscale", "mscale_all_dim", "mtp_num_layers",
                     "mtp_loss_scaling_factor"):  # fmt: skip
            value = getattr(self, name)
            if not value >= 0:
                found.append(f"{name}={value}: must be 0 or greater")
        if not 0 <= self.first_k_dense_layers < self.num_layers:
            found.append(
                f"first_k_dense_layers={self.first_k_dense_layers}: from 0 to num_layers - 1 = {self.num_layers - 1}; "
                "a model without experts is the family mla"
            )
        if not self.rotary_scaling_factor >= 1:
            found.append(f"rotary_scaling_factor={self.rotary_scaling_factor}: must be 1 (no scaling) or greater")
        if not self.beta_slow < self.beta_fast:
            found.append(f"beta_slow={self.beta_slow}: must be less than beta_fast={self.beta_fast}")
        return found

    def _routing_problems(self) -> list[str]:
        found: list[str] = []
        experts, groups = self.num_moe_experts, self.moe_router_num_groups
        if min(experts, groups, self.moe_router_topk, self.moe_router_group_topk) < 1:
            return found
        if experts % groups:
            return [f"moe_router_num_groups={groups}: num_moe_experts={experts} is not divisible by it"]
        if self.moe_router_group_topk > groups:
            found.append(f"moe_router_group_topk={self.moe_router_group_topk}: there are {groups} groups")
        reachable = min(self.moe_router_group_topk, groups) * (experts // groups)
        if self.moe_router_topk > reachable:
            found.append(
                f"moe_router_topk={self.moe_router_topk}: a token can reach {reachable} of {experts} experts "
                f"({self.moe_router_group_topk} of {groups} groups)"
            )
        if self.moe_router_score_function == "sigmoid" and groups > 1 and experts // groups < 2:
            found.append(
                f"moe_router_num_groups={groups}: with sigmoid scores a group's score is the sum of its two best "
                f"affinities; num_moe_experts={experts} leaves 1 per group"
            )
        if self.moe_router_enable_expert_bias and self.moe_router_score_function != "sigmoid":
            found.append(
                "moe_router_enable_expert_bias=True: the bias is defined for sigmoid scores (arXiv:2412.19437, "
                "section 2.1.2); set it to false with softmax"
            )
        return found

    def tensor_parallel_divisors(self) -> dict[str, int]:
        """What tensor parallelism divides: name -> count."""
        shared = self.moe_shared_expert_intermediate_size
        return {
            **super().tensor_parallel_divisors(),
            "moe_ffn_hidden_size": self.moe_ffn_hidden_size,
            **({"moe_shared_expert_intermediate_size": shared} if shared else {}),
        }

    def layer_parameters(self) -> int:
        """Parameters of one layer with experts, its two norms included (the router's bias is a buffer)."""
        return self._expert_layer(self.num_moe_experts)

    def active_layer_parameters(self) -> int:
        """Parameters of a layer with experts that a token passes."""
        return self._expert_layer(self.moe_router_topk)

    def all_layers_parameters(self) -> int:
        """Parameters of all layers, dense ones and those with experts."""
        return self._all_layers(self.num_moe_experts)

    def active_layers_parameters(self) -> int:
        """Parameters of all layers that a token passes."""
        return self._all_layers(self.moe_router_topk)

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

    def _all_layers(self, experts: int) -> int:
        dense = self.attention_parameters() + self.feed_forward_parameters() + 2 * self.hidden_size
        with_experts = self.num_layers - self.first_k_dense_layers
        return self.first_k_dense_layers * dense + with_experts * self._expert_layer(experts)

    def _expert_layer(self, experts: int) -> int:
        widths = experts * self.moe_ffn_hidden_size + self.moe_shared_expert_intermediate_size
        router = self.num_moe_experts * self.hidden_size
        return self.attention_parameters() + 3 * self.hidden_size * widths + router + 2 * self.hidden_size

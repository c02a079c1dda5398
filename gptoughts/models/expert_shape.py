"""The shape of a mixture of experts in the upper layers of a decoder, whatever its attention; imports no torch.

Each token is multiplied with all shared experts and ``moe_router_topk`` of ``num_moe_experts`` routed ones; the first
layers stay dense (DeepSeekMoE, arXiv:2401.06066; DeepSeek-V2, arXiv:2405.04434; DeepSeek-V3, arXiv:2412.19437).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gptoughts.config.model import ModelConfig


@dataclass(frozen=True)
class ExpertFields(ModelConfig):
    """Fields of every family with experts; to be joined with a class that says what the attention is."""

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
    moe_token_dispatcher_type: Literal["allgather", "alltoall"] = "alltoall"
    """How tokens reach experts on other expert-parallel ranks (``parallel.expert`` of 2 or more): every rank gets all
    tokens, or each token goes where its experts are. The result is the same."""

    def problems(self) -> list[str]:
        """Everything about this shape that cannot be built, one line each."""
        return super().problems() + self._range_problems() + self._routing_problems()

    def _range_problems(self) -> list[str]:
        found = []
        for name in ("num_moe_experts", "moe_router_topk", "moe_ffn_hidden_size", "moe_router_num_groups",
                     "moe_router_group_topk", "moe_router_topk_scaling_factor"):  # fmt: skip
            value = getattr(self, name)
            if not value > 0:
                found.append(f"{name}={value}: must be greater than 0")
        for name in ("moe_shared_expert_intermediate_size", "moe_router_bias_update_rate", "moe_aux_loss_coeff",
                     "moe_z_loss_coeff"):  # fmt: skip
            value = getattr(self, name)
            if not value >= 0:
                found.append(f"{name}={value}: must be 0 or greater")
        if not 0 <= self.first_k_dense_layers < self.num_layers:
            found.append(
                f"first_k_dense_layers={self.first_k_dense_layers}: from 0 to num_layers - 1 = {self.num_layers - 1}; "
                "at least one layer has experts"
            )
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

    def expert_parallel_divisors(self) -> dict[str, int]:
        """The routed experts."""
        return {"num_moe_experts": self.num_moe_experts}

    def expert_parallel_parameters(self) -> int:
        """Parameters of the routed experts of all layers."""
        with_experts = self.num_layers - self.first_k_dense_layers
        return with_experts * self.num_moe_experts * 3 * self.hidden_size * self.moe_ffn_hidden_size

    def layer_parameters(self) -> int:
        """Parameters of one layer with experts, its two norms included (the router's bias is a buffer)."""
        return self._expert_layer(self.num_moe_experts)

    def recompute_modules(self) -> tuple[str, ...]:
        """The experts besides."""
        shared = ("shared_experts",) if self.moe_shared_expert_intermediate_size else ()
        return (*super().recompute_modules(), "moe", *shared)

    def has_experts(self, index: int) -> bool:
        """Whether the layer with this index is a mixture of experts: the first ones are dense."""
        return index >= self.first_k_dense_layers

    def parameters_of_layer(self, index: int) -> int:
        """Parameters of the layer with this index: the first ones are dense."""
        return self.layer_parameters() if self.has_experts(index) else self._dense_layer()

    def replicated_parameters_of_layer(self, index: int) -> int:
        """Norms, and the router of a layer with experts."""
        router = self.num_moe_experts * self.hidden_size if self.has_experts(index) else 0
        return super().replicated_parameters_of_layer(index) + router

    def routed_parameters_of_layer(self, index: int) -> int:
        """Those of a layer's parameters that belong to routed experts."""
        expert = 3 * self.hidden_size * self.moe_ffn_hidden_size
        return self.num_moe_experts * expert if self.has_experts(index) else 0

    def active_layer_parameters(self) -> int:
        """Parameters of a layer with experts that a token passes."""
        return self._expert_layer(self.moe_router_topk)

    def active_parameters_of_layer(self, index: int) -> int:
        """Parameters of the layer with this index that a token passes."""
        return self.active_layer_parameters() if self.has_experts(index) else self._dense_layer()

    def all_layers_parameters(self) -> int:
        """Parameters of all layers, dense ones and those with experts."""
        return self._all_layers(self.num_moe_experts)

    def active_layers_parameters(self) -> int:
        """Parameters of all layers that a token passes."""
        return self._all_layers(self.moe_router_topk)

    def _all_layers(self, experts: int) -> int:
        with_experts = self.num_layers - self.first_k_dense_layers
        return self.first_k_dense_layers * self._dense_layer() + with_experts * self._expert_layer(experts)

    def _dense_layer(self) -> int:
        return self.attention_parameters() + self.feed_forward_parameters() + 2 * self.hidden_size

    def _expert_layer(self, experts: int) -> int:
        widths = experts * self.moe_ffn_hidden_size + self.moe_shared_expert_intermediate_size
        router = self.num_moe_experts * self.hidden_size
        return self.attention_parameters() + 3 * self.hidden_size * widths + router + 2 * self.hidden_size

"""The router of a mixture of experts: which experts a token passes, and with what weight.

Affinities s = sigmoid(x W_g) (DeepSeek-V3, arXiv:2412.19437, section 2.1.2) or softmax(x W_g) (DeepSeek-V2,
arXiv:2405.04434, section 2.1), in fp32. Experts are chosen by c = s + b; their gates are made of s alone:

    w_e = s_e / sum of the chosen s * scaling      (the division where gates are normalised).

With groups only the best ones are open: a group's score is the sum of its two best c (sigmoid) or its best c (softmax).
(megatron-core takes topk // group_topk best for both, transformer/moe/moe_utils.py:543, 0.16.1.)

Balance without a loss (arXiv:2408.15664): after each applied step b_e += rate * sign(mean(n) - n_e) for the counts n of
all ranks. Balance within a sequence (V3, equations 17-20; V2, equations 23-25), over its T tokens and E experts:

    coefficient * sum_e f_e P_e,   f_e = E / (k T) * times that e is among the best k,   P_e = mean of s_e / sum s,

where the best k are those of s without bias and groups (V3), or those that were chosen (V2).

Legend: s sequence on this rank (a part under sequence and context parallelism), b microbatch, h hidden, e experts, k
topk, t = s b tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from gptoughts.platform import device

GATE_EPS = 1e-20


class ExpertRouter(Router):
    """Scores, choice, gates, and what keeps the load even.

    Args:
        config: megatron-core's configuration.
        normalize_gates: Make a token's gates add up to 1 before the scaling.
        bias_update_rate: Step of the bias.
        pg_collection: Process groups.
    """

    expert_bias: Tensor | None
    """fp32 [e], added to the affinities for the choice; part of a checkpoint. None where it is switched off."""
    tokens_per_expert: Tensor
    """int64 [e]: how often each expert was chosen on this rank in training since :meth:`take_counts`."""

    def __init__(
        self, config: TransformerConfig, *, normalize_gates: bool, bias_update_rate: float, pg_collection: Any
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.normalize_gates = normalize_gates
        self.bias_update_rate = bias_update_rate
        self.register_buffer("expert_bias", None)
        self.register_buffer("tokens_per_expert", torch.empty(0, dtype=torch.int64), persistent=False)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Fresh buffers: ``deepspeed.zero.Init`` rounds a constructor's to the parameters' dtype."""
        where = device.current_device()
        if self.config.moe_router_enable_expert_bias:
            self.expert_bias = torch.zeros(self.num_experts, dtype=torch.float32, device=where)
        self.tokens_per_expert = torch.zeros(self.num_experts, dtype=torch.int64, device=where)

    def _apply(self, fn: Any, recurse: bool = True) -> ExpertRouter:
        """Casting a model to half precision leaves the bias in fp32: the sum of many small steps needs the digits."""
        kept = self.expert_bias
        super()._apply(fn, recurse)
        if kept is not None and self.expert_bias is not None:
            self.expert_bias = kept.to(self.expert_bias.device)
        return self

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, is_padding: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Choose.

        Args:
            hidden_states: [s, b, h].
            is_padding: bool [b, s]: tokens that count neither for the load nor in a loss; unset: all count.

        Returns:
            Gates, fp32 [t, k], and the experts that they belong to, int64 [t, k]; token t is (s, b) in that order.

        Collective: in training with a balance loss, the ranks that divide sequences (context-parallel ones, under
        sequence parallelism tensor-parallel ones, too).
        """
        s, b, _ = hidden_states.shape
        logits = F.linear(hidden_states.float(), self.weight.float()).view(s * b, -1)
        is_sigmoid = self.config.moe_router_score_function == "sigmoid"
        scores = logits.sigmoid() if is_sigmoid else logits.softmax(dim=-1)
        chosen = self.routing(scores.detach())
        gates = scores.gather(1, chosen)
        if self.normalize_gates:
            gates = gates / (gates.sum(dim=-1, keepdim=True) + GATE_EPS)
        gates = gates * (self.config.moe_router_topk_scaling_factor or 1.0)
        if self.training and torch.is_grad_enabled():
            is_counted = None if is_padding is None else ~is_padding.t()
            counted = chosen if is_counted is None else chosen[is_counted.flatten()]
            self.tokens_per_expert += torch.bincount(counted.reshape(-1), minlength=self.num_experts)
            gates = self._attach_losses(gates, logits, scores, chosen, s, b, is_counted)
        return gates, chosen

    def routing(self, scores: Tensor) -> Tensor:  # type: ignore[override]
        """Experts of each token, int64 [t, k], from affinities [t, e]."""
        choice = scores if self.expert_bias is None else scores + self.expert_bias
        num_groups, open_groups = self.config.moe_router_num_groups, self.config.moe_router_group_topk
        if num_groups:
            groups = choice.view(choice.size(0), num_groups, -1)
            best = 2 if self.config.moe_router_score_function == "sigmoid" else 1
            group_scores = groups.topk(best, dim=-1).values.sum(dim=-1)
            is_shut = torch.ones_like(group_scores, dtype=torch.bool)
            is_shut.scatter_(1, group_scores.topk(open_groups, dim=-1).indices, False)
            choice = groups.masked_fill(is_shut.unsqueeze(-1), float("-inf")).view_as(choice)
        return choice.topk(self.config.moe_router_topk, dim=-1).indices

    def take_counts(self) -> Tensor:
        """How often each expert was chosen on this rank since the last call, int64 [e]; counting starts anew."""
        counts = self.tokens_per_expert
        self.tokens_per_expert = torch.zeros_like(counts)
        return counts

    @torch.no_grad()
    def update_bias(self, counts: Tensor) -> None:
        """Move the bias by the counts of all ranks, fp64 [e]; nothing without a bias."""
        if self.expert_bias is not None:
            direction = torch.sign(counts.mean() - counts).to(self.expert_bias)
            self.expert_bias += self.bias_update_rate * direction

    def _attach_losses(
        self, gates: Tensor, logits: Tensor, scores: Tensor, chosen: Tensor, s: int, b: int, is_counted: Tensor | None
    ) -> Tensor:
        """Hang the losses on the gates: their gradients join the main loss's, its value stays as it is.

        The z-loss is divided by all positions, counted (bool [s, b]) or not: a sum over them would mean something else
        in each microbatch.
        """
        group = self._sequence_group()
        length = s * group.size()
        z_coefficient = self.config.moe_z_loss_coeff or 0.0
        if z_coefficient > 0:
            squares = logits.logsumexp(dim=-1).square()
            if is_counted is not None:
                squares = squares * is_counted.flatten()
            gates = MoEAuxLossAutoScaler.apply(gates, squares.sum() * (z_coefficient / (length * b)))
        if self.config.moe_aux_loss_coeff > 0:
            loss = self._balance_loss(scores, chosen, s, b, length, group, is_counted)
            gates = MoEAuxLossAutoScaler.apply(gates, loss * self.config.moe_aux_loss_coeff)
        return gates

    def _sequence_group(self) -> dist.ProcessGroup:
        """The ranks that hold parts of the sequences that this one has a part of."""
        return self.tp_cp_group if self.config.sequence_parallel else self.cp_group

    def _balance_loss(
        self,
        scores: Tensor,
        chosen: Tensor,
        s: int,
        b: int,
        length: int,
        group: dist.ProcessGroup,
        is_counted: Tensor | None,
    ) -> Tensor:
        """Mean over sequences of sum_e f_e P_e; where ranks divide sequences this rank's part of it."""
        k = chosen.size(1)
        if self.config.moe_router_score_function == "sigmoid":
            chosen = scores.detach().topk(k, dim=-1).indices
            scores = scores / (scores.sum(dim=-1, keepdim=True) + GATE_EPS)
        hits = torch.zeros_like(scores).scatter_(1, chosen, 1.0).view(s, b, -1)
        scores = scores.view(s, b, -1)
        if is_counted is None:
            hits, lengths = hits.sum(0), hits.new_full((b, 1), length)
        else:
            hits, scores = hits * is_counted.unsqueeze(-1), scores * is_counted.unsqueeze(-1)
            hits, lengths = hits.sum(0), is_counted.sum(0).to(hits).unsqueeze(-1)
        if group.size() > 1:
            dist.all_reduce(hits, group=group)
            if is_counted is not None:
                dist.all_reduce(lengths, group=group)
        lengths = lengths.clamp(min=1.0)  # a row that is all padding
        fraction = hits * (self.num_experts / (k * lengths))
        return (fraction * scores.sum(0) / lengths).sum() / b

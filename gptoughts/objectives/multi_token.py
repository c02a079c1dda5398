"""Multi-token prediction's part of the loss: depth k predicts, at position i, the token k places after the usual one.

With y the labels, w the loss weights and N the step's denominator (DeepSeek-V3, arXiv:2412.19437, section 2.2):

    L = scaling / D * sum_(k=1..D) L_k,   L_k = 1/N sum_i w_(i+k) CE(p_i^k, y_(i+k)).

A sequence's last k positions have no target at depth k, and count as 0 (the paper divides by the whole length, too);
nor has a position whose target belongs to the next of several sequences packed into one row. The log's figure is a mean
over the targets that there are.

Legend: b microbatch, s sequence, D depths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gptoughts.objectives.base import ModelInputs

_LOSS, _WEIGHT = "mtp_{}_loss_sum", "mtp_{}_weight_sum"


def shift_left(values: Tensor, places: int) -> Tensor:
    """[b, s] with each row moved ``places`` to the left; 0 comes in from the right."""
    shifted = torch.zeros_like(values)
    kept = max(values.size(1) - places, 0)
    shifted[:, :kept] = values[:, values.size(1) - kept :]
    return shifted


def shift_positions(positions: Tensor, places: int, length: int) -> Tensor:
    """Indices into the flattened [b, length], each moved to the left within its row; those that leave it drop out."""
    return positions[positions % length >= places] - places


def is_without_token(input_ids: Tensor, is_padding: Tensor | None, places: int) -> Tensor:
    """bool [b, s]: padding, and the last positions of a row, which know no token so many places ahead."""
    found = torch.zeros_like(input_ids, dtype=torch.bool) if is_padding is None else is_padding.clone()
    found[:, max(found.size(1) - places, 0) :] = True
    return found


def depth_weights(loss_weights: Tensor, position_ids: Tensor, depth: int) -> Tensor:
    """Weight of each position's loss at a depth: its target's, or 0 where the target is outside of its sequence.

    Args:
        loss_weights: fp32 [b, s], of the main model's loss.
        position_ids: int64 [b, s].
        depth: From 1.
    """
    is_same_sequence = shift_left(position_ids, depth) == position_ids + depth
    return shift_left(loss_weights, depth) * is_same_sequence


@dataclass(frozen=True)
class MultiTokenLoss:
    """What the depths add to the loss of a microbatch."""

    scaling_factor: float
    """Factor of the mean over depths."""

    def __call__(
        self, losses: Tensor, inputs: ModelInputs, own_part: Callable[[Tensor], Tensor] = lambda x: x
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum to learn from, and detached sums for the log.

        Args:
            losses: fp32 [D, b, s] nats, per depth and position.
            inputs: The microbatch, its sequences whole.
            own_part: Of [b, whole sequence], the positions that ``losses`` has.

        Returns:
            fp32 scalar with gradient, to be divided by the step's denominator like the main sum; log sums by name.
        """
        sums, extras = [], {}
        for depth, of_depth in enumerate(losses.unbind(0), start=1):
            weights = own_part(depth_weights(inputs.loss_weights, inputs.position_ids, depth))
            sums.append((of_depth * weights).sum())
            extras[_LOSS.format(depth)] = sums[-1].detach()
            extras[_WEIGHT.format(depth)] = weights.sum()
        return torch.stack(sums).mean() * self.scaling_factor, extras


def multi_token_figures(extras: Mapping[str, float]) -> dict[str, float]:
    """A step's log figures from its sums: mean loss of each depth that had a target, and the mean of those, in nats."""
    means: dict[str, float] = {}
    depth = 1
    while _LOSS.format(depth) in extras:
        weight = extras[_WEIGHT.format(depth)]
        if weight > 0:
            means[f"mtp_{depth}_loss"] = extras[_LOSS.format(depth)] / weight
        depth += 1
    if not means:
        return {}
    return {"mtp_loss": sum(means.values()) / len(means)} | (means if depth > 2 else {})

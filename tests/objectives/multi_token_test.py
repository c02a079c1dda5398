"""What each depth predicts, how much it counts, and what the log says of it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from gptoughts.objectives.causal_lm import CausalLM
from gptoughts.objectives.multi_token import MultiTokenLoss, depth_weights, multi_token_figures, shift_left


def test_shift_left() -> None:
    values = torch.arange(1, 9).view(2, 4)
    assert shift_left(values, 0).tolist() == values.tolist()
    assert shift_left(values, 1).tolist() == [[2, 3, 4, 0], [6, 7, 8, 0]]
    assert shift_left(values, 3).tolist() == [[4, 0, 0, 0], [8, 0, 0, 0]]
    assert not shift_left(values, 4).any()
    assert not shift_left(values, 9).any()


def test_a_depth_weighs_its_targets_and_stays_within_a_sequence() -> None:
    weights = torch.tensor([[0.5, 1.0, 0.0, 2.0, 3.0]])
    whole = torch.arange(5)[None]
    assert depth_weights(weights, whole, 1).tolist() == [[1.0, 0.0, 2.0, 3.0, 0.0]]
    assert depth_weights(weights, whole, 2).tolist() == [[0.0, 2.0, 3.0, 0.0, 0.0]]
    packed = torch.tensor([[0, 1, 0, 1, 2]])  # two tokens of one sequence, three of the next
    assert depth_weights(weights, packed, 1).tolist() == [[1.0, 0.0, 2.0, 3.0, 0.0]]
    assert depth_weights(weights, packed, 2).tolist() == [[0.0, 0.0, 3.0, 0.0, 0.0]]


def test_loss_is_scaled_mean_of_depths_over_the_whole_denominator() -> None:
    inputs = CausalLM().prepare(torch.zeros(2, 6, dtype=torch.int64), torch.arange(2))
    losses = torch.stack((torch.full((2, 5), 3.0), torch.full((2, 5), 7.0))).requires_grad_()
    total, extras = MultiTokenLoss(0.5)(losses, inputs)
    # 2 x 4 targets of 3 nats and 2 x 3 of 7, halved for two depths, times the factor.
    assert total.item() == (24 + 42) / 2 * 0.5
    assert extras["mtp_1_weight_sum"] == 8
    assert extras["mtp_2_weight_sum"] == 6
    assert not any(extra.requires_grad for extra in extras.values())
    (gradient,) = torch.autograd.grad(total, losses)
    assert gradient[0, 0].tolist() == [0.25] * 4 + [0.0]
    assert gradient[1, 1].tolist() == [0.25] * 3 + [0.0] * 2
    figures = multi_token_figures({name: float(value) for name, value in extras.items()})
    assert figures == {"mtp_loss": 5.0, "mtp_1_loss": 3.0, "mtp_2_loss": 7.0}


def test_figures_of_one_depth_of_none_and_without_targets() -> None:
    assert multi_token_figures({"target_bytes": 5.0}) == {}
    assert multi_token_figures({"mtp_1_loss_sum": 6.0, "mtp_1_weight_sum": 4.0}) == {"mtp_loss": 1.5}
    short = {"mtp_1_loss_sum": 6.0, "mtp_1_weight_sum": 4.0, "mtp_2_loss_sum": 0.0, "mtp_2_weight_sum": 0.0}
    assert multi_token_figures(short)["mtp_loss"] == 1.5
    nothing = dict.fromkeys(short, 0.0)
    assert multi_token_figures(nothing) == {}


def test_weights_without_a_target_do_not_count() -> None:
    inputs = CausalLM().prepare(torch.zeros(1, 4, dtype=torch.int64), torch.arange(1))
    inputs = dataclasses.replace(inputs, loss_weights=torch.tensor([[1.0, 0.0, 0.0]]))
    total, extras = MultiTokenLoss(1.0)(torch.ones(1, 1, 3), inputs)
    assert total.item() == pytest.approx(0.0)
    assert extras["mtp_1_weight_sum"] == 0

"""Next-token prediction: shifted labels, every position counted."""

from __future__ import annotations

import math

import pytest
import torch

from gptoughts.objectives.causal_lm import CausalLM


def test_labels_are_the_inputs_shifted_by_one() -> None:
    tokens = torch.tensor([[5, 6, 7, 8], [1, 2, 3, 4]])
    inputs = CausalLM().prepare(tokens, torch.tensor([0, 1]))
    assert inputs.input_ids.tolist() == [[5, 6, 7], [1, 2, 3]]
    assert inputs.labels.tolist() == [[6, 7, 8], [2, 3, 4]]
    assert inputs.position_ids.tolist() == [[0, 1, 2]] * 2
    assert inputs.denominator.item() == 6


def test_the_loss_of_a_uniform_predictor_is_ln_v() -> None:
    objective = CausalLM()
    inputs = objective.prepare(torch.randint(0, 50, (3, 9)), torch.arange(3))
    per_token = torch.nn.functional.cross_entropy(torch.zeros(24, 50), inputs.labels.view(-1), reduction="none")
    mean = objective.reduce(per_token.view(3, 8), inputs.loss_weights) / inputs.denominator
    assert mean.item() == pytest.approx(math.log(50), rel=1e-6)


def test_shapes_that_differ_are_refused_with_both_named() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\)"):
        CausalLM().reduce(torch.zeros(2, 3), torch.ones(2, 4))

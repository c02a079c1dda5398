"""Masked diffusion: the weights make it a mean, the noise belongs to the sample, and cut rows count as short ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gptoughts.objectives.masked_diffusion import MaskedDiffusion, select_positions, uniform_draws

MASK = 50
LENGTH = 64


def objective(**options: object) -> MaskedDiffusion:
    return MaskedDiffusion(**{"mask_token_id": MASK, "seed": 1234, **options})  # type: ignore[arg-type]


def rows(count: int) -> torch.Tensor:
    return torch.randint(0, MASK, (count, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stratified_samples": 32},
        {"random_length_probability": 0.5},
        {"epsilon": 0.1},
        {"random_length_probability": 0.5, "is_shifted": True},
    ],
    ids=["plain", "low-discrepancy", "many-cut", "large-epsilon", "shifted"],
)
def test_the_expected_loss_of_a_uniform_predictor_is_ln_v(options: dict[str, object]) -> None:
    count, vocabulary = 6000, 50
    inputs = objective(**options).prepare(rows(count), torch.arange(count))
    per_token = torch.full((count, LENGTH), math.log(vocabulary))
    mean = objective().reduce(per_token, inputs.loss_weights) / inputs.denominator
    # The standard error of the mean is 0.5% for independent levels and epsilon = 1e-3.
    assert mean.item() == pytest.approx(math.log(vocabulary), rel=0.02)


def test_labels_are_not_shifted_and_only_masked_positions_have_a_weight() -> None:
    tokens = rows(8)
    inputs = objective(random_length_probability=0.0).prepare(tokens, torch.arange(8))
    is_masked = inputs.input_ids == MASK
    assert 0.1 < is_masked.float().mean() < 0.9
    assert torch.equal(inputs.labels, tokens)
    assert torch.equal(inputs.input_ids[~is_masked], tokens[~is_masked])
    assert torch.equal(inputs.loss_weights > 0, is_masked)
    assert inputs.denominator.item() == 8 * LENGTH, "the mean is over all positions, not over the masked ones"
    assert inputs.attention_mask is None
    for weights in inputs.loss_weights:
        assert len(weights[weights > 0].unique()) <= 1, "one masking level per row"


def test_shifted_outputs_restore_the_next_token() -> None:
    tokens = rows(40)
    plain = objective(random_length_probability=0.4).prepare(tokens, torch.arange(40))
    shifted = objective(random_length_probability=0.4, is_shifted=True).prepare(tokens, torch.arange(40))
    is_masked = shifted.input_ids == MASK
    assert not is_masked[:, 0].any(), "nothing predicts a row's first token"
    is_whole = plain.is_counted.all(dim=1)
    assert torch.equal(is_masked[is_whole, 1:], (plain.input_ids == MASK)[is_whole, 1:]), "the same noise"
    assert torch.equal(shifted.labels[:, :-1], tokens[:, 1:])
    assert torch.equal(shifted.loss_weights[:, :-1] > 0, is_masked[:, 1:])
    assert not shifted.loss_weights[:, -1].any()
    assert shifted.is_padding is not None
    lengths = (~shifted.is_padding).sum(dim=1)
    assert lengths.min() >= 2
    assert shifted.denominator.item() == (lengths - 1).sum() == shifted.is_counted.sum()
    assert shifted.selected_positions is not None
    assert set((shifted.loss_weights.flatten() > 0).nonzero().squeeze(1).tolist()) <= set(
        shifted.selected_positions.tolist()
    )


def test_the_weight_is_one_over_the_probability_of_the_level() -> None:
    inputs = objective(epsilon=0.2).prepare(rows(5), torch.arange(100, 105))
    for row in range(5):
        level = uniform_draws(1234, 0, 100 + row, 1)[0]
        probability = 0.8 * level + 0.2
        assert inputs.loss_weights[row].max().item() == pytest.approx(1 / probability, rel=1e-6)


def test_noise_belongs_to_the_seed_and_the_sample_alone() -> None:
    tokens, diffusion = rows(8), objective(stratified_samples=8, random_length_probability=0.5)
    whole = diffusion.prepare(tokens, torch.arange(16, 24))
    for part in (slice(0, 3), slice(3, 8), slice(5, 6)):
        piece = diffusion.prepare(tokens[part], torch.arange(16, 24)[part])
        for name in ("input_ids", "loss_weights", "is_counted"):
            assert torch.equal(getattr(piece, name), getattr(whole, name)[part]), name
    order = torch.tensor([3, 1, 2])
    shuffled = diffusion.prepare(tokens[order], 16 + order)
    assert torch.equal(shuffled.input_ids, whole.input_ids[order])
    for other in (objective(seed=1235), objective()):
        indices = torch.arange(16, 24) + (other.seed == 1234)
        assert not torch.equal(other.prepare(tokens, indices).loss_weights, objective().prepare(
            tokens, torch.arange(16, 24)).loss_weights)  # fmt: skip


def test_the_generator_gives_the_same_numbers_everywhere() -> None:
    """A change here would change every run's noise: recorded once, from Philox4x64-10."""
    assert uniform_draws(1234, 0, 7, 3).tolist() == pytest.approx(RECORDED, abs=1e-15)
    assert np.array_equal(uniform_draws(5, 1, 9, 100)[:40], uniform_draws(5, 1, 9, 40))
    assert uniform_draws(5, 0, 9, 20000).mean() == pytest.approx(0.5, abs=0.01)


RECORDED = [0.9024777001180888, 0.06555083932171824, 0.9847465836717398]


def test_low_discrepancy_levels_are_evenly_spread_and_uniform() -> None:
    size = 16
    diffusion = objective(stratified_samples=size, random_length_probability=0.0, epsilon=1e-9)
    starts = []
    for batch in range(3):
        inputs = diffusion.prepare(rows(size), torch.arange(size) + batch * size)
        levels = sorted(1.0 / weights.max().item() for weights in inputs.loss_weights if weights.any())
        gaps = np.diff(levels)
        assert np.allclose(gaps, 1 / size, atol=1e-4) or len(levels) < size
        starts.append(levels[0])
    assert len({round(start, 6) for start in starts}) == 3, "each batch has a start of its own"


def test_cut_rows_count_only_up_to_their_end() -> None:
    count = 4000
    inputs = objective(random_length_probability=0.1).prepare(rows(count), torch.arange(count))
    lengths = inputs.is_counted.sum(dim=1)
    is_cut = lengths < LENGTH
    assert is_cut.float().mean().item() == pytest.approx(0.1 * (LENGTH - 1) / LENGTH, abs=0.015)
    assert lengths[is_cut].float().mean().item() == pytest.approx(LENGTH / 2, rel=0.1)
    assert inputs.denominator.item() == lengths.sum().item()
    beyond = ~inputs.is_counted
    assert not inputs.loss_weights[beyond].any()
    assert inputs.attention_mask is not None
    assert inputs.attention_mask.shape == (count, 1, 1, LENGTH)
    assert torch.equal(inputs.attention_mask[:, 0, 0], beyond)


@pytest.mark.parametrize("targets", [0, 1, 16, 17, 40, 48])
def test_selection_holds_all_targets_in_round_numbers(targets: int) -> None:
    is_target = torch.zeros(2, 24, dtype=torch.bool)
    is_target.view(-1)[torch.randperm(48, generator=torch.Generator().manual_seed(3))[:targets]] = True
    selected = select_positions(is_target)
    assert len(selected) == max(16, -(-targets // 16) * 16)
    assert len(selected.unique()) == len(selected)
    assert is_target.view(-1)[selected].sum() == targets


def test_selection_of_a_small_microbatch_is_all_of_it() -> None:
    assert select_positions(torch.zeros(1, 7, dtype=torch.bool)).tolist() == list(range(7))


def test_validation_is_the_same_for_every_run_and_never_cut() -> None:
    tokens, indices = rows(8), torch.arange(8)
    found = [
        objective(seed=seed, random_length_probability=1.0).for_validation(8).prepare(tokens, indices)
        for seed in (1, 2)
    ]
    assert torch.equal(found[0].loss_weights, found[1].loss_weights)
    assert found[0].is_counted.all()
    inverse = sorted(1.0 / row.max().item() for row in found[0].loss_weights if row.any())
    assert np.allclose(np.diff(inverse), 0.999 / 8, atol=1e-3), "levels cover the whole range evenly"


def test_shapes_that_differ_are_refused_with_both_named() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\)"):
        objective().reduce(torch.zeros(2, 3), torch.ones(2, 4))

"""The order of samples: permutations, shares, and independence of the run's length."""

from __future__ import annotations

import numpy as np
import pytest

from gptoughts.data.order import BLEND_PATTERN_SAMPLES, Blend, permute


def _epoch(size: int, *, seed: int = 1, epoch: int = 0, stream: int = 0) -> np.ndarray:
    return permute(np.arange(size), size, seed=seed, epochs=np.full(size, epoch), stream=stream)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 17, 1000, 4097])
def test_every_epoch_is_a_permutation(size: int) -> None:
    for epoch in range(3):
        assert sorted(_epoch(size, epoch=epoch)) == list(range(size))


def test_keys_matter() -> None:
    base = _epoch(1000)
    np.testing.assert_array_equal(base, _epoch(1000))
    for other in (_epoch(1000, seed=2), _epoch(1000, epoch=1), _epoch(1000, stream=1)):
        assert (base == other).mean() < 0.02


def test_positions_can_be_asked_for_one_by_one() -> None:
    whole = _epoch(313)
    single = [int(permute(np.array([i]), 313, seed=1, epochs=np.array([0]), stream=0)[0]) for i in range(313)]
    assert whole.tolist() == single


def test_shuffle_is_even() -> None:
    """Where sample j lands is uniform over epochs, and neighbours do not stay neighbours."""
    size, epochs = 64, 4000
    places = permute(
        np.tile(np.arange(size), epochs), size, seed=3, epochs=np.repeat(np.arange(epochs), size), stream=0
    ).reshape(epochs, size)
    counts = np.stack([np.bincount(places[:, position], minlength=size) for position in range(size)])
    chi_square = ((counts - epochs / size) ** 2 / (epochs / size)).sum(axis=1)
    assert abs(chi_square.mean() - (size - 1)) < 6.0  # its expectation is size - 1
    steps = (np.diff(places, axis=1) % size).ravel()
    assert abs((steps == 1).mean() - 1 / size) < 0.002


def test_blend_keeps_shares_everywhere() -> None:
    weights = [0.7, 0.2, 0.1]
    numbers, positions = Blend(weights).locate(np.arange(3 * BLEND_PATTERN_SAMPLES))
    for end in (100, 1000, 70000):
        shares = np.bincount(numbers[:end], minlength=3) / end
        np.testing.assert_allclose(shares, weights, atol=2 / end + 2e-5)
    for number in range(3):
        np.testing.assert_array_equal(positions[numbers == number], np.arange((numbers == number).sum()))


def test_blend_does_not_starve_a_small_weight_and_has_one_period() -> None:
    blend = Blend([1e9, 1.0, 1.0])
    numbers, _ = blend.locate(np.arange(BLEND_PATTERN_SAMPLES))
    assert np.bincount(numbers).tolist() == [BLEND_PATTERN_SAMPLES - 2, 1, 1]


def test_a_far_position_needs_no_walk() -> None:
    far = np.array([10**12, 10**12 + 1])
    numbers, positions = Blend([1.0, 1.0]).locate(far)
    assert sorted(numbers.tolist()) == [0, 1]
    assert positions.tolist() == [5 * 10**11, 5 * 10**11]

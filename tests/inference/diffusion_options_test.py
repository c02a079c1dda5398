"""What samplers of masked-diffusion models can be asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gptoughts.inference.diffusion_options import DiffusionOptions
from gptoughts.inference.remasking import SpecialTokens, choose, predict


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0: at least 1"),
        ({"block_length": 0}, "block_length=0: from 1 to max_new_tokens, 48"),
        ({"block_length": 64}, "block_length=64: from 1 to max_new_tokens, 48"),
        (
            {"block_length": 20},
            "block_length=20: max_new_tokens=48 is not divisible by it; allowed: 1, 2, 3, 4, 6, 8, 12, 16, 24, 48",
        ),
        (
            {"block_length": 16, "steps": 25},
            "steps=25: a multiple of the number of blocks, 3 (48 masks in blocks of 16), "
            "and at most 48, one for each mask",
        ),
        (
            {"steps": 49},
            "steps=49: a multiple of the number of blocks, 1 (48 masks in blocks of 48), "
            "and at most 48, one for each mask",
        ),
        ({"steps": 0}, "steps=0: at least 1"),
        ({"temperature": -1.0}, "temperature=-1.0: 0 (the likeliest token) or more"),
        ({"temperature": float("nan")}, "temperature=nan: 0 (the likeliest token) or more"),
        ({"cfg_scale": -0.5}, "cfg_scale=-0.5: 0 (no guidance) or more"),
        ({"threshold": 0.0}, "threshold=0.0: a probability above 0, up to 1"),
        ({"factor": 0.0}, "factor=0.0: greater than 0"),
        ({"threshold": 0.9, "factor": 1.0}, "threshold=0.9 and factor=1.0: one rule at a time"),
        (
            {"threshold": 0.9, "steps": 48},
            "steps=48: with threshold confidence decides how many steps there are; leave it out",
        ),
        (
            {"factor": 1.0, "remasking": "random"},
            "remasking=random: factor compares probabilities; only low_confidence",
        ),
        ({"remasking": "best"}, "remasking='best': low_confidence or random"),
        ({"seed": -1}, "seed=-1: from 0 to 2^63 - 1"),
        ({"cache": "both"}, "cache='both': none, prefix, dual or delayed"),
    ],
    ids=str,
)
def test_what_cannot_be_is_said(changes: dict[str, Any], expected: str) -> None:
    assert DiffusionOptions(**({"max_new_tokens": 48} | changes)).problems() == [expected]


def test_everything_is_said_together() -> None:
    options = DiffusionOptions(max_new_tokens=48, temperature=-1, cfg_scale=-1, block_length=20)
    assert [problem.split("=")[0] for problem in options.problems()] == ["temperature", "cfg_scale", "block_length"]


def test_blocks_and_steps_of_a_row() -> None:
    assert DiffusionOptions().problems() == []
    assert DiffusionOptions().filled_block_length(128) == 32
    assert DiffusionOptions().filled_block_length(20) == 20, "one block where 32 does not divide it"
    holes = DiffusionOptions(block_length=8)
    assert holes.problems(20) == [], "the last block of a text with holes may be shorter"
    assert (holes.num_blocks(20), holes.steps_per_block(20)) == (3, 8)
    assert DiffusionOptions(block_length=8, steps=6).steps_per_block(20) == 2
    assert DiffusionOptions(block_length=32).problems(20) == ["block_length=32: from 1 to the number of masks, 20"]


def test_which_predictions_are_kept() -> None:
    nothing = -torch.inf
    confidence = torch.tensor([[0.2, 0.95, nothing, 0.9], [0.5, nothing, 0.6, 0.4]], dtype=torch.float64)
    quota = torch.tensor([2, 1])

    def kept(**rule: Any) -> list[list[int]]:
        return [row.nonzero().squeeze(1).tolist() for row in choose(confidence, DiffusionOptions(**rule), quota)]

    assert kept() == [[1, 3], [2]]
    assert kept(threshold=0.9) == [[1, 3], [2]], "0.9 is enough, and one is always kept"
    assert kept(threshold=0.1) == [[0, 1, 3], [0, 2, 3]]
    # 2 (1 - 0.95) = 0.1, 3 (1 - 0.9) = 0.3, 4 (1 - 0.2) = 3.2; 2 (1 - 0.6) = 0.8, 3 (1 - 0.5) = 1.5
    assert kept(factor=0.31) == [[1, 3], [2]]
    assert kept(factor=1.5) == [[1, 3], [0, 2]]
    assert kept(factor=4.0) == [[0, 1, 3], [0, 2, 3]]


def test_noise_of_temperature_one_draws_from_the_model() -> None:
    """A Gumbel maximum is a draw from softmax(l / T): here from (1/10, 2/10, 7/10), and its square."""
    count = 4000
    logits = torch.tensor([[0.1, 0.2, 0.7, 0.9]]).log().expand(count, -1)
    for temperature, power in ((1.0, 1.0), (0.5, 2.0)):
        options = DiffusionOptions(temperature=temperature)
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        tokens, confidence = predict(logits, [1000, count - 1000], options, SpecialTokens(mask=3), generators)
        expected = torch.tensor([0.1, 0.2, 0.7]) ** power
        found = torch.bincount(tokens, minlength=4).float() / count
        assert found[:3].tolist() == pytest.approx((expected / expected.sum()).tolist(), abs=0.03)
        assert found[3] == 0, "the mask is never drawn"
        assert confidence.tolist() == pytest.approx(torch.tensor([0.1, 0.2, 0.7])[tokens].tolist())
        assert logits[0, 3] == pytest.approx(torch.tensor(0.9).log()), "the caller's logits stay"

"""Predictions and confidences beside torch's own argmax and softmax in fp64."""

from __future__ import annotations

import pytest
import torch

from gptoughts.inference.diffusion_options import DiffusionOptions
from gptoughts.inference.remasking import SpecialTokens, predict

SPECIAL = SpecialTokens(mask=5, eos=7, eot=9)


@pytest.mark.parametrize("defer_ends", [False, True])
@pytest.mark.parametrize("width", [100, 256])
def test_a_greedy_step_is_argmax_and_softmax(width: int, defer_ends: bool) -> None:
    logits = torch.randn(9, width, generator=torch.Generator().manual_seed(0)) * 4
    logits[0, 7] = 50.0  # an end that is sure
    logits[1, 5] = 50.0  # the mask, which is never predicted
    logits[2, 11] = logits[2, 90] = 30.0  # a tie: the first
    given = logits.clone()
    options = DiffusionOptions(32, 32, defer_ends=defer_ends)
    tokens, confidences = predict(logits, [9], options, SPECIAL, [torch.Generator()])
    exact = given.double()
    exact[:, SPECIAL.mask] = -torch.inf
    expected = exact.argmax(-1)
    if defer_ends:
        exact[:, [7, 9]] = -torch.inf
    assert torch.equal(logits, given), "they are the caller's"
    assert torch.equal(tokens, expected)
    assert tokens[2] == 11
    torch.testing.assert_close(confidences, exact.softmax(-1).gather(1, expected[:, None])[:, 0], rtol=1e-6, atol=0.0)


def test_confidences_near_one_are_told_apart() -> None:
    """In fp32 both would be 1."""
    logits = torch.zeros(2, 128)
    logits[:, 3] = torch.tensor([27.0, 26.0])
    _, confidences = predict(logits, [2], DiffusionOptions(32, 32), SpecialTokens(5), [torch.Generator()])
    lacking = (1.0 - confidences).tolist()
    assert 0 < lacking[0] < lacking[1]
    torch.testing.assert_close(lacking[1] / lacking[0], torch.e, rtol=1e-3, atol=0.0)

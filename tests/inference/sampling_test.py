"""How tokens are drawn from logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gptoughts.inference.sampling import Sampler, likeliest
from gptoughts.inference.sampling_options import SamplingOptions


def draws(logits: torch.Tensor, count: int, seen: tuple[int, ...] = (), **options: Any) -> list[int]:
    sampler = Sampler(SamplingOptions(**options))
    return [sampler.draw(logits, seen) for _ in range(count)]


def test_greedy_takes_the_largest() -> None:
    assert draws(torch.tensor([0.0, 3.0, 2.0]), 5, temperature=0) == [1] * 5


def test_temperature_and_top_k_shape_the_draws() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0])
    found = draws(logits, 400, temperature=1.0, top_k=2)
    assert set(found) == {2, 3}
    assert found.count(3) / len(found) == pytest.approx(1 / (1 + torch.e**-1.0), abs=0.08)
    assert set(draws(logits, 50, temperature=0.05)) == {3}


def test_top_p_keeps_the_smallest_set_that_holds_it() -> None:
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    assert set(draws(logits, 200, temperature=1.0, top_p=0.45)) == {1}
    assert set(draws(logits, 200, temperature=1.0, top_p=0.55)) == {1, 3}
    assert set(draws(logits, 300, temperature=1.0, top_p=0.8)) == {1, 2, 3}
    assert set(draws(logits, 300, temperature=1.0)) == {0, 1, 2, 3}


def test_min_p_compares_with_the_likeliest() -> None:
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    assert set(draws(logits, 300, temperature=1.0, min_p=0.29)) == {1, 2, 3}
    assert set(draws(logits, 300, temperature=1.0, min_p=0.49)) == {1, 3}
    assert set(draws(logits, 50, temperature=1.0, min_p=1.0)) == {1}


def test_the_order_is_temperature_then_top_p() -> None:
    """At temperature 0.5 probabilities are the squares, normalized: 0.5 becomes 0.72 of {0.5, 0.25, 0.15, 0.1}."""
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    assert set(draws(logits, 300, temperature=0.5, top_p=0.7)) == {1}
    assert set(draws(logits, 300, temperature=1.0, top_p=0.7)) == {1, 3}


def test_a_penalty_is_for_tokens_that_have_occurred() -> None:
    logits = torch.tensor([3.0, 2.9, -1.0])
    assert draws(logits, 1, seen=(0, 0), temperature=0, repetition_penalty=1.1) == [1]
    assert draws(logits, 1, seen=(0, 0), temperature=0, repetition_penalty=1.01) == [0], "once, however often seen"
    assert draws(torch.tensor([-1.0, -1.1]), 1, seen=(0,), temperature=0, repetition_penalty=1.5) == [1]


def test_the_seed_decides() -> None:
    logits = torch.zeros(1000)
    one, again, other = (draws(logits, 8, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert one == again != other
    assert len(set(one)) > 4


def test_what_cannot_be_asked_for() -> None:
    wrong = SamplingOptions(
        max_new_tokens=0, temperature=-1.0, top_k=-5, top_p=0.0, min_p=2.0, repetition_penalty=0.0, stop=("",), seed=-1
    )
    assert [problem.split("=")[0] for problem in wrong.problems()] == [
        "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop", "seed",
    ]  # fmt: skip
    assert SamplingOptions(temperature=float("nan")).problems()
    assert SamplingOptions().problems() == []


@pytest.mark.parametrize("width", [100, 256, 1280])
def test_the_likeliest_is_argmax(width: int) -> None:
    logits = torch.randn(7, width + 9, generator=torch.Generator().manual_seed(0))[:, :width]
    logits[0, 3] = logits[0, width - 1] = 9.0  # the first of equals
    logits[1] = -torch.inf
    logits[1, width // 2] = -50.0
    assert torch.equal(likeliest(logits), logits.argmax(-1))
    assert likeliest(logits)[0] == 3

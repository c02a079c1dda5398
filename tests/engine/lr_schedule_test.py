"""Learning-rate schedules at the steps where their pieces meet."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gptoughts.config.experiment import OptimConfig
from gptoughts.engine.lr_schedule import build_schedule, default_warmup_steps

OPTIM = OptimConfig(lr=1.0, min_lr_fraction=0.1, warmup_steps=10, decay_fraction=0.2)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_warmup_rises_linearly_to_the_peak(schedule: str) -> None:
    rate = build_schedule(replace(OPTIM, schedule=schedule), steps=110)
    assert [rate(step) for step in range(10)] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rate(10) == pytest.approx(1.0)


def test_cosine_is_half_way_in_the_middle_and_ends_at_the_minimum() -> None:
    rate = build_schedule(OPTIM, steps=110)
    assert rate(60) == pytest.approx(0.55)
    assert rate(110) == pytest.approx(0.1)
    assert rate(10_000) == pytest.approx(0.1)
    rates = [rate(step) for step in range(10, 111)]
    assert rates == sorted(rates, reverse=True)


def test_wsd_is_stable_then_straight() -> None:
    rate = build_schedule(replace(OPTIM, schedule="wsd"), steps=100)
    assert {rate(step) for step in range(10, 80)} == {1.0}
    assert rate(90) == pytest.approx(0.55)
    assert rate(100) == pytest.approx(0.1)


def test_constant_stays() -> None:
    rate = build_schedule(replace(OPTIM, schedule="constant"), steps=100)
    assert rate(50) == rate(500) == 1.0


def test_default_warmup() -> None:
    assert [default_warmup_steps(steps) for steps in (5, 100, 1000, 10_000, 10_000_000)] == [5, 10, 20, 200, 2000]
    rate = build_schedule(replace(OPTIM, warmup_steps=None), steps=1000)
    assert rate(19) == pytest.approx(1.0)
    assert rate(18) < 1.0


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_no_warmup_and_a_run_of_warmup_only(schedule: str) -> None:
    assert build_schedule(replace(OPTIM, schedule=schedule, warmup_steps=0), steps=10)(0) == pytest.approx(1.0)
    only_warmup = build_schedule(replace(OPTIM, schedule=schedule, warmup_steps=10), steps=10)
    assert only_warmup(9) == pytest.approx(1.0)


def test_a_missing_peak_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"optim\.lr"):
        build_schedule(OptimConfig(), steps=10)

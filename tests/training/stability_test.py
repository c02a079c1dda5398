"""What the guard sees in loss and gradient norm, and how its actions follow one another."""

from __future__ import annotations

import json
import math
import statistics

import pytest

from gptoughts.config.experiment import StabilityConfig
from gptoughts.training.recovery import merged
from gptoughts.training.stability import Guard, GuardState, robust_zscore


def guard(**options: object) -> Guard:
    return Guard(StabilityConfig(**options), GuardState())  # type: ignore[arg-type]


def feed(one: Guard, first: int, count: int, loss: float = 3.0, norm: float = 1.0) -> None:
    for step in range(first, first + count):
        one.note_applied(step, loss + 0.01 * (step % 3), norm + 0.1 * (step % 4))


def test_zscore_is_the_distance_from_the_median_in_robust_standard_deviations() -> None:
    history = [1.0, 2.0, 3.0, 4.0, 100.0]  # median 3, distances 2 1 0 1 97: MAD 1
    assert robust_zscore(6.0, history, 0.0) == pytest.approx(3.0 / 1.4826)
    assert robust_zscore(0.0, history, 0.0) == pytest.approx(-3.0 / 1.4826)
    assert robust_zscore(3.3, [3.0] * 9, 0.02) == pytest.approx(0.3 / 0.06)
    assert robust_zscore(1.0, [], 0.1) == 0.0
    assert robust_zscore(1e-9, [0.0] * 5, 0.1) == math.inf


def test_one_bad_figure_does_not_hide_the_next() -> None:
    history = [3.0 + 0.01 * (i % 5) for i in range(20)]
    assert robust_zscore(30.0, [*history, 30.0], 0.0) > 100
    assert (30.0 - statistics.mean([*history, 30.0])) / statistics.stdev([*history, 30.0]) < 5, "a plain z-score would"


@pytest.mark.parametrize(
    ("loss", "norm", "expected"),
    [
        (math.nan, 1.0, "non_finite"), (math.inf, 1.0, "non_finite"), (3.0, math.inf, "non_finite"),
        (30.0, 1.0, "loss_spike"), (3.0, 60.0, "grad_spike"), (3.1, 1.4, None), (0.1, 0.01, None),
    ],
)  # fmt: skip
def test_triggers(loss: float, norm: float, expected: str | None) -> None:
    one = guard()
    feed(one, 0, 16)
    found = one.trigger(loss, norm)
    assert (found and found[0]) == expected


def test_no_spike_before_there_is_something_to_compare_with() -> None:
    one = guard()
    feed(one, 0, 15)
    assert one.trigger(1e9, 1e9) is None
    assert one.trigger(math.nan, 1.0) == ("non_finite", None)
    feed(one, 15, 1)
    assert one.trigger(1e9, 1e9) is not None


def actions(one: Guard, step: int, count: int, trigger: str = "non_finite") -> list[str]:
    return [one.verdict(step, trigger, None).action for _ in range(count)]


def test_what_does_not_help_is_followed_by_something_stronger() -> None:
    one = guard(max_skips=2, max_rollbacks=2, max_lr_cuts=1)
    assert actions(one, 50, 10) == [
        "skip", "skip", "rollback", "skip", "skip", "rollback", "skip", "skip", "cut_lr", "skip",
    ]  # fmt: skip
    assert actions(one, 50, 2) == ["skip", "stop"]
    assert one.verdict(50, "non_finite", None).is_escalated


def test_each_trigger_has_its_own_action() -> None:
    one = guard(on_non_finite="rollback", on_loss_spike="cut_lr", on_grad_spike="stop")
    assert actions(one, 1, 1) == ["rollback"]
    assert actions(one, 1, 1, "loss_spike") == ["cut_lr"]
    assert actions(one, 1, 1, "grad_spike") == ["stop"]


def test_limits_of_zero_go_on_to_the_next_action_at_once() -> None:
    assert actions(guard(max_skips=0), 1, 1) == ["rollback"]
    assert actions(guard(max_skips=0, max_rollbacks=0), 1, 1) == ["cut_lr"]
    assert actions(guard(max_skips=0, max_rollbacks=0, max_lr_cuts=0), 1, 1) == ["stop"]


def test_an_applied_step_forgives_skips_and_calm_steps_forgive_rollbacks() -> None:
    one = guard(max_skips=1, max_rollbacks=1, calm_steps=10)
    assert actions(one, 30, 2) == ["skip", "rollback"]
    feed(one, 20, 19)  # the rollback's repeated steps, and 8 beyond the trouble: too few
    assert actions(one, 39, 2) == ["skip", "cut_lr"]
    feed(one, 30, 20)
    assert actions(one, 50, 2) == ["skip", "rollback"]


def test_overflow_in_fp16_counts_for_nothing() -> None:
    one = guard(max_skips=1)
    assert actions(one, 1, 30, "overflow") == ["skip"] * 30
    assert actions(one, 31, 1) == ["skip"]


def test_the_rate_is_cut_for_some_steps_and_a_cut_within_a_cut_multiplies() -> None:
    one = guard(lr_cut_factor=0.5, lr_cut_steps=10)
    assert one.lr_factor(0) == 1.0
    one.cut_lr(100)
    assert [one.lr_factor(step) for step in (100, 109, 110)] == [0.5, 0.5, 1.0]
    one.cut_lr(105)
    assert [one.lr_factor(step) for step in (105, 114, 115)] == [0.25, 0.25, 1.0]
    one.cut_lr(200)
    assert one.lr_factor(200) == 0.5


def test_what_it_remembers_survives_json() -> None:
    one = guard(max_skips=1)
    feed(one, 0, 100)
    actions(one, 100, 3)
    one.cut_lr(90)
    one.state.doubtful_samples = [(8, 12)]
    again = GuardState.read(json.loads(json.dumps(one.state.as_dict())) | {"of_a_later_version": 1})
    assert again == one.state
    assert len(again.losses) == StabilityConfig().window_steps


def test_ranges_are_merged() -> None:
    assert merged([(8, 12), (0, 4), (4, 6), (9, 10)]) == [(0, 6), (8, 12)]


def test_in_fp8_layers_leave_it_before_the_rate_is_cut() -> None:
    one = guard(max_skips=0, max_rollbacks=1, on_loss_spike="fallback")
    found = [one.verdict(9, "non_finite", None, can_fall_back=can).action for can in (True, True, True, False)]
    assert found == ["rollback", "fallback", "fallback", "cut_lr"]
    assert one.verdict(9, "loss_spike", 99.0, can_fall_back=True).action == "fallback"
    assert one.verdict(9, "loss_spike", 99.0).action == "cut_lr"

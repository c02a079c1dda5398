"""Any layout equals the one-rank run; tolerances and their reasons: docs/numerical_stability.md.

The gradient of step 1 is read from AdamW's first moment after it, (1 - beta1) g, as it lies in a checkpoint: so the
comparison covers what every layout writes there as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from gptoughts.checkpoint import layout as checkpoint_layout
from gptoughts.checkpoint.portable import CheckpointReader
from gptoughts.config.experiment import OptimConfig
from gptoughts.models.registry import FAMILIES
from tests.distributed import run_distributed
from tests.harness import VARIANTS, Layout, run_layout

STEPS = 20
STEP_1_LOSS_RELATIVE = 1e-6
STEP_1_GRADIENT_RELATIVE = 1e-5
LATER_LOSS_RELATIVE = 1e-4
LATER_GRAD_NORM_RELATIVE = 1e-3
LATER_WEIGHT_RELATIVE = 1e-4

LAYOUTS = [
    *(Layout(zero=zero) for zero in (1, 2, 3)),
    *(Layout(zero=zero, accumulation=4) for zero in (0, 1, 2, 3)),
    *(Layout(data=2, zero=zero) for zero in (0, 1, 2, 3)),
    *(Layout(data=2, zero=zero, accumulation=4) for zero in (1, 3)),
    *(Layout(tensor=2, zero=zero) for zero in (0, 1, 2, 3)),
    *(Layout(tensor=2, sequence=True, zero=zero) for zero in (0, 1, 3)),
    Layout(tensor=2, sequence=True, data=2, zero=3, accumulation=2),
    Layout(tensor=2, data=2, zero=1),
]
ALL_GATHER = ("--model.moe_token_dispatcher_type=allgather",)
EXPERT_LAYOUTS = [
    *(Layout(data=2, expert=2, zero=zero) for zero in (0, 1, 2, 3)),
    *(Layout(data=2, expert=2, zero=zero, extra=ALL_GATHER) for zero in (0, 1, 2, 3)),
    *(Layout(data=2, expert=2, zero=zero, accumulation=4) for zero in (0, 1, 2, 3)),
    *(Layout(data=4, expert=2, zero=zero, accumulation=2) for zero in (0, 1, 2, 3)),
    *(Layout(data=4, expert=4, zero=zero) for zero in (0, 1, 2, 3)),
    *(Layout(data=4, expert=4, zero=zero, extra=ALL_GATHER) for zero in (0, 3)),
    *(Layout(tensor=2, data=2, expert=2, zero=zero) for zero in (0, 1, 2, 3)),
    *(Layout(tensor=2, sequence=True, data=2, expert=2, zero=zero) for zero in (0, 1, 2, 3)),
    *(Layout(tensor=2, sequence=True, data=2, expert=2, zero=zero, extra=ALL_GATHER) for zero in (1, 3)),
]
"""For the families with experts."""
CORE = {
    Layout(accumulation=4),
    Layout(data=2, zero=1),
    Layout(data=2, zero=2),
    Layout(data=2, zero=3),
    Layout(data=2, zero=3, accumulation=4),
    Layout(tensor=2),
    Layout(tensor=2, sequence=True, zero=3),
    Layout(tensor=2, sequence=True, data=2, zero=3, accumulation=2),
}
"""What every family runs in `make test`: each stage and each axis with it; `gpt` runs everything there."""
CORE_OF_VARIANTS = {
    "llada-mla-moe": {Layout(data=2, zero=3)},
    "llada-moe": {Layout(tensor=2, sequence=True, zero=3)},
}
BASE_FAMILIES = ("gpt",)
EXPERT_CORE = {
    "deepseek": {
        Layout(data=2, expert=2, zero=0, extra=ALL_GATHER),
        Layout(data=2, expert=2, zero=1),
        Layout(data=2, expert=2, zero=3, accumulation=4),
        Layout(tensor=2, sequence=True, data=2, expert=2, zero=2),
    },
    "llada-moe": {Layout(data=2, expert=2, zero=3)},
    "llada-mla-moe": set(),
}
"""Families and variants with experts, and which of :data:`EXPERT_LAYOUTS` they run in `make test`."""
CASES = [
    pytest.param(
        family,
        layout,
        id=f"{family}-{layout}",
        marks=() if family in BASE_FAMILIES or layout in core else pytest.mark.slow,
    )
    for family, core in [*((name, CORE) for name in FAMILIES), *((v, CORE_OF_VARIANTS.get(v, set())) for v in VARIANTS)]
    for layout in LAYOUTS
] + [
    pytest.param(
        family,
        layout,
        id=f"{family}-{layout}{'-allgather' if layout.extra else ''}",
        marks=() if layout in core else pytest.mark.slow,
    )
    for family, core in EXPERT_CORE.items()
    for layout in EXPERT_LAYOUTS
]

Run = tuple[list[dict[str, Any]], Path]
_runs: dict[tuple[str, Layout], Run] = {}


def reference(family: str, layout: Layout, folder: Path) -> Run:
    """The run of the same model on one rank without sharding, made once."""
    one_rank = Layout(layers=layout.layers, tied=layout.tied, precision=layout.precision)
    if (family, one_rank) not in _runs:
        _runs[family, one_rank] = run_case(family, one_rank, folder / f"{family}-{len(_runs)}")
    return _runs[family, one_rank]


def run_case(family: str, layout: Layout, folder: Path) -> Run:
    histories = run_distributed(run_layout, layout.world_size, family, layout, str(folder), STEPS, (1, STEPS))
    figures = [[(r["loss"], r["grad_norm"]) for r in history] for history in histories]
    assert all(other == figures[0] for other in figures), "a step's figures differ between ranks"
    return histories[0], folder / "run"


def gradients(run: Path) -> dict[str, Tensor]:
    reader = CheckpointReader(checkpoint_layout.step_folder(run, 1))
    return {name: reader.full(name, "exp_avg") / (1 - OptimConfig.beta1) for name in reader.names()}


def weights(run: Path, step: int) -> dict[str, Tensor]:
    reader = CheckpointReader(checkpoint_layout.step_folder(run, step))
    return {name: reader.full(name) for name in reader.names()}


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))


@pytest.fixture(scope="module")
def reference_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reference")


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_layout_equals_one_rank(family: str, layout: Layout, tmp_path: Path, reference_folder: Path) -> None:
    assert_equal(run_case(family, layout, tmp_path), reference(family, layout, reference_folder))


def assert_equal(run: Run, expected_of: Run) -> None:
    """Step 1 to rounding; later steps and the final weights within what rounding grows to."""
    (found, found_run), (expected, expected_run) = run, expected_of
    assert found[0]["loss"] == pytest.approx(expected[0]["loss"], rel=STEP_1_LOSS_RELATIVE)
    there, here = gradients(expected_run), gradients(found_run)
    assert here.keys() == there.keys()
    for name, gradient in there.items():
        assert relative(here[name], gradient) <= STEP_1_GRADIENT_RELATIVE, name

    for step, (our_step, their_step) in enumerate(zip(found, expected, strict=True), start=1):
        assert our_step["loss"] == pytest.approx(their_step["loss"], rel=LATER_LOSS_RELATIVE), f"step {step}"
        assert our_step["grad_norm"] == pytest.approx(their_step["grad_norm"], rel=LATER_GRAD_NORM_RELATIVE), (
            f"step {step}"
        )
        assert our_step["applied"]
    there, here = weights(expected_run, STEPS), weights(found_run, STEPS)
    for name, weight in there.items():
        assert relative(here[name], weight) <= LATER_WEIGHT_RELATIVE, name


def test_the_reference_learns() -> None:
    for name, (history, _) in _runs.items():
        assert history[-1]["loss"] < 0.9 * history[0]["loss"], name

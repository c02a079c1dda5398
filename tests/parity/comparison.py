"""How two runs of one model are compared; tolerances and their reasons: docs/numerical_stability.md.

The gradient of step 1 is read from AdamW's first moment after it, (1 - beta1) g, as it lies in a checkpoint: so the
comparison covers what every layout writes there as well.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from gptoughts.checkpoint import layout as checkpoint_layout
from gptoughts.checkpoint.portable import CheckpointReader
from gptoughts.config.experiment import OptimConfig
from tests.distributed import run_distributed
from tests.harness import Layout, run_layout

STEPS = 20
STEP_1_LOSS_RELATIVE = 1e-6
STEP_1_GRADIENT_RELATIVE = 1e-5
LATER_LOSS_RELATIVE = 1e-4
LATER_GRAD_NORM_RELATIVE = 1e-3
LATER_WEIGHT_RELATIVE = 1e-4

Run = tuple[list[dict[str, Any]], Path]
"""Each step's figures, and the run's folder with checkpoints of steps 1 and :data:`STEPS`."""
_references: dict[tuple[str, Layout], Run] = {}


@dataclass(frozen=True)
class Errors:
    """Relative differences between two runs, each the largest that occurred."""

    step_1_loss: float
    step_1_gradient: float
    """Of a whole gradient's norm."""
    loss: float
    """Steps 2 to :data:`STEPS`."""
    grad_norm: float
    weight: float
    """Of a whole tensor's norm, after the last step."""

    def beyond(self) -> list[str]:
        """A line for each that exceeds its tolerance (or is not a number)."""
        return [
            f"{name}: {value:.2e} is more than {TOLERANCES[name]:.0e}"
            for name, value in dataclasses.asdict(self).items()
            if not value <= TOLERANCES[name]
        ]


TOLERANCES = {
    "step_1_loss": STEP_1_LOSS_RELATIVE,
    "step_1_gradient": STEP_1_GRADIENT_RELATIVE,
    "loss": LATER_LOSS_RELATIVE,
    "grad_norm": LATER_GRAD_NORM_RELATIVE,
    "weight": LATER_WEIGHT_RELATIVE,
}


def reference(family: str, layout: Layout, folder: Path) -> Run:
    """The run of the same model on one rank without sharding, made once."""
    one_rank = Layout(layers=layout.layers, tied=layout.tied, precision=layout.precision)
    if (family, one_rank) not in _references:
        _references[family, one_rank] = run_case(family, one_rank, folder / f"{family}-{len(_references)}")
    return _references[family, one_rank]


def run_case(family: str, layout: Layout, folder: Path) -> Run:
    """Train on the pool of workers; every rank has to report the same figures."""
    histories = run_distributed(run_layout, layout.world_size, family, layout, str(folder), STEPS, (1, STEPS))
    figures = [[(r["loss"], r["grad_norm"]) for r in history] for history in histories]
    assert all(other == figures[0] for other in figures), "a step's figures differ between ranks"
    return histories[0], folder / "run"


def gradients(run: Path) -> dict[str, Tensor]:
    """Whole gradients of step 1 by name."""
    reader = CheckpointReader(checkpoint_layout.step_folder(run, 1))
    return {name: reader.full(name, "exp_avg") / (1 - OptimConfig.beta1) for name in reader.names()}


def weights(run: Path, step: int) -> dict[str, Tensor]:
    """Whole weights after a step, by name."""
    reader = CheckpointReader(checkpoint_layout.step_folder(run, step))
    return {name: reader.full(name) for name in reader.names()}


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))


def measure(run: Run, expected_of: Run) -> Errors:
    """How far a run is from what is expected; names and numbers of steps have to be the same."""
    (found, found_run), (expected, expected_run) = run, expected_of
    assert len(found) == len(expected) == STEPS
    assert all(step["applied"] for step in found)
    return Errors(
        step_1_loss=_figure_error(found[:1], expected[:1], "loss"),
        step_1_gradient=_tensor_error(gradients(found_run), gradients(expected_run)),
        loss=_figure_error(found[1:], expected[1:], "loss"),
        grad_norm=_figure_error(found, expected, "grad_norm"),
        weight=_tensor_error(weights(found_run, STEPS), weights(expected_run, STEPS)),
    )


def _figure_error(found: list[dict[str, Any]], expected: list[dict[str, Any]], name: str) -> float:
    return max(abs(ours[name] - theirs[name]) / abs(theirs[name]) for ours, theirs in zip(found, expected, strict=True))


def _tensor_error(here: dict[str, Tensor], there: dict[str, Tensor]) -> float:
    assert here.keys() == there.keys()
    return max(relative(here[name], there[name]) for name in there)


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

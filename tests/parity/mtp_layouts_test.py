"""Multi-token prediction, and balance losses that are strong: any layout equals the one-rank run.

Tolerances are those of comparison. With strong balance losses affinities come so close that rounding changes a choice
within some ten steps: these are compared in their first step, where all routing is the same.

Tokens are weighted very unequally, so that microbatches and ranks have other shares of the denominator, and a mean of
means would show.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from gptoughts.objectives.base import ModelInputs
from tests.distributed import run_distributed
from tests.harness import Layout, ToyRun, step_microbatches
from tests.parity.comparison import (
    LATER_LOSS_RELATIVE,
    STEP_1_GRADIENT_RELATIVE,
    STEP_1_LOSS_RELATIVE,
    STEPS,
    Run,
    assert_equal,
    gradients,
    relative,
)
from tests.parity.layouts_test import LAYOUTS

DEPTHS = ("--model.mtp_num_layers=2",)
BALANCE = ("--model.moe_aux_loss_coeff=0.1", "--model.moe_z_loss_coeff=0.01")
CORE = {
    Layout(accumulation=4),
    Layout(data=2, zero=1),
    Layout(data=2, zero=1, expert=2),
    Layout(tensor=2, sequence=True, data=2, zero=3, accumulation=2),
}
"""What runs in `make test`."""
STAGES = [
    *(
        Layout(pipeline=2, virtual=virtual, data=data, zero=zero, accumulation=2, layers=4, tied=tied)
        for zero in (0, 1, 2, 3)
        for virtual, data, tied in ((1, 1, False), (1, 2, True), (2, 1, True), (2, 2, False))
    ),
    Layout(pipeline=4, zero=1, accumulation=4, layers=4),
    Layout(pipeline=2, tensor=2, sequence=True, zero=3, accumulation=2, layers=2, tied=True),
    Layout(pipeline=2, tensor=2, zero=2, accumulation=2, layers=2),
    Layout(pipeline=2, data=2, expert=2, zero=1, accumulation=2, layers=4),
]
"""The depths are on the last stage, and look tokens up in a copy of the first one's embedding."""
CORE |= {
    Layout(pipeline=2, virtual=2, data=1, zero=1, accumulation=2, layers=4, tied=True),
    Layout(pipeline=2, data=1, zero=3, accumulation=2, layers=4),
}
CASES = [
    pytest.param(layout, id=str(layout), marks=() if layout in CORE else pytest.mark.slow)
    for layout in [*LAYOUTS, *STAGES]
]
BALANCE_LAYOUTS = [Layout(accumulation=4), Layout(data=2, zero=2), Layout(tensor=2, sequence=True, zero=1)]


def weighted(inputs: ModelInputs) -> ModelInputs:
    """Weights 0, 1 and 2, a function of each row's tokens: from few to nearly all of a row."""
    share = inputs.input_ids.sum(1, keepdim=True) % 9 + 1
    weights = (inputs.input_ids * 31 % 10 < share).float() * (1 + inputs.input_ids % 2)
    return dataclasses.replace(inputs, loss_weights=weights, denominator=weights.double().sum())


def run_weighted(layout: Layout, folder: str, steps: int) -> list[dict[str, Any]]:
    run = ToyRun("deepseek", layout, Path(folder), steps=STEPS)
    history = []
    for step in range(steps):
        batches = [weighted(inputs) for inputs in step_microbatches(run.experiment, run.objective, step, run.data_rank)]
        result = run.engine.train_step(batches, lr=run.learning_rate(step), flags={})
        history.append({**dataclasses.asdict(result), "loss": result.loss})
        run.step += 1
        if run.step in (1, STEPS):
            run.save()
    run.close()
    return history


def run_case(layout: Layout, options: tuple[str, ...], folder: Path, steps: int = STEPS) -> Run:
    layout = dataclasses.replace(layout, extra=(*layout.extra, *options))
    histories = run_distributed(run_weighted, layout.world_size, layout, str(folder), steps)
    assert all(history == histories[0] for history in histories), "a step's figures differ between ranks"
    return histories[0], folder / "run"


_references: dict[Layout, Run] = {}


@pytest.fixture(scope="module")
def reference_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("one_rank")


def one_rank_run(layout: Layout, folder: Path) -> Run:
    """Of the same model, made once."""
    one_rank = Layout(layers=layout.layers, tied=layout.tied)
    if one_rank not in _references:
        _references[one_rank] = run_case(one_rank, DEPTHS, folder / f"{one_rank}-{one_rank.layers}")
    return _references[one_rank]


@pytest.mark.parametrize("layout", CASES)
def test_layout_equals_one_rank(layout: Layout, tmp_path: Path, reference_folder: Path) -> None:
    found, one_rank = run_case(layout, DEPTHS, tmp_path), one_rank_run(layout, reference_folder)
    assert_equal(found, one_rank)
    for step, (ours, theirs) in enumerate(zip(found[0], one_rank[0], strict=True), start=1):
        tolerance = STEP_1_LOSS_RELATIVE if step == 1 else LATER_LOSS_RELATIVE
        for name in ("mtp_1_loss_sum", "mtp_1_weight_sum", "mtp_2_loss_sum", "mtp_2_weight_sum"):
            assert ours["extras"][name] == pytest.approx(theirs["extras"][name], rel=tolerance), (step, name)
        assert ours["figures"].keys() == theirs["figures"].keys()
    last = layout.layers + 1
    assert f"layer_{last}_expert_load_entropy" in theirs["figures"], "the decoder's layers and two depths"


@pytest.fixture(scope="module")
def balanced(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One rank's first step, whose router learns more from the balance losses than from the main one."""
    runs = [
        run_case(Layout(), options, tmp_path_factory.mktemp("balanced"), 1)
        for options in (BALANCE, ("--model.moe_aux_loss_coeff=0",))
    ]
    router = "decoder.layers.1.mlp.router.weight"
    with_losses, without = (gradients(folder)[router] for _, folder in runs)
    assert relative(with_losses, without) > 1
    return runs[0]


@pytest.mark.parametrize("layout", BALANCE_LAYOUTS, ids=str)
def test_balance_losses_are_means_over_all_sequences(layout: Layout, tmp_path: Path, balanced: Run) -> None:
    found, run = run_case(layout, BALANCE, tmp_path, 1)
    assert found[0]["loss"] == pytest.approx(balanced[0][0]["loss"], rel=STEP_1_LOSS_RELATIVE)
    here, there = gradients(run), gradients(balanced[1])
    for name, gradient in there.items():
        assert relative(here[name], gradient) <= STEP_1_GRADIENT_RELATIVE, name

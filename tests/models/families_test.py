"""What every family in the registry owes: a new one is tested by its registry line alone."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch

from gptoughts.models.flops import count_parameters
from gptoughts.models.registry import FAMILIES
from tests.distributed import run_distributed
from tests.golden import curve
from tests.harness import VARIANTS, Layout, ToyRun, run_layout, step_microbatches

FAST = ("--optim.lr=3e-3", "--optim.eps=1e-8")
OVERFIT_STEPS = 150
OVERFIT_GOAL = 0.1


def count_built_parameters(family: str, folder: str) -> tuple[int, int]:
    run = ToyRun(family, Layout(), Path(folder))
    config = run.experiment.config
    built = sum(parameter.numel() for parameter in run.parameters.values())
    run.close()
    return built, count_parameters(FAMILIES[config.model_type], config.model).total


@pytest.mark.parametrize("family", [*FAMILIES, *VARIANTS])
def test_builds_with_the_number_of_parameters_that_flops_says(family: str, tmp_path: Path) -> None:
    ((built, counted),) = run_distributed(count_built_parameters, 1, family, str(tmp_path))
    assert built == counted


def overfit_one_batch(family: str, folder: str) -> list[float]:
    """Losses until the goal, of a batch whose noise (if its objective has any) stays the same."""
    run = ToyRun(family, Layout(extra=FAST), Path(folder), steps=OVERFIT_STEPS)
    batch = step_microbatches(run.experiment, run.objective, 0, 0)
    losses: list[float] = []
    while len(losses) < OVERFIT_STEPS and (not losses or losses[-1] >= OVERFIT_GOAL):
        losses.append(run.engine.train_step(batch, lr=run.learning_rate(len(losses)), flags={}).loss)
    run.close()
    return losses


@pytest.mark.parametrize("family", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS)])
def test_overfits_one_batch(family: str, tmp_path: Path) -> None:
    (losses,) = run_distributed(overfit_one_batch, 1, family, str(tmp_path))
    assert losses[0] > 5.0, "ln 256 = 5.5 is where an untrained byte model starts"
    assert losses[-1] < OVERFIT_GOAL


def resume_in_the_middle(family: str, layout: Layout, folder: str) -> tuple[list[Any], list[Any], bool]:
    """Six steps in one go; then three, save, a new engine, three more: (losses, losses, weights equal)."""
    whole = ToyRun(family, layout, Path(folder) / "whole")
    expected = [(result.loss, result.grad_norm) for result in whole.train(6)]
    final = {(f.name, f.kind): f.tensor.clone() for f in whole.engine.state_fragments()}
    whole.close()
    first = ToyRun(family, layout, Path(folder) / "halves")
    found = [(result.loss, result.grad_norm) for result in first.train(3)]
    first.save()
    first.close()
    torch.manual_seed(999)  # whatever the generators are at, the checkpoint decides
    second = ToyRun(family, layout, Path(folder) / "halves")
    second.resume()
    found += [(result.loss, result.grad_norm) for result in second.train(3)]
    is_equal = all(torch.equal(f.tensor, final[f.name, f.kind]) for f in second.engine.state_fragments())
    second.close()
    return expected, found, is_equal


EXPERT_FAMILIES = [n for n, family in FAMILIES.items() if family.presets["debug"].model.expert_parallel_divisors()]
DROPOUT = ("--model.hidden_dropout=0.1", "--model.attention_dropout=0.1")
RESUMES = [
    Layout(extra=DROPOUT),
    Layout(zero=3, precision="bf16", extra=DROPOUT),
    Layout(data=2, zero=1, precision="bf16", accumulation=2),
    Layout(data=2, zero=3, extra=DROPOUT),
    Layout(tensor=2, sequence=True, zero=2, extra=DROPOUT),
]


EXPERT_RESUMES = [
    Layout(data=2, expert=2, zero=3, precision="bf16"),
    Layout(data=2, expert=2, zero=0, precision="bf16", accumulation=2),
    Layout(data=4, expert=2, zero=1, precision="bf16"),
    Layout(tensor=2, sequence=True, data=2, expert=2, zero=2, extra=DROPOUT),
]
CASES = [
    *((family, layout) for family in FAMILIES for layout in RESUMES),
    ("llada-mla-moe", RESUMES[-1]),
    *(pytest.param(name, layout, marks=pytest.mark.slow) for name in VARIANTS for layout in RESUMES[:-1]),
    *((family, EXPERT_RESUMES[0]) for family in EXPERT_FAMILIES),
    *(pytest.param(name, layout, marks=pytest.mark.slow) for name in EXPERT_FAMILIES for layout in EXPERT_RESUMES[1:]),
]


@pytest.mark.parametrize(("family", "layout"), CASES, ids=str)
def test_save_and_resume_is_bitwise_equal(family: str, layout: Layout, tmp_path: Path) -> None:
    for expected, found, is_equal in run_distributed(
        resume_in_the_middle, layout.world_size, family, layout, str(tmp_path)
    ):
        assert found == expected
        assert is_equal


@pytest.mark.parametrize("family", FAMILIES)
def test_golden_curve(family: str, tmp_path: Path) -> None:
    golden = json.loads(curve.golden_file(family).read_text())["losses"]
    (history,) = run_distributed(run_layout, 1, family, Layout(), str(tmp_path), curve.STEPS, ())
    losses = [step["loss"] for step in history]
    assert losses[:10] == pytest.approx(golden[:10], rel=1e-4)
    assert mean(losses[90:]) == pytest.approx(mean(golden[90:]), rel=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_runs_in_one_place_are_equal_to_the_bit(family: str, tmp_path: Path) -> None:
    layout = Layout(extra=DROPOUT)
    runs = [run_distributed(run_layout, 1, family, layout, str(tmp_path / name), 5, ()) for name in ("a", "b")]
    assert runs[0] == runs[1]

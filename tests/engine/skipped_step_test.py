"""A step whose gradients are not finite leaves a model with experts as it was: weights, moments and routers' biases."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from tests.distributed import run_distributed
from tests.harness import Layout, ToyRun, step_microbatches


def poisoned_step(layout: Layout, folder: str) -> tuple[list[bool], list[str], bool, bool]:
    """Three steps, the second with a NaN weight on the last rank: (applied, what it changed, bias before, after)."""
    run = ToyRun("deepseek", layout, Path(folder))

    def state() -> dict[tuple[str, str], torch.Tensor]:
        return {(f.name, f.kind): f.tensor.clone() for f in run.engine.state_fragments()}

    def biases() -> torch.Tensor:
        return torch.cat([tensor for (_, kind), tensor in sorted(state().items()) if kind == "buffer"])

    applied, changed, moved = [], [], []
    for step in range(3):
        batches = step_microbatches(run.experiment, run.objective, step, run.data_rank)
        if step == 1 and torch.distributed.get_rank() == layout.world_size - 1:
            weights = batches[-1].loss_weights.clone()
            weights[0, 5] = torch.nan
            batches[-1] = dataclasses.replace(batches[-1], loss_weights=weights)
        before, bias = state(), biases()
        applied.append(run.engine.train_step(batches, lr=1e-3, flags={}).applied)
        moved.append(not torch.equal(bias, biases()))
        if step == 1:
            after = state()
            changed = [" of ".join(reversed(key)) for key, t in before.items() if not torch.equal(t, after[key])]
    run.close()
    return applied, changed, moved[0], moved[2]


@pytest.mark.parametrize(
    "layout",
    [
        Layout(extra=("--model.mtp_num_layers=1",)),
        Layout(data=2, zero=3, accumulation=2, extra=("--model.mtp_num_layers=1",)),
        Layout(tensor=2, zero=1),
    ],
    ids=str,
)
def test_a_skipped_step_moves_nothing(layout: Layout, tmp_path: Path) -> None:
    for applied, changed, moved_before, moved_after in run_distributed(
        poisoned_step, layout.world_size, layout, str(tmp_path)
    ):
        assert applied == [True, False, True]
        assert changed == []
        assert moved_before
        assert moved_after

"""Expert parallelism beyond a plain run: idle experts, clipping, skipped steps, and checkpoints for other layouts."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from gptoughts.checkpoint import layout as checkpoint_layout
from gptoughts.checkpoint.portable import CheckpointReader
from tests.distributed import run_distributed
from tests.harness import Layout, ToyRun
from tests.parity.comparison import (
    LATER_GRAD_NORM_RELATIVE,
    LATER_LOSS_RELATIVE,
    STEP_1_LOSS_RELATIVE,
    relative,
)

STEPS = 6
FAMILY = "deepseek"
ALL_GATHER = ("--model.moe_token_dispatcher_type=allgather",)
# A bias rate of 0 keeps the choice where the test puts it.
TO_TWO_EXPERTS = ("--model.moe_router_bias_update_rate=0",)
WEIGHT_RELATIVE = 1e-5
"""Of a whole tensor's norm, after a few steps from equal weights."""


def send_all_tokens_to(run: ToyRun, experts: tuple[int, ...]) -> None:
    from gptoughts.models.expert_load import expert_routers

    for chunk in run.engine.chunks:
        for router in expert_routers(chunk).values():
            assert router.expert_bias is not None
            router.expert_bias[list(experts)] = 100.0


def train(layout: Layout, folder: str, experts: tuple[int, ...] = ()) -> list[tuple[float, float]]:
    run = ToyRun(FAMILY, layout, Path(folder), steps=20)
    if experts:
        send_all_tokens_to(run, experts)
    figures = [(result.loss, result.grad_norm) for result in run.train(STEPS)]
    run.save()
    run.close()
    return figures


def assert_equal_runs(
    folder: Path, layout: Layout, *arguments: Any, extra: tuple[str, ...] = ()
) -> list[tuple[float, float]]:
    """The layout's run (with ``extra`` flags) equals the one-rank run: figures of each step, which are returned, and
    whole weights after the last."""
    one_rank = Layout(extra=layout.extra)
    (expected,) = run_distributed(train, 1, one_rank, str(folder / "one"), *arguments)
    layout = dataclasses.replace(layout, extra=layout.extra + extra)
    found = run_distributed(train, layout.world_size, layout, str(folder / "many"), *arguments)
    assert all(rank == found[0] for rank in found)
    for step, ((loss, norm), (expected_loss, expected_norm)) in enumerate(zip(found[0], expected, strict=True), 1):
        tolerance = STEP_1_LOSS_RELATIVE if step == 1 else LATER_LOSS_RELATIVE
        assert loss == pytest.approx(expected_loss, rel=tolerance), step
        assert norm == pytest.approx(expected_norm, rel=LATER_GRAD_NORM_RELATIVE), step
    there, here = reader(folder / "one"), reader(folder / "many")
    for name in there.names():
        assert relative(here.full(name), there.full(name)) <= WEIGHT_RELATIVE, name
    return expected


def reader(folder: Path, step: int = STEPS) -> CheckpointReader:
    return CheckpointReader(checkpoint_layout.step_folder(folder / "run", step))


@pytest.mark.parametrize(
    "layout",
    [
        Layout(data=2, expert=2, zero=3, accumulation=2),
        Layout(data=2, expert=2, zero=1, extra=ALL_GATHER),
        pytest.param(Layout(data=4, expert=4, zero=3), marks=pytest.mark.slow),
        pytest.param(Layout(data=4, expert=2, zero=2, extra=ALL_GATHER), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_ranks_whose_experts_nobody_chooses(layout: Layout, tmp_path: Path) -> None:
    layout = dataclasses.replace(layout, extra=layout.extra + TO_TWO_EXPERTS)
    assert_equal_runs(tmp_path, layout, (0, 1))


@pytest.mark.parametrize("zero", [0, pytest.param(1, marks=pytest.mark.slow), 2, 3])
def test_clipping_by_the_norm_over_all_experts(zero: int, tmp_path: Path) -> None:
    figures = assert_equal_runs(tmp_path, Layout(data=2, expert=2, zero=zero, extra=("--grad_clip=0.1",)))
    assert all(norm > 0.2 for _, norm in figures), "nothing was clipped"


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_the_optimizer_may_live_on_the_cpu(zero: int, tmp_path: Path) -> None:
    config = tmp_path / "ds.json"
    block = {"stage": zero, "offload_optimizer": {"device": "cpu"}}
    config.write_text(json.dumps({"zero_optimization": block, "bf16": {"enabled": False}}))
    offloaded = (f"--deepspeed_config={config}",)
    assert_equal_runs(tmp_path, Layout(data=2, expert=2, accumulation=2), extra=offloaded)


def skip_a_step(layout: Layout, folder: str) -> tuple[list[bool], list[float], bool]:
    """A gradient that is not a number, of one expert on one rank, in the second of three steps."""
    run = ToyRun(FAMILY, layout, Path(folder))
    name = next(name for name in run.parameters if name.endswith("linear_fc2_weight"))
    is_broken = False

    def break_it(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * math.nan if is_broken and torch.distributed.get_rank() == 1 else gradient

    run.parameters[name].register_hook(break_it)
    applied, norms, before = [], [], {}
    for step in range(3):
        is_broken = step == 1
        if is_broken:
            before = {(f.name, f.kind): f.tensor.clone() for f in run.engine.state_fragments()}
        (result,) = run.train(1)
        applied.append(result.applied)
        norms.append(result.grad_norm)
        if is_broken:
            is_kept = all(torch.equal(f.tensor, before[f.name, f.kind]) for f in run.engine.state_fragments())
    run.close()
    return applied, norms, is_kept


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_every_rank_skips_where_one_expert_is_not_finite(zero: int, tmp_path: Path) -> None:
    for applied, norms, is_kept in run_distributed(skip_a_step, 2, Layout(data=2, expert=2, zero=zero), str(tmp_path)):
        assert applied == [True, False, True]
        assert math.isinf(norms[1])
        assert is_kept


def save_after_three(layout: Layout, folder: str) -> list[float]:
    run = ToyRun(FAMILY, layout, Path(folder))
    losses = []
    for result in run.train(STEPS):
        losses.append(result.loss)
        if run.step == 3:
            run.save()
    run.close()
    return losses


def resume(layout: Layout, folder: str, copy: str) -> list[float]:
    """Go on from the other layout's checkpoint; what was loaded is saved again, under ``copy``."""
    run = ToyRun(FAMILY, layout, Path(folder))
    run.resume()
    dataclasses.replace(run.manager, run=Path(copy) / "run").save(run.engine, {"step": run.step})
    losses = [result.loss for result in run.train(STEPS - 3)]
    run.close()
    return losses


@pytest.mark.parametrize(
    ("saved", "resumed"),
    [
        (Layout(data=2, expert=2, zero=3), Layout(zero=1)),
        (Layout(), Layout(data=2, expert=2, zero=2)),
        pytest.param(Layout(data=2, expert=2, zero=1), Layout(data=4, expert=4, zero=3), marks=pytest.mark.slow),
        pytest.param(Layout(data=4, expert=2, zero=0), Layout(data=2, tensor=2, expert=2), marks=pytest.mark.slow),
        pytest.param(
            Layout(tensor=2, data=2, expert=2, zero=3), Layout(data=4, expert=4, zero=1), marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_a_checkpoint_fits_any_number_of_expert_ranks(saved: Layout, resumed: Layout, tmp_path: Path) -> None:
    expected = run_distributed(save_after_three, saved.world_size, saved, str(tmp_path))[0]
    found = run_distributed(resume, resumed.world_size, resumed, str(tmp_path), str(tmp_path / "copy"))[0]
    there, here = reader(tmp_path, 3), reader(tmp_path / "copy", 3)
    for kind in ("weight", "exp_avg", "exp_avg_sq", "buffer"):
        assert here.names(kind) == there.names(kind)
        for name in there.names(kind):
            assert torch.equal(here.full(name, kind), there.full(name, kind)), (name, kind)
    assert found == pytest.approx(expected[3:], rel=LATER_LOSS_RELATIVE)

"""What a step does besides learning: skips, refusals, evaluation, monitors, offload, memory at construction."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from gptoughts.config.experiment import OptimConfig, ParallelConfig
from tests.distributed import run_distributed
from tests.engine.toys import ROWS, ToyBatch, build_toy_engine, toy_batch, zero_json

OPTIM = OptimConfig(lr=1e-2)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _engine(config: dict[str, Any], dtype: str = "fp32") -> Any:
    from gptoughts.parallel import groups

    groups.initialize(ParallelConfig(), seed=1)
    return build_toy_engine(config, OPTIM, DTYPES[dtype])


def _state(engine: Any) -> list[torch.Tensor]:
    return [fragment.tensor.clone() for fragment in engine.state_fragments()]


def _poisoned_step(stage: int, dtype: str, clip: float) -> tuple[Any, bool, bool, int]:
    """A step whose last rank's microbatch has an infinite target between two good ones."""
    engine = _engine(zero_json(stage, dtype=dtype, clip=clip), dtype)
    assert engine.train_step([toy_batch(0)], lr=1e-2).applied
    before = _state(engine)
    batch = toy_batch(5)
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        batch = ToyBatch(batch.inputs, torch.full_like(batch.targets, math.inf), batch.weights)
    poisoned = engine.train_step([toy_batch(1), batch], lr=1e-2)
    is_untouched = all(torch.equal(a, b) for a, b in zip(before, _state(engine), strict=True))
    good = engine.train_step([toy_batch(2)], lr=1e-2)
    steps = engine.scalar_state()["optimizer_steps"]
    engine.close()
    return poisoned, is_untouched, good.applied and math.isfinite(good.grad_norm), steps


@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_non_finite_gradients_are_skipped_on_all_ranks(stage: int, dtype: str, clip: float) -> None:
    for poisoned, is_untouched, is_good_afterwards, steps in run_distributed(_poisoned_step, 2, stage, dtype, clip):
        assert not poisoned.applied
        assert poisoned.grad_norm == math.inf
        assert is_untouched
        assert is_good_afterwards
        assert steps == 2


def _step_without_weight(stage: int) -> str:
    from gptoughts.errors import DataError

    engine = _engine(zero_json(stage))
    batch = toy_batch(0)
    with pytest.raises(DataError, match="no token to learn from") as refused:
        engine.train_step([ToyBatch(batch.inputs, batch.targets, torch.zeros(ROWS))], lr=1e-2)
    engine.close()
    return str(refused.value)


def test_a_step_without_targets_is_refused() -> None:
    run_distributed(_step_without_weight, 1, 0)


def _evaluate(stage: int) -> tuple[float, float, bool]:
    engine = _engine(zero_json(stage))
    rank = torch.distributed.get_rank()
    before = _state(engine)
    first = engine.eval_step([toy_batch(rank), toy_batch(2 + rank)])
    trained = engine.train_step([toy_batch(rank), toy_batch(2 + rank)], lr=0.0)
    second = engine.eval_step([toy_batch(rank), toy_batch(2 + rank)])
    assert first.loss == second.loss
    assert not first.applied
    weights = [f.tensor for f in engine.state_fragments() if f.kind == "weight"]
    old = [t for t, f in zip(before, engine.state_fragments(), strict=True) if f.kind == "weight"]
    is_untouched = all(torch.equal(a, b) for a, b in zip(old, weights, strict=True))
    engine.close()
    return first.loss, trained.loss, is_untouched


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_evaluation_gives_the_training_loss_and_changes_nothing(stage: int) -> None:
    for evaluated, trained, is_untouched in run_distributed(_evaluate, 2, stage):
        assert evaluated == pytest.approx(trained, rel=1e-6)
        assert is_untouched


def _write_monitor(folder: str) -> None:
    config = zero_json(1)
    config["csv_monitor"] = {"enabled": True, "output_path": folder, "job_name": "run"}
    engine = _engine(config)
    for step in (10, 20):
        engine.train_step([toy_batch(step)], lr=1e-2)
        engine.monitor_events([("train/loss", 1.0 / step, step)])
    engine.close()


def test_monitors_show_our_step(tmp_path: Path) -> None:
    run_distributed(_write_monitor, 1, str(tmp_path))
    (file,) = (tmp_path / "run").glob("*loss*.csv")
    rows = list(csv.reader(file.open()))
    assert [[int(row[0]), float(row[1])] for row in rows[1:]] == [[10, 0.1], [20, 0.05]]
    assert [path.name for path in (tmp_path / "run").iterdir()] == [file.name]


def _offloaded(stage: int) -> list[float]:
    engine = _engine(zero_json(stage, dtype="bf16", offload_optimizer={"device": "cpu"}), "bf16")
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    losses = []
    for step in range(4):
        batches = [toy_batch((step * 2 + m) * size + rank) for m in range(2)]
        losses.append(engine.train_step(batches, lr=1e-2).loss)
    assert {f.kind for f in engine.state_fragments()} == {"weight", "exp_avg", "exp_avg_sq"}
    assert engine.scalar_state()["optimizer_steps"] == 4
    engine.close()
    return losses


def _not_offloaded(stage: int) -> list[float]:
    engine = _engine(zero_json(stage, dtype="bf16"), "bf16")
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    losses = []
    for step in range(4):
        batches = [toy_batch((step * 2 + m) * size + rank) for m in range(2)]
        losses.append(engine.train_step(batches, lr=1e-2).loss)
    engine.close()
    return losses


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offload_learns_the_same(stage: int) -> None:
    expected = run_distributed(_not_offloaded, 2, stage)[0]
    for losses in run_distributed(_offloaded, 2, stage):
        assert losses == pytest.approx(expected, rel=2e-2)

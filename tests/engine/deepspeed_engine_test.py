"""The engine against a plain torch loop: every ZeRO stage, data parallelism, accumulation, unequal denominators."""

from __future__ import annotations

import pytest
import torch

from gptoughts.config.experiment import OptimConfig, ParallelConfig
from tests.distributed import run_distributed
from tests.engine.toys import build_toy_engine, reference_run, toy_batch, zero_json

OPTIM = OptimConfig(lr=1e-2, eps=1e-4)
LR = 1e-2
CLIP = 0.5
STEPS = 6
PER_STEP = 4
"""Microbatches of a step over all ranks."""


def _initialize() -> None:
    from gptoughts.parallel import groups

    groups.initialize(ParallelConfig(), seed=1)


def _train(stage: int, dtype: str, accumulation: int) -> list[tuple[float, float, float, float]]:
    """(loss, norm, rows, flag) of every step on this rank."""
    _initialize()
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch_dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
    engine = build_toy_engine(zero_json(stage, dtype=dtype, clip=CLIP), OPTIM, torch_dtype)
    history = []
    for step in range(STEPS):
        first = step * accumulation * size
        batches = [toy_batch(first + m * size + rank) for m in range(accumulation)]
        result = engine.train_step(batches, lr=LR, flags={"stop": float(rank)})
        assert result.applied
        history.append((result.loss, result.grad_norm, result.extras["rows"], result.flags["stop"]))
    engine.close()
    return history


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_fp32_equals_a_plain_loop(stage: int, world_size: int, accumulation: int) -> None:
    expected = reference_run(OPTIM, LR, CLIP, STEPS, world_size * accumulation)
    assert any(norm > CLIP for _, norm in expected)
    for history in run_distributed(_train, world_size, stage, "fp32", accumulation):
        for (loss, norm, _, flag), (expected_loss, expected_norm) in zip(history, expected, strict=True):
            assert loss == pytest.approx(expected_loss, rel=1e-5)
            assert norm == pytest.approx(expected_norm, rel=1e-4)
            assert flag == sum(range(world_size))


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_keeps_fp32_masters(stage: int, world_size: int) -> None:
    expected = reference_run(OPTIM, LR, CLIP, STEPS, world_size * 4)
    for history in run_distributed(_train, world_size, stage, "bf16", 4):
        for (loss, norm, _, _), (expected_loss, expected_norm) in zip(history, expected, strict=True):
            assert loss == pytest.approx(expected_loss, rel=2e-2)
            assert norm == pytest.approx(expected_norm, rel=5e-2)

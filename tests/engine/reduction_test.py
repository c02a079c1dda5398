"""How gradients are reduced where the JSON leaves it open: by what costs least here, and with the same result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from gptoughts.config.experiment import OptimConfig, ParallelConfig
from tests.distributed import run_distributed
from tests.engine.toys import build_toy_engine, toy_batch, zero_json

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _train(stage: int, dtype: str, zero: dict[str, Any]) -> tuple[list[torch.Tensor], list[float], bool]:
    """State and figures after three steps, and whether DeepSpeed reduce-scatters."""
    from gptoughts.parallel import groups

    groups.initialize(ParallelConfig(), seed=1)
    engine = build_toy_engine(zero_json(stage, dtype=dtype, **zero), OptimConfig(lr=1e-2), DTYPES[dtype])
    rank = dist.get_rank()
    figures = []
    for _ in range(3):
        result = engine.train_step([toy_batch(rank), toy_batch(2 + rank)], lr=1e-2)
        figures += [result.loss_sum, result.grad_norm]
    state = [fragment.tensor.clone() for fragment in engine.state_fragments()]
    is_scattered = engine.deepspeed.optimizer.reduce_scatter
    engine.close()
    return state, figures, is_scattered


@pytest.mark.parametrize(("stage", "dtype"), [(1, "bf16"), (2, "fp32"), (3, "bf16")])
def test_both_ways_give_the_same(stage: int, dtype: str) -> None:
    # Two ranks: a sum of two has one order, and halves are exact.
    left_open = run_distributed(_train, 2, stage, dtype, {})
    scattered = run_distributed(_train, 2, stage, dtype, {"reduce_scatter": True})
    for (state, figures, is_scattered), (expected, expected_figures, is_asked) in zip(
        left_open, scattered, strict=True
    ):
        assert is_asked
        assert not is_scattered
        assert figures == expected_figures
        assert all(torch.equal(a, b) for a, b in zip(state, expected, strict=True))


def _is_scattered(zero: dict[str, Any]) -> bool:
    return _train(2, "fp32", zero)[2]


def test_offload_keeps_deepspeeds_own_way() -> None:
    assert run_distributed(_is_scattered, 1, {"offload_optimizer": {"device": "cpu"}}) == [True]

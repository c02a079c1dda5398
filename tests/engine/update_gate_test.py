"""A refused update leaves everything as it was, at every ZeRO stage, and the judge sees what is reported."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from gptoughts.config.experiment import OptimConfig, ParallelConfig
from tests.distributed import run_distributed
from tests.engine.toys import ToyBatch, build_toy_engine, toy_batch, zero_json

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


def _engine(config: dict[str, Any], dtype: str) -> Any:
    from gptoughts.parallel import groups

    groups.initialize(ParallelConfig(), seed=1)
    return build_toy_engine(config, OptimConfig(lr=1e-2), DTYPES[dtype])


def _state(engine: Any) -> list[torch.Tensor]:
    return [fragment.tensor.clone() for fragment in engine.state_fragments()]


def _refuse_one(stage: int, dtype: str, zero: dict[str, Any]) -> dict[str, Any]:
    """Four steps on the same batches as an undisturbed engine's three, one refused in between."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def batches(step: int) -> list[Any]:
        return [toy_batch((step * 2 + m) * size + rank) for m in range(2)]

    engine = _engine(zero_json(stage, dtype=dtype, **zero), dtype)
    plain = [engine.train_step(batches(step), lr=1e-2) for step in (0, 1, 3)]
    expected = _state(engine)
    engine.close()

    engine = _engine(zero_json(stage, dtype=dtype, **zero), dtype)
    seen: list[tuple[float, float]] = []
    untouched = []

    def judge(loss: float, norm: float) -> bool:
        seen.append((loss, norm))
        before.extend(_state(engine))
        return len(seen) != 3

    results = []
    for step in range(4):
        before: list[torch.Tensor] = []
        results.append(engine.train_step(batches(step), lr=1e-2, judge=judge))
        untouched.append(all(torch.equal(a, b) for a, b in zip(before, _state(engine), strict=True)))
    found = {
        "applied": [result.applied for result in results],
        "refused": [result.is_refused for result in results],
        "untouched": untouched,
        "figures": [(result.loss, result.grad_norm) for result in results],
        "seen": seen,
        "plain": [(result.loss, result.grad_norm) for result in plain],
        "equal": all(torch.equal(a, b) for a, b in zip(expected, _state(engine), strict=True)),
        "steps": engine.scalar_state()["optimizer_steps"],
    }
    engine.close()
    return found


@pytest.mark.parametrize(
    ("stage", "dtype", "zero"),
    [
        *[(stage, dtype, {}) for stage in range(4) for dtype in ("fp32", "bf16")],
        *[(stage, "bf16", OFFLOAD) for stage in (1, 2, 3)],
    ],
)
def test_a_refused_update_leaves_no_trace(stage: int, dtype: str, zero: dict[str, Any]) -> None:
    ranks = run_distributed(_refuse_one, 2, stage, dtype, zero)
    for found in ranks:
        assert found["applied"] == [True, True, False, True]
        assert found["refused"] == [False, False, True, False]
        assert found["untouched"] == [False, False, True, False]
        assert found["figures"] == found["seen"] == ranks[0]["seen"], "what is judged is what is reported, on all ranks"
        assert all(math.isfinite(norm) for _, norm in found["seen"])
        assert [found["figures"][i] for i in (0, 1, 3)] == found["plain"]
        assert found["equal"], "as if the refused step had never been"
        assert found["steps"] == 3


def _poison_one(stage: int) -> tuple[list[bool], list[float], bool]:
    """Gradient norms of three steps, of which the second has an infinite target, and what the third should have."""
    rank = torch.distributed.get_rank()
    runs = []
    for steps in ((0, 1, 2), (0, 2)):
        engine = _engine(zero_json(stage, dtype="bf16", **OFFLOAD), "bf16")
        results = []
        for step in steps:
            batch = toy_batch(2 * step + rank)
            if step == 1:
                batch = ToyBatch(batch.inputs, torch.full_like(batch.targets, math.inf), batch.weights)
            results.append(engine.train_step([batch], lr=1e-2))
        runs.append((results, _state(engine)))
        engine.close()
    (poisoned, state), (_, expected) = runs
    is_equal = all(torch.equal(a, b) for a, b in zip(state, expected, strict=True))
    return [result.applied for result in poisoned], [result.grad_norm for result in poisoned], is_equal


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_with_offload_non_finite_gradients_do_not_stay(stage: int) -> None:
    for applied, norms, is_equal in run_distributed(_poison_one, 2, stage):
        assert applied == [True, False, True]
        assert math.isfinite(norms[2])
        assert is_equal

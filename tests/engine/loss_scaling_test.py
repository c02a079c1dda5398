"""fp16's dynamic loss scale at every ZeRO stage: what moves it, what does not, and that it is saved.

DeepSpeed says of a CPU that it has no fp16; that answer is patched here. torch multiplies halves on a CPU, so forward,
backward and update are real. Not run: fp16 on a GPU.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from gptoughts.config.experiment import OptimConfig, ParallelConfig
from tests.distributed import run_distributed
from tests.engine.toys import ToyBatch, build_toy_engine, toy_batch, zero_json


def _engine(stage: int) -> Any:
    from gptoughts.parallel import groups

    groups.initialize(ParallelConfig(), seed=1)
    config = zero_json(stage)
    fp16 = {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 2, "hysteresis": 1, "min_loss_scale": 64}
    return build_toy_engine(config | {"fp16": fp16, "bf16": {"enabled": False}}, OptimConfig(lr=1e-2), torch.float16)


def _overflow(batch: ToyBatch) -> ToyBatch:
    return ToyBatch(batch.inputs, torch.full_like(batch.targets, math.inf), batch.weights)


def _run(stage: int) -> dict[str, Any]:
    accelerator = get_accelerator()
    patched, accelerator.is_fp16_supported = accelerator.is_fp16_supported, lambda: True  # type: ignore[method-assign]
    try:
        engine = _engine(stage)

        def scale() -> float:
            return float(engine.loss_scaler_state()["cur_scale"])

        found: dict[str, Any] = {"start": scale()}
        norms = []
        for step in range(3):
            result = engine.train_step([toy_batch(step)], lr=1e-2, judge=lambda loss, norm: norms.append(norm) is None)
        found["grown"] = scale()
        found["norms"], found["last norm"] = norms, result.grad_norm
        before = engine.loss_scaler_state()
        refused = engine.train_step([toy_batch(7)], lr=1e-2, judge=lambda loss, norm: False)
        found["refused"] = (refused.applied, refused.is_refused, engine.loss_scaler_state() == before)
        saved = engine.scalar_state()
        asked: list[float] = []
        for _ in range(5):
            engine.train_step([_overflow(toy_batch(5))], lr=1e-2, judge=lambda loss, norm: asked.append(norm) is None)
        found["asked about overflows"], found["least"] = asked, scale()
        pieces = {(f.name, f.kind): f.tensor.clone() for f in engine.state_fragments()}
        engine.load_state(lambda fragment: pieces[fragment.name, fragment.kind], saved)
        found["restored"] = engine.loss_scaler_state() == before
        engine.close()
        return found
    finally:
        accelerator.is_fp16_supported = patched  # type: ignore[method-assign]


@pytest.mark.parametrize("stage", range(4))
def test_the_loss_scale(stage: int) -> None:
    (found,) = run_distributed(_run, 1, stage)
    assert found["start"] == 256
    assert found["grown"] > 256
    assert len(found["norms"]) == 3
    assert all(0 < norm < 100 for norm in found["norms"]), "the judge sees norms without the scale"
    assert found["norms"][-1] == pytest.approx(found["last norm"], rel=1.0 if stage == 3 else 1e-6)
    assert found["refused"] == (False, True, True), "a refused update is no overflow: the scaler learns nothing from it"
    assert found["asked about overflows"] == []
    assert found["least"] == 64, "at its minimum DeepSpeed would end the run; the guard decides instead"
    assert found["restored"]

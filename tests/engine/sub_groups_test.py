"""Pipeline stages whose parameters fill different numbers of ZeRO-3's sub-groups train like ones that have one each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed import run_distributed
from tests.harness import Layout, ToyRun


def _run(folder: str, offload: str, sub_group_size: int) -> tuple[list[tuple[float, float]], int]:
    """Losses and norms of some steps, and how many sub-groups this stage has."""
    path = Path(folder) / f"{sub_group_size}.json"
    zero = {"stage": 3, "sub_group_size": sub_group_size, "offload_optimizer": {"device": offload}}
    path.write_text(json.dumps({"zero_optimization": zero}))
    flags = (f"--deepspeed_config={path}", "--train.precision=fp32", "--parallel.pipeline_layout=1,2")
    run = ToyRun("gpt", Layout(pipeline=2, layers=3, accumulation=2, extra=flags), Path(folder))
    figures = [(result.loss, result.grad_norm) for result in run.train(2)]
    count = len(run.engine.deepspeed.optimizer.fp16_groups)
    run.close()
    return figures, count


@pytest.mark.parametrize("offload", [pytest.param("none", marks=pytest.mark.slow), "cpu"])
def test_stages_with_different_numbers_of_sub_groups_have_one_norm(offload: str, tmp_path: Path) -> None:
    whole = run_distributed(_run, 2, str(tmp_path), offload, 10**9)
    divided = run_distributed(_run, 2, str(tmp_path), offload, 50_000)
    counts = [count for _, count in divided]
    assert counts[0] != counts[1]
    assert max(counts) > whole[0][1]
    assert divided[0][0] == divided[1][0], "all ranks report the same"
    for (loss, norm), (expected_loss, expected_norm) in zip(divided[0][0], whole[0][0], strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert norm == pytest.approx(expected_norm, rel=1e-6)

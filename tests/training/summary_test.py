"""Bytes per rank that ``--dry_run`` prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gptoughts.config.cli import load_experiment
from gptoughts.models.registry import FAMILIES
from gptoughts.training.summary import memory_per_rank, print_summary


@pytest.mark.parametrize(
    ("stage", "precision", "expected"),
    [  # bytes per parameter on each of two ranks: weights, fp32 gradients, moments and masters
        (0, "fp32", (4, 4, 8)),
        (0, "bf16", (2, 4, 12)),
        (1, "bf16", (2, 4, 6)),
        (2, "bf16", (2, 2, 6)),
        (3, "bf16", (1, 2, 6)),
    ],
)
def test_memory_per_rank(tmp_path: Path, stage: int, precision: str, expected: tuple[int, int, int]) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    flags = [f"--deepspeed_config={path}", f"--train.precision={precision}"]
    experiment = load_experiment(flags, FAMILIES, world_size=2)
    found, count = memory_per_rank(experiment), experiment.config.model.total_parameters()
    assert (found.parameters, found.gradients, found.optimizer) == tuple(count * n for n in expected)


@pytest.mark.parametrize(("stage", "expected"), [(0, (1, 1)), (1, (1, 0.25)), (3, (0.25, 0.25))])
def test_memory_per_rank_with_divided_experts(tmp_path: Path, stage: int, expected: tuple[float, float]) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    flags = ["--model_type=deepseek", f"--deepspeed_config={path}", "--train.precision=fp32", "--parallel.expert=2"]
    experiment = load_experiment(flags, FAMILIES, world_size=4)
    experts = experiment.config.model.expert_parallel_parameters()
    total = experiment.config.model.total_parameters()
    # Half of the experts on a rank, unless ZeRO divides all of them over four.
    whole = {1: total - experts // 2, 0.25: total / 4}
    found = memory_per_rank(experiment)
    assert found.parameters == 4 * whole[expected[0]]
    assert found.optimizer == (8 if stage == 0 else 12) * whole[expected[1]]


def test_dry_run_prints_activations_too(capsys: pytest.CaptureFixture[str]) -> None:
    experiment = load_experiment(["--size=debug", "--batch_size=2"], FAMILIES, world_size=1)
    print_summary(experiment, FAMILIES["gpt"])
    printed = capsys.readouterr().out
    memory = memory_per_rank(experiment)
    assert f"{'in all per rank':<25} {memory.total / 2**20:,.1f} MiB" in printed
    assert memory.activations > 0

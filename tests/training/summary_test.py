"""Bytes per rank that ``--dry_run`` prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gptoughts.config.cli import load_experiment
from gptoughts.models.registry import FAMILIES
from gptoughts.training.summary import memory_per_rank


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
    found = memory_per_rank(experiment, 1000)
    assert found == dict(zip(("parameters", "gradients", "optimizer"), (1000 * n for n in expected), strict=True))

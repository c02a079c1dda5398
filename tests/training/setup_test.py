"""What only the machine can tell of a configuration."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from gptoughts.config.cli import load_experiment
from gptoughts.errors import ConfigError
from gptoughts.models.registry import FAMILIES
from gptoughts.platform import device
from gptoughts.training.setup import check_machine


def test_all_that_the_machine_lacks_comes_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({name: {"enabled": True} for name in ("fp16", "wandb", "tensorboard", "csv_monitor")}))
    experiment = load_experiment([f"--deepspeed_config={path}"], FAMILIES, world_size=1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(device, "supports_precision", lambda dtype: False)
    with pytest.raises(ConfigError) as caught:
        check_machine(experiment)
    precision, wandb, tensorboard = caught.value.problems
    assert precision.startswith("train.precision=fp16: ")
    assert wandb.startswith(f"{path}: wandb.enabled=true needs the package 'wandb'")
    assert tensorboard.startswith(f"{path}: tensorboard.enabled=true needs the package 'tensorboard'")

"""What makes a model this one: compared when a run resumes or starts from weights; imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from gptoughts.config.experiment import ExperimentConfig


def model_identity(config: ExperimentConfig) -> dict[str, Any]:
    """What a checkpoint's model must agree on with the present one."""
    fields = dataclasses.asdict(config.model)
    lasting = {name: value for name, value in fields.items() if name not in config.model.RUN_ONLY_FIELDS}
    return {"model_type": config.model_type} | lasting


def identity_differences(
    saved: Mapping[str, Any], present: Mapping[str, Any], earlier: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """What a checkpoint's model and the present one disagree on: name -> (saved, present).

    Args:
        saved: Identity in the checkpoint's manifest.
        present: Identity of the present model.
        earlier: What a checkpoint that does not name a field had there (``ModelConfig.LATER_FIELDS``).
    """
    found = {name: (saved.get(name, earlier.get(name)), value) for name, value in present.items()}
    return {name: pair for name, pair in found.items() if pair[0] != pair[1]}

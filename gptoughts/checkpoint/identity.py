"""What makes a model this one: compared when a run resumes or starts from weights; imports no torch."""

from __future__ import annotations

import dataclasses
from typing import Any

from gptoughts.config.experiment import ExperimentConfig


def model_identity(config: ExperimentConfig) -> dict[str, Any]:
    """What a checkpoint's model must agree on with the present one."""
    fields = dataclasses.asdict(config.model)
    lasting = {name: value for name, value in fields.items() if name not in config.model.RUN_ONLY_FIELDS}
    return {"model_type": config.model_type} | lasting

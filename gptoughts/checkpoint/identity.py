"""What makes a model this one: compared when a run resumes or starts from weights; imports no torch."""

from __future__ import annotations

import dataclasses
from typing import Any

from gptoughts.config.experiment import ExperimentConfig


def model_identity(config: ExperimentConfig) -> dict[str, Any]:
    """What a checkpoint's model must agree on with the present one."""
    model = config.model
    defaults = {field.name: field.default for field in dataclasses.fields(model) if field.name in model.LATER_FIELDS}
    lasting = {
        name: value
        for name, value in dataclasses.asdict(model).items()
        if name not in model.RUN_ONLY_FIELDS and not (name in defaults and value == defaults[name])
    }
    return {"model_type": config.model_type} | lasting

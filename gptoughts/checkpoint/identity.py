"""What makes a model this one: compared when a run resumes or starts from weights; imports no torch."""

from __future__ import annotations

import dataclasses
from typing import Any

from gptoughts.config.experiment import ExperimentConfig

RUN_ONLY_FIELDS = ("attention_dropout", "hidden_dropout", "init_method_std", "seq_length")
"""Fields of a model's configuration that may change between a checkpoint and what goes on from it."""


def model_identity(config: ExperimentConfig) -> dict[str, Any]:
    """What a checkpoint's model must agree on with the present one."""
    fields = dataclasses.asdict(config.model)
    return {"model_type": config.model_type} | {k: v for k, v in fields.items() if k not in RUN_ONLY_FIELDS}

"""Values of ``"auto"`` in DeepSpeed's JSON that no flag fills: bucket sizes from the model's size, monitors' paths."""

from __future__ import annotations

import os
from typing import Any

from gptoughts.config.experiment import ExperimentConfig

LARGEST_BUCKET = 50_000_000
"""Elements. Larger buckets no longer hide latency and cost memory: DeepSpeed allocates the whole bucket."""
PERSISTENT_ROWS = 10


def parameters_on_rank(config: ExperimentConfig) -> int:
    """Parameters that a rank would have with one pipeline stage and without ZeRO."""
    experts = config.model.expert_parallel_parameters()
    elsewhere = experts - experts // config.parallel.expert
    return max(1, (config.model.total_parameters() - elsewhere) // config.parallel.tensor)


def automatic_values(config: ExperimentConfig, zero_stage: int) -> dict[str, Any]:
    """Dotted JSON key -> value where the file has none or ``"auto"``.

    DeepSpeed's defaults are made for billions of parameters: its reduction buffer of 5e8 elements is allocated whole,
    and below 1e5 elements stage 3 partitions nothing of a small model.
    """
    model, tensor = config.model, config.parallel.tensor
    bucket = min(LARGEST_BUCKET, parameters_on_rank(config))
    values: dict[str, Any] = {}
    if zero_stage > 0:
        values |= {
            "zero_optimization.reduce_bucket_size": bucket,
            "zero_optimization.allgather_bucket_size": bucket,
        }
    if zero_stage == 3:
        values |= {
            "zero_optimization.stage3_prefetch_bucket_size": min(bucket, max(1, model.layer_parameters() // tensor)),
            # norms and biases stay whole, every matrix is partitioned
            "zero_optimization.stage3_param_persistence_threshold": PERSISTENT_ROWS * model.hidden_size,
        }
    monitors = os.path.join(config.output_dir, "monitor")
    for name in ("tensorboard", "csv_monitor"):
        values |= {f"{name}.output_path": monitors, f"{name}.job_name": name}
    values["wandb.project"] = "gptoughts"
    return values

"""What offload to NVMe asks of this machine: an operator, a folder with room, memory that may be locked."""

from __future__ import annotations

import os
from pathlib import Path

from gptoughts.config.offload import BLOCKS, SWAP
from gptoughts.config.resolve import Experiment
from gptoughts.engine.swap_folder import sweep
from gptoughts.planning.layers import WIDTHS
from gptoughts.planning.memory import stage_needs, swap_memory
from gptoughts.planning.zero import ZeroSettings
from gptoughts.platform import async_io
from gptoughts.training.summary import memory_per_rank


def swap_problems(experiment: Experiment) -> list[str]:
    """A line for whatever of an offload to NVMe cannot be here; none where there is no such offload."""
    zero = experiment.deepspeed["zero_optimization"]
    blocks = [block for block in BLOCKS if (zero.get(block) or {}).get("device") == "nvme"]
    if not blocks:
        return []
    label = f"{experiment.config.deepspeed_config}: zero_optimization"
    problems = [] if (problem := async_io.operator_problem()) is None else [f"{label}.{blocks[0]}: {problem}"]
    needed = memory_per_rank(experiment).disk * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    automatic = Path(experiment.config.output_dir) / SWAP
    for block in blocks:
        folder = Path(zero[block]["nvme_path"])
        if folder.is_dir():
            sweep(folder)
        problem = async_io.folder_problem(folder, needed, may_be_made=folder == automatic)
        if problem is not None and not any(f"={folder}:" in line for line in problems):
            problems.append(f"{label}.{block}.nvme_path={folder}: {problem}")
    problem = async_io.lock_problem(_buffer_bytes(experiment))
    return problems + ([f"{label}.{blocks[0]}: {problem}"] if problem is not None else [])


def _buffer_bytes(experiment: Experiment) -> int:
    """Predicted bytes that the fullest rank locks in memory."""
    config = experiment.config
    settings = ZeroSettings.read(experiment.deepspeed, config.train.precision or "bf16")
    needs = stage_needs(config, data=experiment.data_parallel_size, num_microbatches=experiment.num_microbatches)
    return max(swap_memory(stage, settings, WIDTHS[config.train.precision or "bf16"]) for stage in needs)

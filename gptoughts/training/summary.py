"""What ``--dry_run`` prints: the resolved tree, parameters, FLOPs and bytes per rank; imports no torch."""

from __future__ import annotations

import json

from gptoughts.config.cli import to_yaml
from gptoughts.config.pipeline import bubble_fraction, stage_layers
from gptoughts.config.resolve import Experiment
from gptoughts.models.family import Family
from gptoughts.models.flops import count_parameters, flops_per_token

_MIB = 1024**2


def largest_stage_parameters(experiment: Experiment) -> int:
    """Parameters of the pipeline stage that has most of them (all, where there is one stage)."""
    model, parallel = experiment.config.model, experiment.config.parallel
    if parallel.pipeline == 1:
        return model.total_parameters() + model.mtp_parameters()
    stages = [
        sum(model.parameters_of_layer(index) for layers in chunks for index in layers)
        for chunks in stage_layers(model.num_layers, parallel)
    ]
    stages[0] += model.embedding_parameters()
    stages[-1] += model.embedding_parameters() + model.hidden_size
    return max(stages)


def describe_stages(experiment: Experiment) -> list[str]:
    """A line per pipeline stage and one on idle time; none where there is one stage."""
    config = experiment.config
    if config.parallel.pipeline == 1:
        return []
    lines = []
    for stage, chunks in enumerate(stage_layers(config.model.num_layers, config.parallel)):
        layers = " and ".join(f"{chunk.start}-{chunk[-1]}" if len(chunk) > 1 else f"{chunk.start}" for chunk in chunks)
        ends = ["embedding"] * (stage == 0) + ["output layer"] * (stage == config.parallel.pipeline - 1)
        lines.append(f"stage {stage}".ljust(26) + ", ".join([f"layers {layers}", *ends]))
    bubble = bubble_fraction(config.parallel, experiment.num_microbatches)
    schedule = "1F1B" if config.parallel.virtual_pipeline == 1 else "interleaved"
    lines.append(
        f"{'bubble':<26}{bubble:.1%} of a step ({schedule}, {experiment.num_microbatches} microbatches; "
        "more of them make it smaller)"
    )
    return lines


def memory_per_rank(experiment: Experiment, num_parameters: int) -> dict[str, int]:
    """Bytes per rank of parameters, gradients and optimizer state.

    ZeRO (arXiv:1910.02054, section 3): stage 1 divides the optimizer's state over the data-parallel ranks, stage 2 the
    gradients too, stage 3 the parameters too. AdamW keeps two fp32 moments, and an fp32 master copy of weights that
    are not fp32 themselves. Tensor parallelism divides (almost) everything; norms, which it does not, are small.
    Expert parallelism divides the routed experts over some of the data-parallel ranks, ZeRO each share over the others.

    Args:
        experiment: The run.
        num_parameters: Of the whole model, or of the pipeline stage in question.
    """
    precision = experiment.config.train.precision
    size = experiment.data_parallel_size
    parallel = experiment.config.parallel
    experts = experiment.config.model.expert_parallel_parameters()
    whole = (num_parameters - experts * (1 - 1 / parallel.expert)) / parallel.tensor
    divided = num_parameters / parallel.tensor / size
    width = 4 if precision == "fp32" else 2
    stage = experiment.zero_stage
    accumulated = experiment.deepspeed.get("data_types", {}).get("grad_accum_dtype", "fp32")
    gradient_width = 4 if accumulated == "fp32" else 2
    master = 0 if precision == "fp32" and stage == 0 else 4
    return {
        "parameters": int(width * (divided if stage >= 3 else whole)),
        "gradients": int(gradient_width * (divided if stage >= 2 else whole)),
        "optimizer": int((8 + master) * (divided if stage >= 1 else whole)),
    }


def describe_ranks(experiment: Experiment) -> str:
    """How the ranks are divided."""
    parallel = experiment.config.parallel
    virtual = f" ({parallel.virtual_pipeline} virtual)" if parallel.virtual_pipeline > 1 else ""
    pipeline = f"pipeline {parallel.pipeline}{virtual} x " if parallel.pipeline > 1 else ""
    expert = f" (experts over {parallel.expert} of them)" if parallel.expert > 1 else ""
    return f"tensor {parallel.tensor} x {pipeline}data {experiment.data_parallel_size}{expert}"


def print_summary(experiment: Experiment, family: Family) -> None:
    """Print the resolved configuration and what it costs."""
    config = experiment.config
    count = count_parameters(family, config.model)
    sequence = config.block_size or config.model.seq_length
    flops = flops_per_token(family, config.model, sequence)
    memory = memory_per_rank(experiment, largest_stage_parameters(experiment))
    print(to_yaml(config).rstrip())
    print("\n# DeepSpeed")
    print(json.dumps(experiment.deepspeed, indent=2))
    print("\n# cost")
    print(f"parameters                {count.total:,} ({count.embedding:,} in the embedding)")
    if count.mtp:
        print(f"in multi-token prediction {count.mtp:,} more (in training only)")
    print(f"FLOPs per token           {flops:,} (forward and backward, sequence of {sequence})")
    print(
        f"samples per step          {experiment.samples_per_step} ({experiment.samples_per_step * sequence:,} tokens)"
    )
    print(f"ranks                     {describe_ranks(experiment)}")
    for line in describe_stages(experiment):
        print(line)
    for name, num_bytes in memory.items():
        print(f"{name + ' per rank':<25} {num_bytes / _MIB:,.1f} MiB")
    print(f"{'sum per rank':<25} {sum(memory.values()) / _MIB:,.1f} MiB (activations come on top)")

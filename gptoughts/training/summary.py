"""What ``--dry_run`` prints: the resolved tree, parameters, FLOPs and bytes per rank; imports no torch."""

from __future__ import annotations

import json

from gptoughts.config.cli import to_yaml
from gptoughts.config.pipeline import bubble_fraction, stage_layers
from gptoughts.config.resolve import Experiment
from gptoughts.models.family import Family
from gptoughts.models.flops import count_parameters, flops_per_token
from gptoughts.planning.memory import RankMemory, largest_memory, stage_needs
from gptoughts.planning.zero import ZeroSettings

_MIB = 1024**2


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


def memory_per_rank(experiment: Experiment) -> RankMemory:
    """Predicted bytes on the fullest rank (``planning.memory``)."""
    config, data = experiment.config, experiment.data_parallel_size
    zero = ZeroSettings.read(experiment.deepspeed, config.train.precision or "bf16")
    needs = stage_needs(config, data=data, num_microbatches=experiment.num_microbatches)
    return largest_memory(config, zero, needs)


def describe_ranks(experiment: Experiment) -> str:
    """How the ranks are divided."""
    parallel = experiment.config.parallel
    virtual = f" ({parallel.virtual_pipeline} virtual)" if parallel.virtual_pipeline > 1 else ""
    pipeline = f"pipeline {parallel.pipeline}{virtual} x " if parallel.pipeline > 1 else ""
    expert = f" (experts over {parallel.expert} of these)" if parallel.expert > 1 else ""
    context = f"context {parallel.context} ({parallel.context_method}) x " if parallel.context > 1 else ""
    return f"tensor {parallel.tensor} x {pipeline}{context}data {experiment.data_parallel_size}{expert}"


def print_summary(experiment: Experiment, family: Family) -> None:
    """Print the resolved configuration and what it costs."""
    config = experiment.config
    count = count_parameters(family, config.model)
    sequence = config.block_size or config.model.seq_length
    flops = flops_per_token(family, config.model, sequence)
    memory = memory_per_rank(experiment)
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
    state = {name: getattr(memory, name) for name in ("parameters", "gradients", "optimizer")}
    on_top = {"activations": memory.activations + memory.logits, "buffers": memory.buffers}
    for name, num_bytes in state.items():
        print(_line(f"{name} per rank", num_bytes))
    print(_line("sum per rank", sum(state.values())))
    if memory.scaling:
        on_top["FP8 scaling"] = memory.scaling
    for name, num_bytes in on_top.items():
        print(_line(f"{name} per rank", num_bytes))
    print(_line("in all per rank", memory.total) + " (predicted, on the fullest rank; docs/parallelism.md)")
    if memory.host:
        print(_line("in the host's memory", memory.host) + " per rank")
    if memory.disk:
        print(_line("on the disk", memory.disk) + " per rank")


def _line(name: str, num_bytes: int) -> str:
    return f"{name:<25} {num_bytes / _MIB:,.1f} MiB"

"""Plans for people and programs: the table, the JSON, the ready command, and why nothing fits."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from gptoughts.config.deepspeed_json import DeepSpeedJson
from gptoughts.config.experiment import ExperimentConfig, ParallelConfig
from gptoughts.planning import recompute
from gptoughts.planning.request import GIB, OFFLOAD, Options, shipped_json, shipped_jsons
from gptoughts.planning.search import PLANNED, Plan, Run, search
from gptoughts.planning.throughput import StepTime

_AXES = ("tensor", "sequence", "pipeline", "virtual_pipeline", "pipeline_layout", "context", "expert")
_RECOMPUTE = ("recompute_granularity", "recompute_modules")
"""What the planner chooses beside axes."""
_LARGEST_GROWTH = 64


def arguments(plan: Plan, flags: Sequence[str]) -> list[str]:
    """The launcher's flags for a plan: those given, and what the planner chose."""
    run, config, default = plan.run, plan.config, ParallelConfig()
    found = list(flags)
    for axis in (*_AXES, *_RECOMPUTE):
        value = getattr(config.parallel, axis)
        if not run.is_stated(f"parallel.{axis}") and value != getattr(default, axis):
            found += [f"--parallel.{axis}", str(value).lower()]
    if not run.is_stated("batch_size"):
        found += ["--batch_size", str(config.batch_size)]
    if not run.is_stated("train.global_batch_size"):
        found += ["--train.global_batch_size", str(config.train.global_batch_size)]
    if plan.json.label and config.deepspeed_config is None:
        found += ["--deepspeed_config", plan.json.label]
    return found


def command(plan: Plan, options: Options) -> str:
    """What starts a plan."""
    nodes = options.world_size // options.ranks_per_node
    launcher = ["deepspeed", *(["--num_nodes", str(nodes)] if nodes > 1 else [])]
    launcher += ["--num_gpus", str(options.ranks_per_node), "launchers/pretrain.py"]
    return shlex.join([*launcher, *arguments(plan, options.flags)])


def as_json(plan: Plan, time: StepTime, options: Options) -> dict[str, Any]:
    """One plan, JSON-able; bytes are per rank, seconds per step."""
    return {
        **{axis: getattr(plan.config.parallel, axis) for axis in _AXES},
        **{name: getattr(plan.config.parallel, name) for name in _RECOMPUTE},
        "data": plan.data,
        "zero_stage": plan.zero.stage,
        "deepspeed_config": plan.config.deepspeed_config or plan.json.label or None,
        "batch_size": plan.config.batch_size,
        "num_microbatches": plan.num_microbatches,
        "memory_bytes": {**asdict(plan.memory), "total": plan.memory.total},
        "bubble_fraction": time.bubble_fraction,
        "communication_bytes": dict(time.traffic.num_bytes),
        "communication_seconds": dict(time.traffic.seconds),
        "compute_seconds": time.compute_seconds,
        "exchange_seconds": time.exchange_seconds,
        "step_seconds": time.seconds,
        "tokens_per_second": time.tokens_per_second,
        "command": command(plan, options),
        "arguments": arguments(plan, options.flags),
    }


def table(plans: Sequence[tuple[Plan, StepTime]]) -> Table:
    """One line per plan."""
    found = Table(box=SIMPLE_HEAD)
    titles = (
        "tp", "pp", "vpp", "cp", "ep", "dp", "ZeRO", "batch", "micro- batches", "recompute", "GiB", "weights",
        "grads", "optim",
        "activ.", "logits", "buffers", "bubble", "GB sent tp/pp/cp/ep/dp", "link s", "step s", "tokens/s",
    )  # fmt: skip
    for title in titles:
        found.add_column(title, justify="right")
    for plan, time in plans:
        parallel, memory = plan.config.parallel, plan.memory
        parts = (memory.parameters, memory.gradients, memory.optimizer, memory.activations, memory.logits,
                 memory.buffers + memory.scaling)  # fmt: skip
        sent = time.traffic.num_bytes
        found.add_row(
            f"{parallel.tensor}{'+sp' if parallel.sequence else ''}",
            str(parallel.pipeline), str(parallel.virtual_pipeline), str(parallel.context), str(parallel.expert),
            str(plan.data),
            f"{plan.zero.stage}{' off' if plan.zero.offloads_optimizer else ''}",
            str(plan.config.batch_size), str(plan.num_microbatches), recompute.describe(parallel), _gib(memory.total),
            *map(_gib, parts),
            f"{time.bubble_fraction:.0%}",
            "/".join(f"{sent[axis] / 1e9:.3g}" for axis in ("tensor", "pipeline", "context", "expert", "data")),
            f"{sum(time.traffic.seconds.values()):.3g}", f"{time.seconds:.3g}", f"{time.tokens_per_second:,.0f}",
        )  # fmt: skip
    return found


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.{1 if num_bytes >= 10 * GIB else 2}f}"


def describe(plan: Plan) -> str:
    """A layout in one line."""
    parallel = plan.config.parallel
    pipeline = f" x pipeline {parallel.pipeline}" if parallel.pipeline > 1 else ""
    pipeline += f" x context {parallel.context}" if parallel.context > 1 else ""
    expert = f", experts over {parallel.expert}" if parallel.expert > 1 else ""
    offload = " with offload" if plan.zero.offloads_optimizer else ""
    remade = f", recompute {what}" if (what := recompute.describe(parallel)) else ""
    return (
        f"tensor {parallel.tensor}{pipeline} x data {plan.data}{expert}, ZeRO-{plan.zero.stage}{offload}, "
        f"batch_size {plan.config.batch_size}{remade}"
    )


def why_nothing_fits(run: Run, plans: Sequence[Plan], options: Options) -> list[str]:
    """What the smallest layout needs, and the smallest change with which something fits."""
    least = min(plans, key=lambda plan: plan.memory.total)
    lines = [
        f"gpu_memory_gib={options.memory_gib:g}: needs {least.memory.total / GIB:.1f} GiB per rank at least "
        f"({describe(least)}), {options.limit_bytes / GIB:.1f} GiB are usable"
    ]
    for change, other in _changes(run):
        fitting = [
            plan for plan in search(other, options.limit_bytes).plans if plan.memory.total <= options.limit_bytes
        ]
        if fitting:
            # Nearest to what was asked for: the lowest ZeRO stage, then the least memory.
            best = min(fitting, key=lambda plan: (plan.zero.stage, plan.memory.total))
            host = f" and {best.memory.host / GIB:.1f} GiB of the host's memory" if best.memory.host else ""
            lines.append(f"{change}: {describe(best)} fits with {best.memory.total / GIB:.1f} GiB per rank{host}")
            return lines
    lines.append("no other layout, ZeRO stage, offload or number of GPUs that was tried fits; a smaller block_size may")
    return lines


def _changes(run: Run) -> Iterator[tuple[str, Run]]:
    """Smaller changes first: what was stated is let go, one thing at a time, then together; then more is asked for."""
    config = run.config
    if config.deepspeed_config is not None:
        yield "with another --deepspeed_config", _with_jsons(run, shipped_jsons())
    names = (*(f"parallel.{field}" for field in (*_RECOMPUTE, *_AXES)), "batch_size")
    stated = [name for name in names if run.is_stated(name)]
    for name in stated:
        yield f"without {name}={_at(config, name)}", _without(run, [name])
    free = _with_jsons(_without(run, stated), shipped_jsons())
    if len(stated) > 1 or (stated and config.deepspeed_config is not None):
        yield "with none of the axes stated", free
    yield f"with --deepspeed_config {shipped_json(OFFLOAD).label}", _with_jsons(run, [shipped_json(OFFLOAD)])
    growth = 2
    while growth <= _LARGEST_GROWTH:
        ranks = run.world_size * growth
        yield f"with --gpus {ranks}", replace(free, world_size=ranks, config=_grown(free, growth))
        growth *= 2


def _at(config: ExperimentConfig, name: str) -> Any:
    return getattr(config.parallel, name.removeprefix("parallel.")) if "." in name else getattr(config, name)


def _with_jsons(run: Run, jsons: Sequence[DeepSpeedJson]) -> Run:
    return replace(run, jsons=jsons, config=replace(run.config, deepspeed_config=None))


def _without(run: Run, names: Sequence[str]) -> Run:
    default = ParallelConfig()
    axes = {name.removeprefix("parallel."): None for name in names if name.startswith("parallel.")}
    parallel = replace(run.config.parallel, **{axis: getattr(default, axis) for axis in axes})
    sources: Mapping[str, str] = {**run.sources, **dict.fromkeys(names, "default")}
    return replace(run, config=replace(run.config, parallel=parallel), sources=sources)


def _grown(run: Run, growth: int) -> ExperimentConfig:
    """The global batch grows with the ranks where nobody stated it."""
    train = run.config.train
    if run.sources["train.global_batch_size"] != PLANNED or train.global_batch_size is None:
        return run.config
    return replace(run.config, train=replace(train, global_batch_size=train.global_batch_size * growth))

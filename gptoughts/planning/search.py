"""Every layout that this version accepts for a run on so many ranks, with what each would need and how fast it is.

Axes that the run states (flags, YAML, JSON) stay as stated; the others are searched. What is acceptable is asked of the
configuration's own checks (``config.validate``, ``config.pipeline``), layout by layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import Any

from gptoughts.config.deepspeed_json import DeepSpeedJson, expert_parallel_problems, for_deepspeed
from gptoughts.config.experiment import ExperimentConfig, ParallelConfig
from gptoughts.config.pipeline import microbatch_problems, suggested_layout
from gptoughts.config.validate import resolve_batch, validate
from gptoughts.models.family import Family
from gptoughts.planning.memory import RankMemory, StageNeeds, largest_memory, stage_needs
from gptoughts.planning.recompute import ladder
from gptoughts.planning.throughput import Machine, StepTime, step_time
from gptoughts.planning.zero import ZeroSettings

PLANNED = "planned"
LARGEST_TENSOR, LARGEST_PIPELINE, LARGEST_VIRTUAL, LARGEST_MICROBATCH = 64, 128, 8, 64
"""Beyond these nothing is searched; a flag may state more."""
SMALLEST_PART_TOKENS = 2048
"""Sequences are not searched in smaller parts: their exchange is latency, which the time of a step leaves out."""


@dataclass(frozen=True)
class Run:
    """What is to be planned."""

    family: Family
    config: ExperimentConfig
    """Settled, without a layout; its global batch size is given."""
    sources: Mapping[str, str]
    """Dotted name -> where its value comes from."""
    jsons: Sequence[DeepSpeedJson]
    """The DeepSpeed files to choose from: one per ZeRO stage, or the stated one."""
    world_size: int

    def is_stated(self, name: str) -> bool:
        """Whether somebody wrote this value down."""
        return not self.sources[name].startswith(("default", "preset", PLANNED))


@dataclass(frozen=True)
class Plan:
    """One layout and what it would cost."""

    run: Run
    config: ExperimentConfig
    json: DeepSpeedJson
    zero: ZeroSettings
    data: int
    """Data-parallel ranks."""
    num_microbatches: int
    needs: Sequence[StageNeeds] = field(repr=False)

    @cached_property
    def memory(self) -> RankMemory:
        """Of the fullest rank."""
        return largest_memory(self.config, self.zero, self.needs)

    def time_on(self, machine: Machine) -> StepTime:
        """One step."""
        return step_time(
            self.run.family, self.config, self.zero, machine, data=self.data, num_microbatches=self.num_microbatches
        )


def divisors(number: int, largest: int) -> list[int]:
    """Those of ``number`` up to ``largest``."""
    return [n for n in range(1, min(number, largest) + 1) if number % n == 0]


def layouts(run: Run) -> Iterator[ParallelConfig]:
    """Candidates, acceptable or not: each axis as stated, or everything that divides."""
    stated = run.config.parallel

    def axis(name: str, candidates: Sequence[Any]) -> Sequence[Any]:
        return [getattr(stated, name)] if run.is_stated(f"parallel.{name}") else candidates

    model = run.config.model
    counts = [*model.tensor_parallel_divisors().values(), run.world_size]
    tensors = [n for n in range(1, LARGEST_TENSOR + 1) if all(count % n == 0 for count in counts)]
    experts = model.expert_parallel_divisors()
    for tensor in axis("tensor", tensors):
        for pipeline in axis("pipeline", divisors(run.world_size // max(tensor, 1), LARGEST_PIPELINE)):
            replicas = max(1, run.world_size // max(1, tensor * pipeline))
            shares = divisors(replicas, max(experts.values(), default=1)) if experts else [1]
            for context, expert, virtual, sequence in product(
                axis("context", _contexts(run, max(tensor, 1), replicas)),
                axis("expert", shares),
                axis("virtual_pipeline", _virtual(pipeline, model.num_layers)),
                axis("sequence", [True] if tensor > 1 else [False]),
            ):
                yield replace(
                    stated,
                    tensor=tensor,
                    pipeline=pipeline,
                    virtual_pipeline=virtual,
                    expert=expert,
                    context=context,
                    sequence=sequence,
                    pipeline_layout=_layout(run, pipeline, virtual),
                )


def _contexts(run: Run, tensor: int, replicas: int) -> list[int]:
    """Into how many parts sequences may be cut that are long enough."""
    parts = max(1, (run.config.block_size or 0) // SMALLEST_PART_TOKENS)
    heads = max(1, run.config.model.num_attention_heads // tensor)
    divided = replicas if run.config.parallel.context_method == "ring" else heads
    return [n for n in divisors(divided, parts) if replicas % n == 0]


def _virtual(pipeline: int, num_layers: int) -> list[int]:
    if pipeline == 1:
        return [1]
    return [v for v in range(1, LARGEST_VIRTUAL + 1) if v == 1 or num_layers % (pipeline * v) == 0]


def _layout(run: Run, pipeline: int, virtual: int) -> str | None:
    """As stated; or nearly equal stages where layers do not divide equally."""
    num_layers = run.config.model.num_layers
    if run.is_stated("parallel.pipeline_layout") or pipeline == 1:
        return run.config.parallel.pipeline_layout
    is_uneven = virtual == 1 and num_layers % pipeline and num_layers > pipeline
    return suggested_layout(num_layers, pipeline) if is_uneven else None


@dataclass
class Search:
    """All plans of a run, and why the rest is none."""

    plans: list[Plan] = field(default_factory=list)
    problems: dict[str, None] = field(default_factory=dict)
    """What the checks said of what they refused, each line once."""


def search(run: Run, limit_bytes: float | None = None) -> Search:
    """Try every candidate.

    Args:
        run: What is to be planned.
        limit_bytes: Of a rank. A layout that needs more recomputes what it takes to fit, the cheapest first, unless the
            run states what is recomputed; where nothing is enough, the most.
    """
    found = Search()
    for parallel in layouts(run):
        config = replace(run.config, parallel=parallel)
        problems, data = validate(config, run.sources, world_size=run.world_size)
        for json in run.jsons:
            problems += expert_parallel_problems(json, config)
        if problems:
            found.problems |= dict.fromkeys(problems)
            continue
        # Sizes of buckets follow from the model and its division, not from the batch.
        precision = config.train.precision or "bf16"
        settings = [ZeroSettings.read(for_deepspeed(json, config, data), precision) for json in run.jsons]
        for size in _microbatch_sizes(run, data):
            sources = dict(run.sources)
            fitted, num_microbatches, problems = resolve_batch(replace(config, batch_size=size), sources, data)
            problems = problems or microbatch_problems(fitted, sources, num_microbatches)
            found.problems |= dict.fromkeys(problems)
            if not problems:
                needs = stage_needs(fitted, data=data, num_microbatches=num_microbatches)
                plans = [
                    Plan(run, fitted, json, zero, data, num_microbatches, needs)
                    for json, zero in zip(run.jsons, settings, strict=True)
                ]
                found.plans += plans if limit_bytes is None else _recomputing(run, plans, limit_bytes)
    return found


def _recomputing(run: Run, plans: Sequence[Plan], limit_bytes: float) -> list[Plan]:
    """Plans of one layout and microbatch, each with the recompute that lets it fit."""
    steps = [] if run.is_stated("parallel.recompute_granularity") else ladder(run.config.model)
    needs: dict[int, Sequence[StageNeeds]] = {}

    def on_step(plan: Plan, number: int) -> Plan:
        config = replace(plan.config, parallel=replace(plan.config.parallel, **steps[number]))
        if number not in needs:
            needs[number] = stage_needs(config, data=plan.data, num_microbatches=plan.num_microbatches)
        return replace(plan, config=config, needs=needs[number])

    found = []
    for plan in plans:
        chosen = plan
        if steps and plan.memory.total > limit_bytes:
            chosen = on_step(plan, len(steps) - 1)
            if chosen.memory.total <= limit_bytes:
                cheaper = (on_step(plan, number) for number in range(len(steps)))
                chosen = next(other for other in cheaper if other.memory.total <= limit_bytes)
        found.append(chosen)
    return found


def _microbatch_sizes(run: Run, data: int) -> Sequence[int | None]:
    if run.is_stated("batch_size") or (run.config.train.global_batch_size or 0) % data:
        return [run.config.batch_size]
    accumulation = run.config.train.gradient_accumulation_steps
    samples = (run.config.train.global_batch_size or 0) // data
    if accumulation is not None:
        return [max(1, samples // accumulation)]
    return divisors(samples, LARGEST_MICROBATCH)

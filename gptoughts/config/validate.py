"""Checks of the resolved tree against itself and the world size, and the arithmetic of batch sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from gptoughts.config.experiment import ExperimentConfig, ParallelConfig
from gptoughts.config.options import LARGEST
from gptoughts.config.pipeline import pipeline_problems, stage_layers
from gptoughts.config.recompute import recompute_problems

SEEDS = 2**31
"""Seeds that every generator takes, with room for the offsets that ranks add."""


def validate(config: ExperimentConfig, sources: Mapping[str, str], *, world_size: int) -> tuple[list[str], int]:
    """Everything that cannot be run, one line each, and the data-parallel size (1 where it cannot be told)."""
    problems = _model_problems(config, sources)
    problems += _range_problems(config, sources)
    is_model_sound = not problems
    found, data_parallel_size = _parallel_problems(config, sources, world_size, is_model_sound=is_model_sound)
    problems += found + recompute_problems(config, sources, is_model_sound=is_model_sound)
    if config.init_from is not None and config.resume not in ("auto", "none"):
        problems.append(
            f"init_from={config.init_from} ({sources['init_from']}) contradicts resume={config.resume} "
            f"({sources['resume']}); a run either starts from weights or goes on from a checkpoint"
        )
    return problems, data_parallel_size


def _model_problems(config: ExperimentConfig, sources: Mapping[str, str]) -> list[str]:
    lines = []
    for problem in config.model.problems():
        field, _, rest = problem.partition("=")
        value, _, reason = rest.partition(":")
        lines.append(f"model.{field}={value} ({sources.get(f'model.{field}', 'default')}):{reason}")
    return lines


_AT_LEAST_ONE = (
    "block_size", "parallel.tensor", "parallel.pipeline", "parallel.virtual_pipeline", "parallel.expert",
    "parallel.context", "parallel.recompute_num_layers", "log.interval_steps", "train.steps", "fp8.amax_history_len",
    "stability.window_steps", "stability.min_window_steps", "stability.calm_steps", "stability.lr_cut_steps",
)  # fmt: skip
_POSITIVE = ("parallel.timeout_seconds", "optim.lr", "optim.eps", "stability.loss_zscore", "stability.grad_norm_zscore")
_NOT_NEGATIVE = (
    "grad_clip", "data.prefetch_steps", "optim.warmup_steps", "optim.weight_decay", "train.valid_interval_steps",
    "checkpoint.interval_steps", "checkpoint.keep_last", "parallel.heartbeat_seconds",
    "stability.snapshot_interval_steps", "stability.max_skips", "stability.max_rollbacks", "stability.max_lr_cuts",
    "fp8.margin",
)  # fmt: skip
_FRACTIONS = ("optim.min_lr_fraction", "optim.decay_fraction")
_BELOW_ONE = ("optim.beta1", "optim.beta2")


def _range_problems(config: ExperimentConfig, sources: Mapping[str, str]) -> list[str]:
    checks = (
        (_AT_LEAST_ONE, lambda v: 1 <= v < LARGEST, "must be 1 or more"),
        (_POSITIVE, lambda v: 0 < v < LARGEST, "must be greater than 0 and finite"),
        (_NOT_NEGATIVE, lambda v: 0 <= v < LARGEST, "must be 0 or more, and finite"),
        (("seed",), lambda v: 0 <= v < SEEDS, f"from 0 to {SEEDS - 1}"),
        (_FRACTIONS, lambda v: 0 <= v <= 1, "a fraction from 0 to 1"),
        (("stability.lr_cut_factor",), lambda v: 0 < v <= 1, "greater than 0, at most 1"),
        (_BELOW_ONE, lambda v: 0 <= v < 1, "from 0 up to, but not including, 1"),
        (("train.valid_samples",), lambda v: v == -1 or v >= 1, "-1 (all) or 1 and more"),
    )
    problems = []
    for names, is_right, text in checks:
        for name in names:
            value = value_at(config, name)
            if value is not None and not is_right(value):
                problems.append(f"{name}={value} ({sources[name]}): {text}")
    for name, text in (("output_dir", config.output_dir), ("resume", config.resume)):
        if not text:
            problems.append(f"{name}= ({sources[name]}): is empty")
    for name in ("on_non_finite", "on_loss_spike", "on_grad_spike"):
        if getattr(config.stability, name) == "fallback" and not config.use_fp8:
            problems.append(
                f"stability.{name}=fallback ({sources[f'stability.{name}']}): takes layers out of FP8, which is off; "
                "add --use_fp8 true, or choose skip, rollback, cut_lr or stop"
            )
    if config.stability.fallback_layers and not config.use_fp8:
        source = sources["stability.fallback_layers"]
        problems.append(f"stability.fallback_layers={config.stability.fallback_layers} ({source}): FP8 is off")
    window, least = config.stability.window_steps, config.stability.min_window_steps
    if least > window >= 1:
        problems.append(
            f"stability.min_window_steps={least} ({sources['stability.min_window_steps']}): the window holds no more "
            f"than stability.window_steps={window}"
        )
    stop, steps, warmup = config.train.stop_after_steps, config.train.steps, config.optim.warmup_steps
    if stop is not None and not 1 <= stop <= steps:
        source = sources["train.stop_after_steps"]
        problems.append(f"train.stop_after_steps={stop} ({source}): must be from 1 to train.steps={steps}")
    if warmup is not None and warmup > steps >= 1:
        problems.append(
            f"optim.warmup_steps={warmup} ({sources['optim.warmup_steps']}): longer than the run, train.steps={steps}"
        )
    return problems


def value_at(config: ExperimentConfig, name: str) -> float | None:
    """The number under a dotted name."""
    found: object = config
    for part in name.split("."):
        found = getattr(found, part)
    assert found is None or isinstance(found, int | float)
    return found


def _parallel_problems(
    config: ExperimentConfig, sources: Mapping[str, str], world_size: int, *, is_model_sound: bool
) -> tuple[list[str], int]:
    problems: list[str] = []
    tensor, pipeline, context = config.parallel.tensor, config.parallel.pipeline, config.parallel.context
    if min(tensor, pipeline, context) < 1:
        return problems, 1
    tensor_is = f"parallel.tensor={tensor} ({sources['parallel.tensor']})"
    divisors = config.model.tensor_parallel_divisors() if is_model_sound else {}
    allowed = [n for n in range(1, min([*divisors.values(), 64]) + 1) if all(c % n == 0 for c in divisors.values())]
    for name, count in divisors.items():
        if count % tensor:
            problems.append(
                f"{tensor_is}: {name}={count} is not divisible by {tensor}; allowed: {', '.join(map(str, allowed))}"
            )
    problems += pipeline_problems(config, sources)
    model_ranks = tensor * pipeline * context
    context_is = f"parallel.context={context} ({sources['parallel.context']})"
    if world_size % tensor == 0 and world_size % model_ranks:
        product = f"{tensor_is} x parallel.pipeline={pipeline} ({sources['parallel.pipeline']})"
        product += f" x {context_is}" if context > 1 else ""
        problems.append(
            f"{product}: the world size {world_size} is not divisible by {model_ranks}; start a multiple of "
            f"{model_ranks} ranks"
        )
    if world_size % tensor:
        fitting = [n for n in allowed if world_size % n == 0]
        problems.append(
            f"{tensor_is}: the world size {world_size} is not divisible by {tensor}; allowed: "
            f"{', '.join(map(str, fitting))}, or start a multiple of {tensor} ranks"
        )
    if config.parallel.sequence:
        sequence_is = f"parallel.sequence=true ({sources['parallel.sequence']})"
        if tensor == 1:
            problems.append(f"{sequence_is}: shards over tensor-parallel ranks; needs parallel.tensor of 2 or more")
        elif context == 1 and (config.block_size or 0) % tensor:
            problems.append(f"{sequence_is}: block_size={config.block_size} is not divisible by {tensor_is}")
    if context == 1 and config.parallel.context_method != ParallelConfig.context_method:
        method_is = f"parallel.context_method={config.parallel.context_method} ({sources['parallel.context_method']})"
        problems.append(f"{method_is}: is between ranks that share sequences; needs parallel.context of 2 or more")
    if context > 1:
        problems += [f"{context_is}: {problem}" for problem in _context_problems(config, is_model_sound=is_model_sound)]
    data_parallel_size = max(1, world_size // model_ranks)
    problems += _expert_problems(config, sources, data_parallel_size, is_model_sound=is_model_sound)
    return problems, data_parallel_size


def _context_problems(config: ExperimentConfig, *, is_model_sound: bool) -> list[str]:
    """Whatever forbids sequences divided over ``parallel.context`` ranks."""
    parallel, heads, length = config.parallel, config.model.num_attention_heads, config.block_size or 0
    context, tensor, problems = parallel.context, parallel.tensor, []
    if parallel.context_method == "ring":
        return _ring_problems(config)
    if is_model_sound and heads % tensor == 0 and heads // tensor % context:
        on_rank = heads // tensor
        divided = f"num_attention_heads={heads}"
        divided += f" / parallel.tensor={tensor}" if tensor > 1 else ""
        allowed = ", ".join(str(n) for n in range(1, on_rank + 1) if on_rank % n == 0)
        problems.append(
            f"{divided} is not divisible by it: in attention each of these ranks has whole heads; allowed: {allowed}, "
            "or --parallel.context_method ring"
        )
    if parallel.sequence and tensor > 1 and length % (context * tensor):
        problems.append(f"block_size={length} is not divisible by {context} x parallel.tensor={tensor} (sequence)")
    elif length % context:
        problems.append(f"block_size={length} is not divisible by it")
    return problems


def _ring_problems(config: ExperimentConfig) -> list[str]:
    """Whatever forbids sequences whose keys and values go round."""
    parallel, length, problems = config.parallel, config.block_size or 0, []
    pieces = 2 * parallel.context
    if length % pieces:
        problems.append(f"block_size={length} is not divisible by {pieces}: with ring each rank has two pieces of it")
    elif parallel.sequence and length // parallel.context % parallel.tensor:
        problems.append(
            f"block_size={length} is not divisible by {parallel.context} x parallel.tensor={parallel.tensor} (sequence)"
        )
    if config.model.attention_dropout > 0:
        problems.append(
            f"model.attention_dropout={config.model.attention_dropout}: ring draws no random numbers; set it to 0, or "
            "--parallel.context_method ulysses"
        )
    return problems


def _expert_problems(
    config: ExperimentConfig, sources: Mapping[str, str], data_parallel_size: int, *, is_model_sound: bool
) -> list[str]:
    expert = config.parallel.expert
    if expert <= 1 or not is_model_sound:
        return []
    expert_is = f"parallel.expert={expert} ({sources['parallel.expert']})"
    divisors = config.model.expert_parallel_divisors()
    if not divisors:
        return [f"{expert_is}: this model ({config.model_type}) has no experts to divide; allowed: 1"]
    if not pipeline_problems(config, sources):
        for stage, chunks in enumerate(stage_layers(config.model.num_layers, config.parallel)):
            if not any(config.model.has_experts(index) for layers in chunks for index in layers):
                return [
                    f"{expert_is}: pipeline stage {stage} would have no layer with experts, and all stages have to sum "
                    "the same gradient norms; give it one with --parallel.pipeline_layout, or fewer stages"
                ]
    context = config.parallel.context
    kind = "data-parallel" if context == 1 else "data- and context-parallel"
    counts = {**divisors, f"the number of {kind} ranks": data_parallel_size * context}
    allowed = [n for n in range(1, min(counts.values()) + 1) if all(count % n == 0 for count in counts.values())]
    return [
        f"{expert_is}: {name}={count} is not divisible by {expert}; allowed: {', '.join(map(str, allowed))}"
        for name, count in counts.items()
        if count % expert
    ]


def resolve_batch(
    config: ExperimentConfig, sources: dict[str, str], data_parallel_size: int
) -> tuple[ExperimentConfig, int, list[str]]:
    """Fill in ``batch_size`` and ``train.global_batch_size``; the second result is the number of microbatches.

    Of batch_size b, global_batch_size g and accumulation a, g = a * b * data-parallel ranks. A preset's b gives way:
    it is lowered to the largest divisor of g / ranks (or to what a leaves of it) where only g was asked for.
    """
    per_rank, global_size = config.batch_size, config.train.global_batch_size
    accumulation = config.train.gradient_accumulation_steps
    found = []
    for name, value in (
        ("batch_size", per_rank), ("train.global_batch_size", global_size),
        ("train.gradient_accumulation_steps", accumulation),
    ):  # fmt: skip
        if value is not None and value < 1:
            found.append(f"{name}={value} ({sources[name]}): must be 1 or more")
    if found or per_rank is None:
        return config, 1, found
    if global_size is None:
        accumulation = accumulation or 1
        global_size = accumulation * per_rank * data_parallel_size
        sources["train.global_batch_size"] = "from batch_size, ranks and accumulation"
    else:
        is_free = sources["batch_size"].startswith(("preset", "default"))
        samples = global_size // data_parallel_size
        global_is = f"train.global_batch_size={global_size} ({sources['train.global_batch_size']})"
        if global_size % data_parallel_size:
            found.append(f"{global_is}: not divisible by {data_parallel_size} data-parallel ranks")
        elif accumulation is None:
            if is_free:
                per_rank = max(d for d in range(1, min(per_rank, samples) + 1) if samples % d == 0)
                sources["batch_size"] += ", fitted to train.global_batch_size"
            accumulation = samples // per_rank
        elif is_free and samples % accumulation == 0:
            per_rank = samples // accumulation
            sources["batch_size"] = "from train.global_batch_size and accumulation"
        if not found and accumulation is not None and accumulation * per_rank * data_parallel_size != global_size:
            given = config.train.gradient_accumulation_steps
            product = f"batch_size={per_rank} ({sources['batch_size']}) x {data_parallel_size} data-parallel ranks"
            if given is None:
                found.append(f"{global_is}: not divisible by {product} = {per_rank * data_parallel_size}")
            else:
                source = sources["train.gradient_accumulation_steps"]
                found.append(
                    f"{global_is}: is not {product} x train.gradient_accumulation_steps={given} ({source}) = "
                    f"{per_rank * data_parallel_size * given}"
                )
    train = replace(config.train, global_batch_size=global_size)
    return replace(config, batch_size=per_rank, train=train), accumulation or 1, found

"""From a resolved configuration to a running trainer."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn

from gptoughts.checkpoint.manager import CheckpointManager
from gptoughts.config.experiment import ExperimentConfig, StabilityConfig
from gptoughts.config.resolve import Experiment
from gptoughts.data.corpus import CorpusInfo
from gptoughts.data.loader import StepLoader
from gptoughts.data.pretrain import build_samples, build_validation_samples
from gptoughts.data.tokenizer import load_tokenizer
from gptoughts.engine.deepspeed_engine import TrainEngine, construction_context, gathered
from gptoughts.engine.interface import ForwardOutput
from gptoughts.errors import ConfigError, DataError
from gptoughts.models.expert_load import finish_step
from gptoughts.models.flops import flops_per_token
from gptoughts.models.fp8 import check_products, initial_of_state
from gptoughts.models.registry import FAMILIES
from gptoughts.models.stages import all_names, build_stages, shared_embedding_weight, stage_buffers, stage_parameters
from gptoughts.objectives.base import ModelInputs, Objective
from gptoughts.objectives.multi_token import MultiTokenLoss
from gptoughts.parallel import groups
from gptoughts.platform import device
from gptoughts.precision.amax_report import REPORT_FILE, kept_words
from gptoughts.precision.backend import backend_problems, choose_backend
from gptoughts.training.callbacks import (
    Callback,
    CheckpointCallback,
    MetricsCallback,
    ProgressCallback,
    ValidationCallback,
)
from gptoughts.training.evaluate import TARGET_BYTES, Validator, bytes_of
from gptoughts.training.events import EventsFile
from gptoughts.training.fallback import Fp8Fallback
from gptoughts.training.fp8_callback import Fp8Callback
from gptoughts.training.metrics import MetricsFile
from gptoughts.training.offload import swap_problems
from gptoughts.training.origin import find_origin
from gptoughts.training.recovery import Recovery
from gptoughts.training.trainer import Trainer, TrainState

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class ForwardStep:
    """One microbatch through the model to its loss: what the engine calls."""

    objective: Objective
    token_bytes: torch.Tensor
    multi_token_loss: MultiTokenLoss

    def __call__(self, chunk: nn.Module, inputs: ModelInputs) -> ForwardOutput | torch.Tensor:
        output = chunk(
            inputs.input_ids,
            inputs.position_ids,
            inputs.attention_mask,
            labels=inputs.labels,
            selected_positions=inputs.selected_positions,
            is_padding=inputs.is_padding,
        )
        if not chunk.post_process:
            return output
        own_part: Any = chunk.own_part
        # Losses are those of this rank's part of each sequence; the engine sums over all parts.
        labels, is_counted, weights = map(own_part, (inputs.labels, inputs.is_counted, inputs.loss_weights))
        extras = {TARGET_BYTES: bytes_of(labels, is_counted, self.token_bytes)}
        if output.dim() == labels.dim():
            return ForwardOutput(self.objective.reduce(output, weights), extras)
        # A model with multi-token prediction, in training: the main loss first, then one per depth.
        auxiliary_sum, further_extras = self.multi_token_loss(output[1:], inputs, own_part)
        loss_sum = self.objective.reduce(output[0], weights)
        return ForwardOutput(loss_sum, extras | further_extras, auxiliary_sum)


def precision(config: ExperimentConfig) -> str:
    """Precision of forward and backward of a resolved configuration."""
    assert config.train.precision is not None
    return config.train.precision


def seq_length(config: ExperimentConfig) -> int:
    """Tokens per sample of a resolved configuration."""
    assert config.block_size is not None
    return config.block_size


def micro_batch_size(config: ExperimentConfig) -> int:
    """Samples per microbatch and data-parallel rank of a resolved configuration."""
    assert config.batch_size is not None
    return config.batch_size


_MONITOR_PACKAGES = {"wandb": "wandb", "tensorboard": "tensorboard"}
"""Block of DeepSpeed's JSON -> package that it needs."""


def is_monitored(experiment: Experiment, name: str) -> bool:
    """Whether the JSON switches a monitor on."""
    return bool(experiment.deepspeed.get(name, {}).get("enabled"))


def check_machine(experiment: Experiment) -> None:
    """The second pass over the configuration: what only the device and the installation can tell.

    Raises:
        ConfigError: the device cannot run what was asked for, or a package is missing.
    """
    config, problems = experiment.config, []
    if not device.supports_precision(DTYPES[precision(config)]):
        problems.append(
            f"train.precision={precision(config)}: {device.describe()} cannot run it; allowed here: fp32, bf16"
        )
    for name, package in _MONITOR_PACKAGES.items():
        if is_monitored(experiment, name) and importlib.util.find_spec(package) is None:
            problems.append(
                f"{config.deepspeed_config}: {name}.enabled=true needs the package {package!r}, which is not "
                f"installed; pip install {package}, or switch it off"
            )
    problems += swap_problems(experiment)
    problems += backend_problems(config, experiment.sources)
    if config.use_fp8:
        if config.log.fp8 and choose_backend(config).name == "te":
            problems.append(
                f"log.fp8=true ({experiment.sources['log.fp8']}): Transformer Engine's kernels do not say what their "
                "casts lose; a run with fp8.backend=emulated does"
            )
        try:
            kept_words(config.fp8)
        except DataError as error:
            problems += [f"fp8.report={config.fp8.report}: {line}" for line in error.problems]
    if problems:
        raise ConfigError(problems)


def describe_fp8(config: ExperimentConfig) -> list[str]:
    """Which backend FP8 took, and why: a line, where it is on."""
    if not config.use_fp8:
        return []
    choice, section = choose_backend(config), config.fp8
    kept = ", ".join(kept_words(section))
    return [
        f"FP8 {section.format}, {section.recipe} scaling, backend {choice.name}: {choice.reason}; out of FP8: {kept}"
    ]


def read_token_bytes(tokenizer: str | None, size: int) -> torch.Tensor:
    """UTF-8 bytes of each token id, int64 [size] on the device; zeros where there is no tokenizer or no such id."""
    table = torch.zeros(size, dtype=torch.int64)
    if tokenizer is not None:
        lengths = torch.from_numpy(load_tokenizer(tokenizer).token_byte_lengths())
        table[: len(lengths)] = lengths[:size]
    return table.to(device.current_device())


def build_engine(experiment: Experiment, token_bytes: torch.Tensor) -> tuple[TrainEngine, Objective, dict[str, Any]]:
    """Model, objective and engine of an experiment; the model-parallel groups exist.

    Returns:
        The engine, the objective, and this rank's parameters by global name.
    Collective: every rank of the world.
    """
    config = experiment.config
    family = FAMILIES[config.model_type]
    objective = family.load_objective_builder()(config)
    dtype = DTYPES[precision(config)]
    chunks = build_stages(
        family.load_model_builder(),
        config,
        params_dtype=dtype,
        construction_context=construction_context(experiment.deepspeed, dtype),
        gathered=gathered,
    )
    check_products(chunks, config, all_names)
    names = stage_parameters(chunks)
    engine = TrainEngine(
        chunks,
        ForwardStep(objective, token_bytes, MultiTokenLoss(config.model.mtp_scaling_factor())),
        config.optim,
        experiment.deepspeed,
        parameter_names=names,
        seq_length=seq_length(config),
        named_buffers=lambda: stage_buffers(chunks),
        initial_of_buffer=initial_of_state,
        after_step=lambda is_applied: finish_step(chunks, is_applied=is_applied),
        shared_embedding_weight=shared_embedding_weight(chunks),
    )
    return engine, objective, names


def build_validation(config: ExperimentConfig, corpus: CorpusInfo, objective: Objective) -> ValidationCallback | None:
    """The validation callback, where there is a validation corpus. Collective: every rank of the world."""
    if not corpus.valid:
        return None
    samples = build_validation_samples(
        corpus.valid,
        seq_length=seq_length(config),
        num_extra_tokens=objective.num_extra_tokens,
        cache_dir=config.data.cache_dir,
    )
    wanted = config.train.valid_samples
    num_samples = len(samples) if wanted < 0 else min(wanted, len(samples))
    validator = Validator(
        samples,
        num_samples,
        objective=objective.for_validation(num_samples),
        batch_size=micro_batch_size(config),
        data_parallel_rank=groups.data_parallel_rank(),
        data_parallel_size=groups.data_parallel_size(),
        device=device.current_device(),
        microbatches_per_step=groups.pipeline_parallel_size(),
    )
    return ValidationCallback(validator, config.train.valid_interval_steps)


def build_loader(experiment: Experiment, corpus: CorpusInfo, objective: Objective, state: TrainState) -> StepLoader:
    """The training data from where the run stands. Collective: every rank of the world (index caches)."""
    config = experiment.config
    samples = build_samples(
        corpus.train,
        seq_length=seq_length(config),
        num_extra_tokens=objective.num_extra_tokens,
        seed=config.seed,
        cache_dir=config.data.cache_dir,
    )
    return StepLoader(
        samples,
        micro_batch_size=micro_batch_size(config),
        num_microbatches=experiment.num_microbatches,
        data_parallel_rank=groups.data_parallel_rank(),
        data_parallel_size=groups.data_parallel_size(),
        consumed_samples=state.consumed_samples,
        prefetch_steps=config.data.prefetch_steps,
        vocab_size=config.model.vocab_size,
        skipped=state.skipped_samples,
    )


def build_guard(
    config: StabilityConfig,
    state: TrainState,
    engine: TrainEngine,
    manager: CheckpointManager,
    names: Sequence[str],
    say: Callable[[str], None],
    fp8: Fp8Fallback | None,
) -> Recovery | None:
    """What watches over a run; None where it is switched off."""
    if not config.enabled:
        return None

    def look(trainer: Trainer) -> dict[str, Any]:
        return find_origin(trainer, engine.chunks, names)

    events = EventsFile(manager.run) if dist.get_rank() == 0 else None
    find = look if config.replay else None
    return Recovery(config, state, manager=manager, names=names, say=say, events=events, find_origin=find, fp8=fp8)


def build_callbacks(
    experiment: Experiment,
    engine: TrainEngine,
    validation: ValidationCallback | None,
    manager: CheckpointManager,
    state: TrainState,
    console: Console,
) -> list[Callback]:
    """Validation first, so that metrics can show it; checkpoints last, so that they hold the whole step."""
    config = experiment.config
    is_first = dist.get_rank() == 0
    family = FAMILIES[config.model_type]
    metrics = MetricsCallback(
        file=MetricsFile(manager.run, resumed_step=state.step) if is_first else None,
        monitor=engine.monitor_events,
        interval_steps=config.log.interval_steps,
        flops_per_token=flops_per_token(family, config.model, seq_length(config)),
        peak_flops_per_second=device.peak_tflops(DTYPES[precision(config)]) * 1e12 * dist.get_world_size(),
        memory_bytes=device.memory_bytes,
        validation=validation,
    )
    callbacks: list[Callback] = [validation] if validation is not None else []
    callbacks.append(metrics)
    if is_first:
        is_live = config.log.progress == "always" or (config.log.progress == "auto" and sys.stdout.isatty())
        callbacks.append(
            ProgressCallback(
                console,
                is_live=is_live,
                total_steps=config.train.steps,
                interval_steps=config.log.interval_steps,
                metrics=metrics,
            )
        )
    if config.log.fp8:
        file = MetricsFile(manager.run, resumed_step=state.step, name=REPORT_FILE) if is_first else None
        callbacks.append(Fp8Callback(engine.chunks, file, config.log.interval_steps))
    callbacks.append(
        CheckpointCallback(
            manager,
            config.checkpoint.interval_steps,
            console.print,
            is_asynchronous=config.checkpoint.asynchronous,
        )
    )
    return callbacks

"""From a resolved configuration to a running trainer."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn

from gptoughts.checkpoint.manager import CheckpointManager
from gptoughts.config.cli import to_yaml
from gptoughts.config.experiment import ExperimentConfig
from gptoughts.config.resolve import Experiment
from gptoughts.data.corpus import CorpusInfo, inspect_corpus
from gptoughts.data.loader import StepLoader
from gptoughts.data.pretrain import build_samples, build_validation_samples
from gptoughts.data.tokenizer import load_tokenizer, tokenizer_file
from gptoughts.engine.lr_schedule import build_schedule
from gptoughts.engine.deepspeed_engine import TrainEngine, construction_context, gathered
from gptoughts.engine.interface import ForwardOutput
from gptoughts.errors import CheckpointError, ConfigError
from gptoughts.models.flops import count_parameters, flops_per_token
from gptoughts.models.language_model import global_parameter_names
from gptoughts.models.registry import FAMILIES
from gptoughts.objectives.base import ModelInputs, Objective
from gptoughts.parallel import groups
from gptoughts.platform import determinism, device
from gptoughts.training.callbacks import (
    Callback,
    CheckpointCallback,
    MetricsCallback,
    ProgressCallback,
    ValidationCallback,
)
from gptoughts.training.evaluate import TARGET_BYTES, Validator, bytes_of
from gptoughts.training.metrics import METRICS_FILE, MetricsFile
from gptoughts.training.plot import draw_runs
from gptoughts.training.signals import StopRequests
from gptoughts.training.trainer import Trainer, TrainState

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_RUN_ONLY_FIELDS = ("attention_dropout", "hidden_dropout", "init_method_std", "seq_length")
"""Fields of a model's configuration that may change between a checkpoint and its resumption."""


def model_identity(config: ExperimentConfig) -> dict[str, Any]:
    """What a checkpoint's model must agree on with the present one."""
    fields = dataclasses.asdict(config.model)
    return {"model_type": config.model_type} | {k: v for k, v in fields.items() if k not in _RUN_ONLY_FIELDS}


@dataclass(frozen=True)
class ForwardStep:
    """One microbatch through the model to its loss: what the engine calls."""

    objective: Objective
    token_bytes: torch.Tensor

    def __call__(self, chunk: nn.Module, inputs: ModelInputs) -> ForwardOutput:
        per_token_loss = chunk(inputs.input_ids, inputs.position_ids, None, labels=inputs.labels)
        loss_sum = self.objective.reduce(per_token_loss, inputs.loss_weights)
        return ForwardOutput(loss_sum, {TARGET_BYTES: bytes_of(inputs.labels, inputs.loss_weights, self.token_bytes)})


def precision(config: ExperimentConfig) -> str:
    """Precision of forward and backward of a resolved configuration."""
    assert config.train.precision is not None
    return config.train.precision


def seq_length(config: ExperimentConfig) -> int:
    """Tokens per sample of a resolved configuration."""
    assert config.block_size is not None
    return config.block_size


def check_device(config: ExperimentConfig) -> None:
    """The second pass over the configuration: what only the device can tell.

    Raises:
        ConfigError: the device cannot run what was asked for.
    """
    if not device.supports_precision(DTYPES[precision(config)]):
        raise ConfigError(f"train.precision={precision(config)}: {device.describe()} cannot run it; allowed here: fp32, bf16")


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
        The engine, the objective, and the parameters by global name.
    Collective: every rank of the world.
    """
    config = experiment.config
    family = FAMILIES[config.model_type]
    objective = family.load_objective()()
    dtype = DTYPES[precision(config)]
    model = family.load_model_builder()(
        config,
        params_dtype=dtype,
        construction_context=construction_context(experiment.deepspeed, dtype),
        gathered=gathered,
    )
    names = global_parameter_names(model)
    engine = TrainEngine(
        [model],
        ForwardStep(objective, token_bytes),
        config.optim,
        experiment.deepspeed,
        parameter_names=names,
    )
    return engine, objective, names


def open_run(config: ExperimentConfig) -> Path:
    """Make the run's folder and store the resolved configuration in it (rank 0); all ranks learn of a failure.

    Raises:
        CheckpointError: on every rank, where the folder cannot be written.
    Collective: every rank of the world.
    """
    run = Path(config.output_dir)
    problem: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            run.mkdir(parents=True, exist_ok=True)
            (run / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        except OSError as error:
            problem = [f"output_dir={run}: cannot be written: {error.strerror}"]
    dist.broadcast_object_list(problem, src=0)
    if problem[0]:
        raise CheckpointError(problem[0])
    return run


def build_validation(
    config: ExperimentConfig, corpus: CorpusInfo, objective: Objective
) -> ValidationCallback | None:
    """The validation callback, where there is a validation corpus. Collective: every rank of the world."""
    if not corpus.valid:
        return None
    samples = build_validation_samples(
        corpus.valid,
        seq_length=seq_length(config),
        num_extra_tokens=objective.num_extra_tokens,
        cache_dir=config.data.cache_dir,
    )
    validator = Validator(
        samples,
        config.train.valid_samples,
        objective=objective,
        batch_size=config.batch_size,
        data_parallel_rank=groups.data_parallel_rank(),
        data_parallel_size=groups.data_parallel_size(),
        device=device.current_device(),
    )
    return ValidationCallback(validator, config.train.valid_interval_steps)


def run(experiment: Experiment) -> int:
    """Train as configured; returns the exit status.

    Raises:
        GptoughtsError: whatever the user can mend.
    Collective: every rank of the world.
    """
    config = experiment.config
    check_device(config)
    with StopRequests() as stop:
        if config.train.deterministic:
            determinism.enable()
        is_world_ours = not dist.is_initialized()
        groups.initialize(config.parallel, seed=config.seed)
        try:
            return _run(experiment, stop)
        finally:
            if is_world_ours:
                groups.destroy()


def _run(experiment: Experiment, stop: StopRequests) -> int:
    config = experiment.config
    console = Console(quiet=dist.get_rank() != 0, highlight=False, soft_wrap=True)
    run_folder = open_run(config)
    corpus = inspect_corpus(config.data, seq_length=seq_length(config))
    console.print(to_yaml(config).rstrip())
    for line in announcement(experiment, corpus):
        console.print(line)
    token_bytes = read_token_bytes(corpus.tokenizer, config.model.padded_vocab_size)
    engine, objective, names = build_engine(experiment, token_bytes)
    manager = CheckpointManager(
        run_folder,
        config.checkpoint.keep_last,
        to_yaml(config),
        model_identity(config),
        tokenizer_file(corpus.tokenizer) if corpus.tokenizer else None,
    )
    state = TrainState()
    reader = manager.find(config.resume)
    if reader is not None:
        saved = manager.restore(reader, engine, list(names))
        state = TrainState(**{key: saved[key] for key in state.as_dict()})
        console.print(f"resumed from {reader.folder} (step {state.step})")
    validation = build_validation(config, corpus, objective)
    callbacks = build_callbacks(experiment, engine, validation, manager, state, console)
    trainer = Trainer(
        engine=engine,
        objective=objective,
        loader=build_loader(experiment, corpus, objective, state),
        learning_rate=build_schedule(config.optim, steps=config.train.steps),
        state=state,
        last_step=min(config.train.steps, config.train.stop_after_steps or config.train.steps),
        device=device.current_device(),
        samples_per_step=experiment.samples_per_step,
        sequence_length_tokens=seq_length(config),
        stop_requested=lambda: stop.is_requested,
        callbacks=callbacks,
    )
    if state.step >= trainer.last_step:
        console.print(f"all {state.step} steps are done already; a larger --train.steps extends the run")
    try:
        trainer.train()
    finally:
        trainer.loader.close()
    for line in conclusion(config, trainer, validation, stop.reason):
        console.print(line)
    return 0


def build_loader(
    experiment: Experiment, corpus: CorpusInfo, objective: Objective, state: TrainState
) -> StepLoader:
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
        micro_batch_size=config.batch_size,
        num_microbatches=experiment.num_microbatches,
        data_parallel_rank=groups.data_parallel_rank(),
        data_parallel_size=groups.data_parallel_size(),
        consumed_samples=state.consumed_samples,
        prefetch_steps=config.data.prefetch_steps,
        vocab_size=config.model.vocab_size,
    )


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
    callbacks.append(CheckpointCallback(manager, config.checkpoint.interval_steps, console.print))
    return callbacks


def announcement(experiment: Experiment, corpus: CorpusInfo) -> list[str]:
    """What the terminal says before the first step."""
    config = experiment.config
    count = count_parameters(FAMILIES[config.model_type], config.model)
    accumulated = f", {experiment.num_microbatches} microbatches" if experiment.num_microbatches > 1 else ""
    return [
        f"{config.model_type} {config.size}: {count.total:,} parameters, {precision(config)}, "
        f"ZeRO stage {experiment.zero_stage}",
        f"{device.describe()}, {dist.get_world_size()} rank(s): tensor {config.parallel.tensor}, "
        f"data {experiment.data_parallel_size}",
        f"{experiment.samples_per_step} samples of {seq_length(config)} tokens per step{accumulated}; corpus of "
        f"{corpus.num_train_tokens:,} tokens",
    ]


def conclusion(
    config: ExperimentConfig, trainer: Trainer, validation: ValidationCallback | None, stop_reason: str | None
) -> list[str]:
    """What the terminal says when a run is over; draws the loss curve on the way."""
    lines = []
    run = Path(config.output_dir)
    if trainer.was_stopped:
        why = stop_reason or "a request on another rank"
        lines.append(f"stopped at step {trainer.state.step} by {why}; the same command goes on from there")
    if validation is not None and validation.last is not None:
        found = validation.last
        per_byte = "" if found.bits_per_byte is None else f", {found.bits_per_byte:.4f} bits per byte"
        lines.append(
            f"validation loss {found.nats_per_token:.4f} nats per token{per_byte} ({found.num_samples} samples)"
        )
    if config.log.plot and dist.get_rank() == 0 and (run / METRICS_FILE).stat().st_size:
        lines.append(f"loss curve {draw_runs([run], run / 'loss.png')}")
    lines.append(f"run folder {run}")
    return lines

"""One run on this rank: set up, resume, train, conclude."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist
from rich.console import Console

from gptoughts.checkpoint.manager import CheckpointManager
from gptoughts.config.cli import to_yaml
from gptoughts.config.experiment import ExperimentConfig
from gptoughts.config.resolve import Experiment
from gptoughts.data.corpus import CorpusInfo, inspect_corpus
from gptoughts.data.tokenizer import with_special_tokens
from gptoughts.engine.lr_schedule import build_schedule
from gptoughts.errors import CheckpointError, DataError
from gptoughts.models.flops import count_parameters
from gptoughts.models.registry import FAMILIES
from gptoughts.parallel import groups
from gptoughts.platform import determinism, device
from gptoughts.platform.extension_locks import clear_stale_locks
from gptoughts.training.callbacks import ValidationCallback
from gptoughts.training.metrics import METRICS_FILE
from gptoughts.training.plot import draw_runs
from gptoughts.training.setup import (
    build_callbacks,
    build_engine,
    build_loader,
    build_validation,
    check_device,
    model_identity,
    precision,
    read_token_bytes,
    seq_length,
)
from gptoughts.training.signals import StopRequests
from gptoughts.training.trainer import Callback, Trainer, TrainState


def run(experiment: Experiment, *, extra_callbacks: Sequence[Callback] = ()) -> int:
    """Train as configured; returns the exit status.

    Args:
        experiment: What to do.
        extra_callbacks: Run after our own, on every rank.
    Raises:
        GptoughtsError: whatever the user can mend.
    Collective: every rank of the world.
    """
    config = experiment.config
    check_device(config)
    if not device.is_cuda():
        clear_stale_locks()
    with StopRequests() as stop:
        if config.train.deterministic:
            determinism.enable()
        is_world_ours = not dist.is_initialized()
        groups.initialize(config.parallel, seed=config.seed)
        try:
            return _run(experiment, stop, extra_callbacks)
        finally:
            if is_world_ours:
                groups.destroy()


def _run(experiment: Experiment, stop: StopRequests, extra_callbacks: Sequence[Callback]) -> int:
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
        carried_tokenizer(config, corpus, run_folder),
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
        callbacks=[*callbacks, *extra_callbacks],
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


def carried_tokenizer(config: ExperimentConfig, corpus: CorpusInfo, run: Path) -> Path | None:
    """The tokenizer that checkpoints carry: the corpus's, with the special tokens that the model adds to it.

    Raises:
        DataError: on every rank, where the tokenizer cannot have them.
    Collective: every rank of the world.
    """
    if corpus.tokenizer is None:
        return None
    found: list[Path | list[str] | None] = [None]
    if dist.get_rank() == 0:
        try:
            tokens = config.model.special_tokens()
            found = [with_special_tokens(corpus.tokenizer, tokens, run / "tokenizer")]
        except DataError as error:
            found = [error.problems]
        except OSError as error:
            found = [[f"{run / 'tokenizer'}: cannot be written: {error.strerror}"]]
    dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], list):
        raise DataError(found[0])
    return found[0]


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

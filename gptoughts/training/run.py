"""One run on this rank: set up, resume, train, conclude."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch.distributed as dist
from rich.console import Console

from gptoughts.checkpoint import layout
from gptoughts.checkpoint.identity import model_identity
from gptoughts.checkpoint.manager import CheckpointManager
from gptoughts.config.cli import to_yaml
from gptoughts.config.experiment import ExperimentConfig
from gptoughts.config.resolve import Experiment
from gptoughts.data.corpus import CorpusInfo, inspect_corpus
from gptoughts.data.tokenizer import with_special_tokens
from gptoughts.engine.lr_schedule import build_schedule
from gptoughts.errors import DataError, GptoughtsError
from gptoughts.models.flops import count_parameters
from gptoughts.models.registry import FAMILIES
from gptoughts.models.stages import all_names
from gptoughts.parallel import groups
from gptoughts.parallel.heartbeat import Heartbeat, is_communication_error
from gptoughts.platform import determinism, device
from gptoughts.platform.extension_locks import clear_stale_locks
from gptoughts.training.callbacks import ValidationCallback
from gptoughts.training.fallback import Fp8Fallback, left_fp8
from gptoughts.training.initial_weights import load_initial_weights
from gptoughts.training.metrics import METRICS_FILE
from gptoughts.training.plot import draw_runs
from gptoughts.training.run_folder import on_rank_zero, open_run, set_aside
from gptoughts.training.setup import (
    build_callbacks,
    build_engine,
    build_guard,
    build_loader,
    build_validation,
    check_machine,
    describe_fp8,
    is_monitored,
    precision,
    read_token_bytes,
    seq_length,
)
from gptoughts.training.signals import StopRequests
from gptoughts.training.summary import describe_ranks, describe_stages
from gptoughts.training.trainer import Callback, Trainer, TrainState


def run(
    experiment: Experiment,
    *,
    launchers: Sequence[psutil.Process] | None = None,
    extra_callbacks: Sequence[Callback] = (),
) -> int:
    """Train as configured; returns the exit status.

    Args:
        experiment: What to do.
        launchers: As ``signals.launcher_ancestors`` found them when the process began; unset: it looks now.
        extra_callbacks: Run after our own, on every rank.
    Raises:
        GptoughtsError: whatever the user can mend.
    Collective: every rank of the world.
    """
    config = experiment.config
    check_machine(experiment)
    if not device.is_cuda():
        clear_stale_locks()
    with StopRequests(launchers) as stop:
        if config.train.deterministic:
            determinism.enable()
        is_world_ours = not dist.is_initialized()
        groups.initialize(config.parallel, seed=config.seed)
        heartbeat = Heartbeat(
            groups.rendezvous_store(),
            rank=dist.get_rank(),
            # Who made the world watches over it.
            world_size=dist.get_world_size() if is_world_ours else 1,
            timeout_seconds=config.parallel.heartbeat_seconds,
        )
        try:
            with heartbeat, open_run(Path(config.output_dir)) as run_folder:
                return _run_watched(experiment, run_folder, stop, extra_callbacks, heartbeat)
        finally:
            if is_world_ours:
                groups.destroy()


def _run_watched(
    experiment: Experiment,
    run_folder: Path,
    stop: StopRequests,
    extra_callbacks: Sequence[Callback],
    heartbeat: Heartbeat,
) -> int:
    try:
        status = _run(experiment, run_folder, stop, extra_callbacks)
        # The store lives with rank 0 (or its launcher): nobody leaves while others need it.
        dist.barrier()
        return status
    except GptoughtsError:
        raise
    except RuntimeError as error:
        if is_communication_error(error):
            heartbeat.raise_if_lost(wait=True)
        raise


def _run(experiment: Experiment, run_folder: Path, stop: StopRequests, extra_callbacks: Sequence[Callback]) -> int:
    config = experiment.config
    console = Console(quiet=dist.get_rank() != 0, highlight=False, soft_wrap=True)
    corpus = inspect_corpus(config.data, seq_length=seq_length(config))
    console.print(to_yaml(config).rstrip())
    for line in announcement(experiment, corpus):
        console.print(line)
    token_bytes = read_token_bytes(corpus.tokenizer, config.model.padded_vocab_size)
    if is_monitored(experiment, "wandb"):
        # DeepSpeed hands wandb no folder (monitor/wandb.py, 0.19.8), and wandb falls back to the current one.
        folder = run_folder / "monitor"
        on_rank_zero(run_folder, lambda: folder.mkdir(exist_ok=True))
        os.environ.setdefault("WANDB_DIR", str(folder.absolute()))
    engine, objective, parameters = build_engine(experiment, token_bytes)
    names = all_names(list(parameters))
    manager = CheckpointManager(
        run_folder,
        config.checkpoint.keep_last,
        to_yaml(config),
        model_identity(config),
        carried_tokenizer(config, corpus, run_folder),
        config.model.LATER_FIELDS,
    )
    state = TrainState()
    reader = manager.find(config.resume)
    fp8 = Fp8Fallback(engine.chunks, all_names, config.model.num_layers) if config.use_fp8 else None
    if reader is not None:
        if fp8 is not None:
            fp8.keep_out(left_fp8(reader))
        saved = manager.restore(reader, engine, names)
        state = TrainState.read(saved)
        console.print(f"resumed from {reader.folder} (step {state.step})")
        if config.init_from is not None:
            console.print(f"init_from {config.init_from} is not read again: this run has a checkpoint of its own")
    elif config.init_from is not None:
        source = load_initial_weights(Path(config.init_from), engine, names, config.model)
        console.print(f"starts from the weights of {source}, at step 0 with a fresh optimizer")

    def claim() -> None:
        aside = set_aside(run_folder, resumed_from=reader.folder if reader else None, step=state.step)
        if aside is not None:
            console.print(f"checkpoints that this run does not go on from are in {aside} now")
        layout.write_atomically(run_folder / layout.CONFIG, to_yaml(config))

    on_rank_zero(run_folder, claim)
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
        guard=build_guard(config.stability, state, engine, manager, names, console.print, fp8),
    )
    if state.step >= trainer.last_step:
        option = "train.steps" if state.step >= config.train.steps else "train.stop_after_steps"
        console.print(f"all {state.step} steps are done already; a larger --{option} extends the run")
    try:
        trainer.train()
    finally:
        trainer.loader.close()
    for line in conclusion(config, trainer, validation, stop.reason):
        console.print(line)
    return 0


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
            roles = {role: token_id for role, token_id in config.model.token_roles().items() if token_id is not None}
            tokens = config.model.special_tokens()
            found = [with_special_tokens(corpus.tokenizer, tokens, run / "tokenizer", roles)]
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
    further = f" and {count.mtp:,} in multi-token prediction" if count.mtp else ""
    accumulated = f", {experiment.num_microbatches} microbatches" if experiment.num_microbatches > 1 else ""
    return [
        f"{config.model_type} {config.size}: {count.total:,} parameters{further}, {precision(config)}, "
        f"ZeRO stage {experiment.zero_stage}",
        f"{device.describe()}, {dist.get_world_size()} rank(s): {describe_ranks(experiment)}",
        *describe_stages(experiment),
        *describe_fp8(config),
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
        command = "the same command" if config.resume == "auto" else "the same command with --resume auto"
        lines.append(f"stopped at step {trainer.state.step} by {why}; {command} goes on from there")
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

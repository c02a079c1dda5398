"""The training loop: steps, and callbacks around them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch

from gptoughts.data.loader import Batch, SampleRange, StepLoader
from gptoughts.engine.interface import Engine, StepResult
from gptoughts.objectives.base import ModelInputs, Objective
from gptoughts.training.stability import GuardState

STOP_FLAG = "stop"


@dataclass
class TrainState:
    """Where a run stands; saved with every checkpoint."""

    step: int = 0
    """Optimizer steps done (skipped ones included)."""
    consumed_samples: int = 0
    """Position in the data order, from which it goes on: samples read, and those left out on the way."""
    consumed_tokens: int = 0
    """Tokens read."""
    seconds: float = 0.0
    """Time spent in steps, over all resumptions."""
    skipped_samples: list[SampleRange] = field(default_factory=list)
    """Ranges of samples that a recovery left out: together with the seed they say which sample comes when."""
    guard: GuardState = field(default_factory=GuardState)
    """What the stability guard remembers."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)

    @classmethod
    def read(cls, saved: Mapping[str, Any]) -> TrainState:
        """From :meth:`as_dict`, also of a version with fewer fields."""
        known = {name: value for name, value in saved.items() if name in cls.__dataclass_fields__}
        known["skipped_samples"] = [(first, stop) for first, stop in known.get("skipped_samples", [])]
        return cls(**{**known, "guard": GuardState.read(known.get("guard", {}))})


@dataclass(frozen=True)
class StepReport:
    """One finished step, as callbacks see it."""

    result: StepResult
    lr: float
    step_seconds: float
    """Wall time of the whole step, data included."""
    data_seconds: float
    """Part of it spent waiting for data."""
    num_tokens: int
    """Tokens of the global batch."""
    num_samples: int
    """Samples of the global batch."""


class Callback:
    """Something that happens around steps; every method runs on every rank, in the order of the list."""

    def on_train_start(self, trainer: Trainer) -> None:
        """Before the first step."""

    def flags(self) -> Mapping[str, float]:
        """Numbers that ride on the next step's reduction; ``report.result.flags`` has their sums over all ranks."""
        return {}

    def on_step_end(self, trainer: Trainer, report: StepReport) -> None:
        """After each step."""

    def before_rollback(self, trainer: Trainer) -> None:
        """Before the run is taken back to an earlier step; ``on_step_end`` is not called for the step at fault."""

    def after_rollback(self, trainer: Trainer) -> None:
        """``trainer.state`` says where the run goes on from."""

    def on_train_end(self, trainer: Trainer) -> None:
        """After the last step, or the one at which the run was asked to stop."""


class StepGuard(Protocol):
    """What the loop asks around each step (``training.recovery.Recovery``)."""

    def lr_factor(self, step: int) -> float:
        """What the scheduled learning rate of a step is multiplied by."""

    def begin_step(self, trainer: Trainer) -> None:
        """Before the forward of a step."""

    def judge(self, loss: float, grad_norm: float) -> bool:
        """Whether its update is to be applied (``engine.interface.Judge``)."""

    def end_step(self, trainer: Trainer, report: StepReport) -> bool:
        """After it; True where the run was taken back to an earlier step. Collective: every rank of the world."""


class Trainer:
    """Runs steps until the run's end, ``stop_after_steps`` or a request to stop.

    Args:
        engine: Does forward, backward and update.
        objective: Turns rows into microbatches.
        loader: Yields each step's batches for this data-parallel rank.
        learning_rate: Step number (from 0) to learning rate.
        state: Where the run stands.
        last_step: Step after which this process leaves.
        device: Where microbatches go.
        samples_per_step: Global batch size.
        sequence_length_tokens: Tokens per sample.
        stop_requested: Whether this rank was asked to stop.
        callbacks: In the order in which they run.
        guard: Judges each step before its update, and takes the run back where it went wrong.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        objective: Objective,
        loader: StepLoader,
        learning_rate: Callable[[int], float],
        state: TrainState,
        last_step: int,
        device: torch.device,
        samples_per_step: int,
        sequence_length_tokens: int,
        stop_requested: Callable[[], bool],
        callbacks: Sequence[Callback],
        guard: StepGuard | None = None,
    ) -> None:
        self.engine = engine
        self.objective = objective
        self.loader = loader
        self.learning_rate = learning_rate
        self.state = state
        self.last_step = last_step
        self.device = device
        self.samples_per_step = samples_per_step
        self.sequence_length_tokens = sequence_length_tokens
        self.stop_requested = stop_requested
        self.callbacks = list(callbacks)
        self.guard = guard
        self.batches: list[Batch] = []
        """Microbatches of the latest step on this data-parallel rank, as rows ..."""
        self.microbatches: list[ModelInputs] = []
        """... and as the engine got them."""
        self.was_stopped = False
        """Whether a request ended the run before its last step (equal on all ranks)."""

    def train(self) -> None:
        """Run all steps. Collective: every rank of the world."""
        for callback in self.callbacks:
            callback.on_train_start(self)
        while self.state.step < self.last_step and not self.was_stopped:
            report = self._train_step()
            self.was_stopped = report.result.flags[STOP_FLAG] > 0
            if self.guard is not None and self.guard.end_step(self, report):
                continue
            for callback in self.callbacks:
                callback.on_step_end(self, report)
        for callback in self.callbacks:
            callback.on_train_end(self)

    def _train_step(self) -> StepReport:
        started = time.perf_counter()
        self.batches = self.loader.next_step()
        data_seconds = time.perf_counter() - started
        self.microbatches = [self.objective.prepare(b.tokens, b.sample_indices).to(self.device) for b in self.batches]
        lr = self.learning_rate(self.state.step)
        flags = {STOP_FLAG: float(self.stop_requested())}
        for callback in self.callbacks:
            flags |= callback.flags()
        if self.guard is None:
            result = self.engine.train_step(self.microbatches, lr=lr, flags=flags)
        else:
            lr *= self.guard.lr_factor(self.state.step)
            self.guard.begin_step(self)
            result = self.engine.train_step(self.microbatches, lr=lr, flags=flags, judge=self.guard.judge)
        seconds = time.perf_counter() - started
        num_tokens = self.samples_per_step * self.sequence_length_tokens
        self.state.step += 1
        self.state.consumed_samples = self.loader.consumed_samples
        self.state.consumed_tokens += num_tokens
        self.state.seconds += seconds
        return StepReport(result, lr, seconds, data_seconds, num_tokens, self.samples_per_step)

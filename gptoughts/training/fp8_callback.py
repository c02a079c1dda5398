"""``--log.fp8``: a line per layer and role in ``fp8.jsonl``, every so many steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from gptoughts.parallel import groups
from gptoughts.precision.cast_statistics import CastStatistics
from gptoughts.training.metrics import MetricsFile
from gptoughts.training.trainer import Callback, StepReport, Trainer


class Fp8Callback(Callback):
    """Watches all casts of every ``interval_steps``-th step, and of the first and the last one.

    Args:
        chunks: This rank's model chunks, with FP8 on.
        file: Where lines go; None on ranks that do not write.
        interval_steps: Steps between two that are watched.
    """

    def __init__(self, chunks: Sequence[Any], file: MetricsFile | None, interval_steps: int) -> None:
        self._chunks = chunks
        self._file = file
        self._interval_steps = interval_steps
        self._watching: CastStatistics | None = None

    def on_train_start(self, trainer: Trainer) -> None:
        self._watch_if_due(trainer)

    def on_step_end(self, trainer: Trainer, report: StepReport) -> None:
        if self._watching is not None:
            self._watching.stop()
            self._write(self._watching.lines(trainer.state.step, groups.amax_reduction_group()))
            self._watching = None
        self._watch_if_due(trainer)

    def on_train_end(self, trainer: Trainer) -> None:
        if self._watching is not None:
            self._watching.stop()
        if self._file is not None:
            self._file.close()

    def after_rollback(self, trainer: Trainer) -> None:
        if self._watching is not None:
            self._watching.stop()
            self._watching = None
        if self._file is not None:
            self._file.rewind(trainer.state.step)
        self._watch_if_due(trainer)

    def _watch_if_due(self, trainer: Trainer) -> None:
        step = trainer.state.step + 1
        if step == 1 or step % self._interval_steps == 0 or step == trainer.last_step:
            # Asked anew: layers may have left FP8.
            states = {name: state for chunk in self._chunks for name, state in chunk.fp8.states.items()}
            self._watching = CastStatistics(states)

    def _write(self, lines: list[dict[str, Any]]) -> None:
        """Stages hold different layers: each stage's first rank sends its own. Collective: every rank of the world."""
        is_first = groups.amax_reduction_group().rank() == 0
        everyone: list[Any] = [None] * dist.get_world_size() if self._file is not None else []
        dist.gather_object(lines if is_first else [], everyone or None, dst=0)
        if self._file is not None:
            for line in (line for of_rank in everyone for line in of_rank):
                self._file.write(line)

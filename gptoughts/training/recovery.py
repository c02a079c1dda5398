"""Does what the stability guard decides: skips, goes back, leaves samples out, lowers the rate, stops; writes it down.

Of a step that is not applied nothing is left: DeepSpeed drops its gradients, the engine puts buffers back (routers'
biases, FP8 histories), the random states are put back here. The step counter goes on, so that the learning rate of each
step stays what the schedule says. A rollback puts back a whole state, and adds the samples at fault to
``TrainState.skipped_samples``, from which the loader, also that of a resumed run, derives what comes when.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from gptoughts.checkpoint import layout, random_state
from gptoughts.checkpoint.manager import CheckpointManager
from gptoughts.config.experiment import StabilityConfig
from gptoughts.data.loader import SampleRange, as_ranges
from gptoughts.engine.interface import StepResult
from gptoughts.errors import StabilityError
from gptoughts.training.events import Event, EventsFile, describe
from gptoughts.training.fallback import Fp8Fallback
from gptoughts.training.run_folder import on_rank_zero, set_aside_later
from gptoughts.training.snapshot import Snapshot
from gptoughts.training.stability import CUT_LR, FALLBACK, NON_FINITE, OVERFLOW, SKIP, STOP, Guard, Verdict
from gptoughts.training.trainer import StepReport, Trainer, TrainState

FindOrigin = Callable[[Trainer], dict[str, Any]]
"""(trainer, whose latest step was not finite and not applied) -> where the first non-finite value appears
(``training.origin``). Collective: every rank of the world."""

_COURSE_STEPS = 10_000
"""Steps whose losses are kept to be written down when a rollback abandons them."""


class Recovery:
    """The guard at work on one run; see ``training.trainer.StepGuard``.

    Args:
        config: What to watch and to do.
        state: The run's, in which the guard remembers.
        manager: Writes and reads checkpoints.
        names: Parameter names of all stages.
        say: Prints a line for the user.
        events: Where events go; None on ranks that do not write.
        find_origin: Looks for the first non-finite value; unset: nobody looks.
        fp8: What is in FP8 and can leave it; unset: nothing is.
    """

    def __init__(
        self,
        config: StabilityConfig,
        state: TrainState,
        *,
        manager: CheckpointManager,
        names: Sequence[str],
        say: Callable[[str], None],
        events: EventsFile | None,
        find_origin: FindOrigin | None,
        fp8: Fp8Fallback | None = None,
    ) -> None:
        self.guard = Guard(config, state.guard)
        self._config = config
        self._manager = manager
        self._names = list(names)
        self._say = say
        self._events = events
        self._find_origin = find_origin
        self._fp8 = fp8
        self._snapshot: Snapshot | None = None
        self._target_step: int | None = None
        """Where the latest rollback went."""
        self._course: deque[tuple[int, float]] = deque(maxlen=_COURSE_STEPS)

    def lr_factor(self, step: int) -> float:
        return self.guard.lr_factor(step)

    def begin_step(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._before = dataclasses.replace(trainer.state)
        self._rng = random_state.capture()
        self._loss_scaler = trainer.engine.loss_scaler_state()
        self._found: tuple[str, float | None] | None = None

    def judge(self, loss: float, grad_norm: float) -> bool:
        self._found = self.guard.trigger(loss, grad_norm)
        if self._found is not None:
            return False
        interval, state = self._config.snapshot_interval_steps, self._trainer.state
        if interval and (self._snapshot is None or state.step - self._snapshot.train_state["step"] >= interval):
            self._snapshot = self._snapshot or Snapshot()
            self._snapshot.take(self._trainer.engine, state.as_dict(), self._rng)
        return True

    def end_step(self, trainer: Trainer, report: StepReport) -> bool:
        result, step = report.result, trainer.state.step - 1
        if result.applied:
            self._course.append((step + 1, result.loss))
            trainer.state.guard.doubtful_samples = []
            self.guard.note_applied(step, result.loss, result.grad_norm)
            return False
        random_state.restore(self._rng)
        samples = as_ranges(trainer.loader.samples_of_step)
        trigger, zscore = self._found or (self._non_finite(trainer, result), None)
        can_fall_back = self._fp8 is not None and bool(self._fp8.running)
        verdict = self.guard.verdict(step, trigger, zscore, can_fall_back=can_fall_back)
        event = self._event(trainer, result, verdict, samples)
        if verdict.trigger == NON_FINITE and self._find_origin is not None:
            event["origin"] = self._find_origin(trainer)
            random_state.restore(self._rng)
        if trigger != OVERFLOW:
            trainer.state.guard.doubtful_samples = [*trainer.state.guard.doubtful_samples, *samples]
        if verdict.action == SKIP:
            self._write(event)
            return False
        self._go_back(trainer, verdict, event)
        return True

    def _non_finite(self, trainer: Trainer, result: StepResult) -> str:
        """DeepSpeed skipped the step by itself. Where fp16's scaler has become more careful, that mends it."""
        before, after = self._loss_scaler, trainer.engine.loss_scaler_state()
        is_lowered = any(after.get(name, 0) < before.get(name, 0) for name in ("cur_scale", "cur_hysteresis"))
        return OVERFLOW if is_lowered and math.isfinite(result.loss) else NON_FINITE

    def _event(self, trainer: Trainer, result: StepResult, verdict: Verdict, samples: Sequence[SampleRange]) -> Event:
        event: Event = {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "step": trainer.state.step,
            "trigger": verdict.trigger,
            "action": verdict.action,
            "is_escalated": verdict.is_escalated,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "zscore": verdict.zscore,
            "samples": [list(one) for one in samples],
        }
        if scaler := trainer.engine.loss_scaler_state():
            event["loss_scale"] = scaler["cur_scale"]
        return event

    def _write(self, event: Event) -> None:
        if self._events is not None:
            self._events.write(event)
        self._say(describe(event))

    def _go_back(self, trainer: Trainer, verdict: Verdict, event: Event) -> None:
        for callback in trainer.callbacks:
            callback.before_rollback(trainer)
        failed_step = trainer.state.step
        source = self._restore(trainer, is_last=verdict.action == STOP)
        state = trainer.state
        self._target_step = state.step
        if verdict.action != STOP:
            state.skipped_samples = merged([*state.skipped_samples, *state.guard.doubtful_samples])
            state.guard.doubtful_samples = []
        trainer.loader.seek(state.consumed_samples, state.skipped_samples)
        if verdict.action == FALLBACK:
            assert self._fp8 is not None
            layer = (event.get("origin") or {}).get("layer")
            state.guard.left_fp8 += (left := self._fp8.leave(self._config.fallback_layers, layer))
            event["left_fp8"] = left
        if verdict.action == CUT_LR:
            self.guard.cut_lr(state.step)
            event |= {"lr_factor": state.guard.lr_factor, "lr_cut_until_step": state.guard.lr_cut_until_step}
        event["went_back_to"] = {"step": state.step, "source": source}
        event["abandoned"] = [[step, loss] for step, loss in self._course if step > state.step]
        while self._course and self._course[-1][0] > state.step:
            self._course.pop()
        run = self._manager.run
        if source != _NOWHERE:
            on_rank_zero(run, lambda: set_aside_later(run, step=state.step))
        if verdict.action == STOP:
            self._stop(trainer, event, failed_step)
        self._write(event)
        for callback in trainer.callbacks:
            callback.after_rollback(trainer)

    def _restore(self, trainer: Trainer, *, is_last: bool) -> str:
        """Put back the newest state that is known to be good, and older than the last one that did not help.

        Args:
            trainer: The run.
            is_last: Nothing more will be tried: the newest good state, whether or not it helped.
        """
        state = trainer.state
        is_first = state.guard.rollbacks + state.guard.lr_cuts <= 1
        limit = state.step if is_first or is_last or self._target_step is None else self._target_step
        snapshot = self._snapshot
        if snapshot is not None and snapshot.train_state["step"] < limit:
            return self._restore_snapshot(trainer, snapshot)
        reader = self._manager.find_before(limit)
        if reader is not None:
            self._snapshot = None  # of the course that is left
            saved = self._manager.restore(reader, trainer.engine, self._names)
            self._rewind(state, TrainState.read(saved))
            return str(reader.folder)
        if snapshot is not None:
            return self._restore_snapshot(trainer, snapshot)
        # The update was refused, so that the state is the one from before the step; nothing better is known.
        self._rewind(state, self._before)
        return _NOWHERE

    def _restore_snapshot(self, trainer: Trainer, snapshot: Snapshot) -> str:
        snapshot.restore(trainer.engine)
        self._rewind(trainer.state, TrainState.read(snapshot.train_state))
        return "snapshot in memory"

    def _rewind(self, state: TrainState, earlier: TrainState) -> None:
        """Time goes on, and what went wrong is remembered; everything else is as it was."""
        state.step = earlier.step
        state.consumed_samples = earlier.consumed_samples
        state.consumed_tokens = earlier.consumed_tokens
        self.guard.rewind_window(earlier.guard)

    def _stop(self, trainer: Trainer, event: Event, failed_step: int) -> None:
        """Save what was put back, write everything down, and end the run on all ranks."""
        self._write(event)
        if event["went_back_to"]["source"] != _NOWHERE:
            self._manager.save(trainer.engine, trainer.state.as_dict())
        kept = layout.list_checkpoints(self._manager.run)
        good = f"the last good state is saved in {kept[-1]}" if kept else "there is no checkpoint to go on from"
        state = trainer.state.guard
        raise StabilityError(
            f"training went wrong at step {failed_step} ({event['trigger']}) and is stopped, as asked for by "
            f"--stability.*: {state.rollbacks} rollback(s) and {state.lr_cuts} cut(s) of the learning rate before it "
            f"did not help; {good}; launchers/optimize_nan.sh {self._manager.run} says what was seen and what to change"
        )


_NOWHERE = "as before the step"


def merged(ranges: Sequence[SampleRange]) -> list[SampleRange]:
    """The same samples as few ascending ranges."""
    found: list[SampleRange] = []
    for first, stop in sorted(ranges):
        if found and first <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], stop))
        else:
            found.append((first, stop))
    return found

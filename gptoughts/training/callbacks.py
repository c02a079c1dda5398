"""What happens around steps: metrics, monitors, validation, checkpoints, and what the terminal shows."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gptoughts.checkpoint.manager import CheckpointManager, PendingSave
from gptoughts.objectives.multi_token import multi_token_figures
from gptoughts.parallel import groups
from gptoughts.training.evaluate import ValidationResult, Validator
from gptoughts.training.metrics import MetricsFile
from gptoughts.training.trainer import Callback, StepReport, Trainer

LogLine = dict[str, Any]


class ValidationCallback(Callback):
    """Validates every so many steps and at the end; others read ``last``.

    Args:
        validator: Evaluates the fixed validation samples.
        interval_steps: 0: at the end only.
    """

    def __init__(self, validator: Validator, interval_steps: int) -> None:
        self._validator = validator
        self._interval_steps = interval_steps
        self.last: ValidationResult | None = None
        self.last_step = -1

    def on_step_end(self, trainer: Trainer, report: StepReport) -> None:
        is_due = self._interval_steps and trainer.state.step % self._interval_steps == 0
        if is_due or trainer.state.step == trainer.last_step:
            self._run(trainer)

    def on_train_end(self, trainer: Trainer) -> None:
        # A run that was over before it started still says where it stands.
        if self.last_step < 0 and not trainer.was_stopped:
            self._run(trainer)

    def _run(self, trainer: Trainer) -> None:
        self.last = self._validator.run(trainer.engine)
        self.last_step = trainer.state.step

    def line(self, step: int) -> LogLine:
        """Validation figures measured at ``step``, if any."""
        if self.last is None or self.last_step != step:
            return {}
        found: LogLine = {"valid_loss": self.last.nats_per_token}
        if self.last.bits_per_byte is not None:
            found["valid_bits_per_byte"] = self.last.bits_per_byte
        return found


class MetricsCallback(Callback):
    """Turns reports into log lines: metrics.jsonl and DeepSpeed's monitors, at x = our own step.

    Args:
        file: Where lines go; None on ranks that do not write.
        monitor: Takes (name, value, step) events; called on every rank.
        interval_steps: Steps per line; rates are means over them.
        flops_per_token: Of forward and backward.
        peak_flops_per_second: Of all ranks together.
        memory_bytes: Reads this process's (or its device's) memory.
        validation: Whose figures join the line of their step.
    """

    def __init__(
        self,
        *,
        file: MetricsFile | None,
        monitor: Callable[[list[tuple[str, float, int]]], None],
        interval_steps: int,
        flops_per_token: float,
        peak_flops_per_second: float,
        memory_bytes: Callable[[], int],
        validation: ValidationCallback | None,
    ) -> None:
        self._file = file
        self._monitor = monitor
        self._interval_steps = interval_steps
        self._flops_per_token = flops_per_token
        self._peak_flops_per_second = peak_flops_per_second
        self._memory_bytes = memory_bytes
        self._validation = validation
        self._pending: list[StepReport] = []
        self.last: LogLine = {}

    def on_step_end(self, trainer: Trainer, report: StepReport) -> None:
        self._pending.append(report)
        step = trainer.state.step
        has_validation = self._validation is not None and self._validation.last_step == step
        if step % self._interval_steps == 0 or has_validation or step == trainer.last_step:
            self._flush(trainer)

    def on_train_end(self, trainer: Trainer) -> None:
        if self._pending:
            self._flush(trainer)
        if self._file is not None:
            self._file.close()

    def after_rollback(self, trainer: Trainer) -> None:
        self._pending = []
        if self._file is not None:
            self._file.rewind(trainer.state.step)

    def _flush(self, trainer: Trainer) -> None:
        reports, self._pending = self._pending, []
        newest = reports[-1]
        seconds = sum(report.step_seconds for report in reports) / len(reports)
        tokens_per_second = sum(report.num_tokens for report in reports) / sum(r.step_seconds for r in reports)
        achieved = tokens_per_second * self._flops_per_token
        line: LogLine = {
            "step": trainer.state.step,
            "loss": newest.result.loss,
            "lr": newest.lr,
            "grad_norm": newest.result.grad_norm,
            "applied": newest.result.applied,
            "tokens_per_second": tokens_per_second,
            "step_seconds": seconds,
            "data_seconds": sum(report.data_seconds for report in reports) / len(reports),
            "mfu_fraction": achieved / self._peak_flops_per_second,
            "achieved_tflops": achieved / 1e12,
            "consumed_samples": trainer.state.consumed_samples,
            "consumed_tokens": trainer.state.consumed_tokens,
            "memory_bytes": self._memory_bytes(),
            "seconds": trainer.state.seconds,
            **multi_token_figures(newest.result.extras),
            **newest.result.figures,
        }
        if scaler := trainer.engine.loss_scaler_state():
            line["loss_scale"] = scaler["cur_scale"]
        if self._validation is not None:
            line |= self._validation.line(trainer.state.step)
        self.last = line
        self._emit(line)

    def _emit(self, line: LogLine) -> None:
        if self._file is not None:
            self._file.write(line)
        skip = ("step", "applied")
        self._monitor([(f"train/{key}", value, line["step"]) for key, value in line.items() if key not in skip])


class CheckpointCallback(Callback):
    """Saves every so many steps, at the end, and when the run was asked to stop.

    Args:
        manager: Writes checkpoints.
        interval_steps: 0: only at the end or on request.
        say: Prints a line for the user.
        is_asynchronous: Let training go on while files are written; a save waits for the one before.
    """

    _DUE_FLAG = "checkpoint_due"

    def __init__(
        self, manager: CheckpointManager, interval_steps: int, say: Callable[[str], None], *, is_asynchronous: bool
    ) -> None:
        self._manager = manager
        self._interval_steps = interval_steps
        self._say = say
        self._is_asynchronous = is_asynchronous
        self._saved_step = -1
        self._is_due = False
        self._pending: PendingSave | None = None
        self._stalled_seconds = 0.0

    def on_train_start(self, trainer: Trainer) -> None:
        self._saved_step = trainer.state.step

    def flags(self) -> Mapping[str, float]:
        return {self._DUE_FLAG: float(self._pending is not None and self._pending.is_next_due)}

    def on_step_end(self, trainer: Trainer, report: StepReport) -> None:
        # All ranks read the same sum, so that all go on with the save after the same step.
        if self._pending is not None and report.result.flags[self._DUE_FLAG] == groups.world_size():
            if self._pending.is_publishing:
                self._finish()
            else:
                self._publish(self._pending)
        if self._interval_steps and trainer.state.step % self._interval_steps == 0:
            self._is_due = True
        # After a step that was not applied the state may be at fault: better none than a bad checkpoint.
        if self._is_due and report.result.applied:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer) -> None:
        if self._saved_step != trainer.state.step:
            self._save(trainer)
        self._finish()

    def before_rollback(self, trainer: Trainer) -> None:
        self._finish()

    def after_rollback(self, trainer: Trainer) -> None:
        self._saved_step, self._is_due = trainer.state.step, False

    def _save(self, trainer: Trainer) -> None:
        self._finish()
        self._is_due = False
        started = time.perf_counter()
        self._pending = self._manager.begin(
            trainer.engine, trainer.state.as_dict(), is_asynchronous=self._is_asynchronous
        )
        self._stalled_seconds = time.perf_counter() - started
        self._saved_step = trainer.state.step
        if not self._is_asynchronous:
            self._finish()

    def _publish(self, pending: PendingSave) -> None:
        started = time.perf_counter()
        self._manager.publish(pending)
        self._stalled_seconds += time.perf_counter() - started

    def _finish(self) -> None:
        if self._pending is None:
            return
        started = time.perf_counter()
        pending, self._pending = self._pending, None
        folder = self._manager.finish(pending)
        seconds = self._stalled_seconds + time.perf_counter() - started
        self._say(f"saved {folder} (training waited {seconds:.2f} s)")


class ProgressCallback(Callback):
    """A live bar on a terminal, plain lines elsewhere; on the rank that has the console.

    Args:
        console: Where to draw.
        is_live: Bar or lines.
        total_steps: Steps of the whole run.
        interval_steps: Steps per plain line.
        metrics: Whose rates are shown.
    """

    def __init__(
        self, console: Console, *, is_live: bool, total_steps: int, interval_steps: int, metrics: MetricsCallback
    ) -> None:
        self._console = console
        self._total_steps = total_steps
        self._interval_steps = interval_steps
        self._metrics = metrics
        self._bar: Progress | None = None
        if is_live:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("loss {task.fields[loss]}"),
                TextColumn("lr {task.fields[lr]}"),
                TextColumn("{task.fields[rate]} tokens/s"),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=console,
            )

    def on_train_start(self, trainer: Trainer) -> None:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(
                "train", total=self._total_steps, completed=trainer.state.step, loss="-", lr="-", rate="-"
            )

    def on_step_end(self, trainer: Trainer, report: StepReport) -> None:
        step = trainer.state.step
        rate = report.num_tokens / report.step_seconds
        if self._bar is not None:
            self._bar.update(
                self._task, completed=step, loss=f"{report.result.loss:.4f}", lr=f"{report.lr:.2e}", rate=f"{rate:,.0f}"
            )
        elif step % self._interval_steps == 0 or step == trainer.last_step:
            self._console.print(self._plain(trainer, report), highlight=False, soft_wrap=True)
        if not report.result.applied and trainer.guard is None:
            self._console.print(f"step {step}: non-finite gradients, update skipped", highlight=False)

    def after_rollback(self, trainer: Trainer) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=trainer.state.step)

    def _plain(self, trainer: Trainer, report: StepReport) -> str:
        line: Mapping[str, Any] = self._metrics.last
        rate = line.get("tokens_per_second", report.num_tokens / report.step_seconds)
        left = (self._total_steps - trainer.state.step) * report.num_tokens / rate
        text = (
            f"step {trainer.state.step}/{self._total_steps}  loss {report.result.loss:.4f}  lr {report.lr:.2e}  "
            f"grad_norm {report.result.grad_norm:.3f}  {rate:,.0f} tokens/s  ETA {left / 60:.1f} min"
        )
        if line.get("step") == trainer.state.step and "valid_loss" in line:
            text += f"  valid {line['valid_loss']:.4f}"
        return text

    def on_train_end(self, trainer: Trainer) -> None:
        if self._bar is not None:
            self._bar.stop()

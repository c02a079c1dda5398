"""What the stability guard costs a step, and what a snapshot costs when it is spread over its interval.

    python -m benchmarks.guard --size debug --steps 60

One run of one engine (ZeRO stage 1, bf16). Steps with the guard and without it take turns, so that both see the same
machine; its own work (judging, random states, what it remembers) is also timed by itself, which is the smaller noise.
Snapshots are taken apart from the timed steps. Figures are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.corpus import random_corpus
from gptoughts.checkpoint import random_state
from gptoughts.config.cli import load_experiment
from gptoughts.config.experiment import StabilityConfig
from gptoughts.models.registry import FAMILIES
from gptoughts.platform.startup import prepare_process
from gptoughts.training.run import run
from gptoughts.training.snapshot import Snapshot
from gptoughts.training.trainer import Callback, StepGuard, StepReport, Trainer

_WARMUP_STEPS = 20
"""The window of the guard's figures is full enough to judge by then."""


class Timed:
    """The guard, with the time that each step spends in it."""

    def __init__(self, guard: StepGuard) -> None:
        self._guard = guard
        self.seconds = 0.0

    def lr_factor(self, step: int) -> float:
        return self._guard.lr_factor(step)

    def begin_step(self, trainer: Trainer) -> None:
        self.seconds = -time.perf_counter()
        self._guard.begin_step(trainer)
        self.seconds += time.perf_counter()

    def judge(self, loss: float, grad_norm: float) -> bool:
        started = time.perf_counter()
        answer = self._guard.judge(loss, grad_norm)
        self.seconds += time.perf_counter() - started
        return answer

    def end_step(self, trainer: Trainer, report: StepReport) -> bool:
        started = time.perf_counter()
        is_back = self._guard.end_step(trainer, report)
        self.seconds += time.perf_counter() - started
        return is_back


class TakeTurns(Callback):
    """Every other step is without a guard."""

    def __init__(self) -> None:
        self.steps: dict[str, list[float]] = {"guarded": [], "bare": []}
        self.inside: list[float] = []
        self.snapshots: list[float] = []
        self.snapshot_bytes = 0

    def on_train_start(self, trainer: Trainer) -> None:
        assert trainer.guard is not None
        self._timed = Timed(trainer.guard)
        trainer.guard = self._timed

    def on_step_end(self, trainer: Trainer, report: StepReport) -> None:
        is_guarded = trainer.guard is not None
        if trainer.state.step > _WARMUP_STEPS:
            self.steps["guarded" if is_guarded else "bare"].append(report.step_seconds)
            if is_guarded:
                self.inside.append(self._timed.seconds)
            trainer.guard = None if is_guarded else self._timed

    def on_train_end(self, trainer: Trainer) -> None:
        snapshot = Snapshot()
        for _ in range(6):
            started = time.perf_counter()
            snapshot.take(trainer.engine, trainer.state.as_dict(), random_state.capture())
            self.snapshots.append(time.perf_counter() - started)
        self.snapshot_bytes = snapshot.num_bytes


def measure(size: str, steps: int, folder: Path) -> dict[str, Any]:
    """Medians; the first snapshot, which takes its memory, is said apart."""
    deepspeed_json = folder / "ds.json"
    deepspeed_json.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    prefix = random_corpus(folder / "corpus", num_tokens=200_000, vocab_size=8192)
    arguments = [
        "--model_type=gpt", f"--size={size}", f"--data={prefix}", f"--output_dir={folder / 'run'}", "--batch_size=4",
        f"--deepspeed_config={deepspeed_json}", "--block_size=256", "--log.plot=false", "--checkpoint.interval_steps=0",
        f"--train.steps={_WARMUP_STEPS + steps}", "--model.vocab_size=8192", "--stability.snapshot_interval_steps=0",
    ]  # fmt: skip
    callback = TakeTurns()
    run(load_experiment(arguments, FAMILIES, world_size=1), extra_callbacks=[callback])
    step = statistics.median(callback.steps["bare"])
    first, *others = callback.snapshots
    interval = StabilityConfig().snapshot_interval_steps
    return {
        "size": size,
        "step_seconds": {name: round(statistics.median(found), 4) for name, found in callback.steps.items()},
        "guard_seconds": round(statistics.median(callback.inside), 6),
        "guard_fraction": round(statistics.median(callback.inside) / step, 5),
        "snapshot_megabytes": round(callback.snapshot_bytes / 1e6),
        "snapshot_seconds": {"first": round(first, 4), "later": round(statistics.median(others), 4)},
        "snapshot_fraction": round(statistics.median(others) / (interval * step), 5),
    }


def main() -> None:
    """Print one JSON line; ``guard_fraction`` and ``snapshot_fraction`` are parts of a step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="debug", help="preset of gpt")
    parser.add_argument("--steps", type=int, default=60, help="timed steps")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    options = parser.parse_args()
    prepare_process()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options.size, options.steps, Path(folder))
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()

"""Saving while training goes on beside saving that waits, in one run of one model.

    python -m benchmarks.checkpoint --size debug --rounds 6

Each round saves once either way, with training steps around them, on the same engine (ZeRO stage 1, fp32). Figures:
how long training stood still for a save, and how long the steps took beside which files were written, over steps
beside which nothing was. Medians count.
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
from gptoughts.checkpoint.manager import CheckpointManager, PendingSave
from gptoughts.config.cli import load_experiment
from gptoughts.models.registry import FAMILIES
from gptoughts.platform.startup import prepare_process
from gptoughts.training.run import run
from gptoughts.training.trainer import Callback, StepReport, Trainer

STEPS_PER_SAVE = 6


class SaveBothWays(Callback):
    """Every so many steps one save, in turn one that waits and one that does not."""

    def __init__(self, folder: Path, warmup_steps: int) -> None:
        self._manager = CheckpointManager(folder, 1, "", {})
        self._warmup_steps = warmup_steps
        self._pending: PendingSave | None = None
        self._is_clean = False
        self.stalls: dict[str, list[float]] = {"synchronous": [], "asynchronous": []}
        self.steps: dict[str, list[float]] = {"quiet": [], "while writing": []}
        self.writing: list[float] = []
        self.num_bytes = 0
        self._begun = 0.0

    def on_step_end(self, trainer: Trainer, report: StepReport) -> None:
        step = trainer.state.step - self._warmup_steps
        if step < 0:
            return
        if self._pending is not None:
            self.steps["while writing"].append(report.step_seconds)
            if not self._pending.is_next_due:
                return
            started = time.perf_counter()
            if not self._pending.is_publishing:
                self.writing.append(started - self._begun)
                self._manager.publish(self._pending)
                self.stalls["asynchronous"][-1] += time.perf_counter() - started
                return
            folder = self._manager.finish(self._pending)
            self.stalls["asynchronous"][-1] += time.perf_counter() - started
            self.num_bytes = sum(path.stat().st_size for path in folder.iterdir())
            self._pending = None
        elif self._is_clean:
            self.steps["quiet"].append(report.step_seconds)
        self._is_clean = True
        started = time.perf_counter()
        if step % (2 * STEPS_PER_SAVE) == 0:
            self._manager.save(trainer.engine, trainer.state.as_dict())
            self.stalls["synchronous"].append(time.perf_counter() - started)
            self._is_clean = False
        elif step % (2 * STEPS_PER_SAVE) == STEPS_PER_SAVE:
            self._begun = started
            self._pending = self._manager.begin(trainer.engine, trainer.state.as_dict(), is_asynchronous=True)
            self.stalls["asynchronous"].append(time.perf_counter() - started)
            self._is_clean = False

    def on_train_end(self, trainer: Trainer) -> None:
        if self._pending is not None:
            self._manager.finish(self._pending)


def measure(size: str, rounds: int, folder: Path) -> dict[str, Any]:
    """Medians of all figures; the first round, which takes the memory of the copy, does not count."""
    deepspeed_json = folder / "ds.json"
    deepspeed_json.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    warmup_steps = 2
    prefix = random_corpus(folder / "corpus", num_tokens=200_000, vocab_size=8192)
    arguments = [
        "--model_type=gpt", f"--size={size}", f"--data={prefix}", f"--output_dir={folder / 'run'}", "--batch_size=2",
        f"--deepspeed_config={deepspeed_json}", "--train.precision=fp32", "--block_size=256", "--log.plot=false",
        f"--train.steps={warmup_steps + 2 * STEPS_PER_SAVE * (rounds + 1)}", "--checkpoint.interval_steps=0",
        "--model.vocab_size=8192",
    ]  # fmt: skip
    callback = SaveBothWays(folder / "saves", warmup_steps)
    run(load_experiment(arguments, FAMILIES, world_size=1), extra_callbacks=[callback])
    stalls = {name: statistics.median(seconds[1:]) for name, seconds in callback.stalls.items()}
    steps = {name: statistics.median(seconds) for name, seconds in callback.steps.items()}
    return {
        "size": size,
        "megabytes": round(callback.num_bytes / 1e6),
        "stall_seconds": {name: round(seconds, 4) for name, seconds in stalls.items()},
        "stall_ratio": round(stalls["asynchronous"] / stalls["synchronous"], 4),
        "write_seconds": round(statistics.median(callback.writing), 3),
        "step_seconds": {name: round(seconds, 4) for name, seconds in steps.items()},
    }


def main() -> None:
    """Print one JSON line; ``stall_ratio`` is what remains of the wait."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="debug", help="preset of gpt")
    parser.add_argument("--rounds", type=int, default=6, help="saves of either kind")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    options = parser.parse_args()
    prepare_process()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options.size, options.rounds, Path(folder))
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()

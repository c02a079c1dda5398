"""A run whose memory fails, with the stability guard and without it, beside the run without a fault.

    python -m benchmarks.recovery --data data_cache/stdlib-8192/python --output runs/recovery

After the update of one step an element of the output layer's matrix becomes 10,000, as a flipped bit of its exponent
would make it; later one sample brings a NaN into a gradient. Prints each run's validation loss and the guard's events,
and draws ``recovery.png`` (the picture in docs/stability.md).
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch

from gptoughts.config.cli import load_experiment
from gptoughts.models.registry import FAMILIES
from gptoughts.platform.startup import prepare_process
from gptoughts.training.events import describe, read_events
from gptoughts.training.metrics import METRICS_FILE, read_metrics
from gptoughts.training.plot import draw_runs
from gptoughts.training.pretrain import inspect
from gptoughts.training.run import run
from tests.faults import Fault, FaultInjector

_SAMPLES_PER_STEP = 8
CASES = {"undisturbed": True, "without_guard": False, "with_guard": True}
"""Run -> whether the guard is on."""


def faults(steps: int) -> list[Fault]:
    """A broken weight after half of the run, a bad sample at three quarters."""
    sample = _SAMPLES_PER_STEP * (3 * steps // 4) + 2
    return [
        Fault("corrupted_weight", parameter="output_layer.weight", step=steps // 2, value=1e4),
        Fault("nan_gradient", (sample,)),
    ]


def main() -> None:
    """Train the three runs, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data_cache/stdlib-8192/python", help="prefix of the corpus (make corpus)")
    parser.add_argument("--output", type=Path, default=Path("runs/recovery"), help="folder of the runs; emptied first")
    parser.add_argument("--steps", type=int, default=160, help="steps of each run")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    options = parser.parse_args()
    prepare_process()
    torch.set_num_threads(options.threads)
    shutil.rmtree(options.output, ignore_errors=True)
    for name, is_guarded in CASES.items():
        arguments = [
            "--model_type=mla", "--size=debug", "--model.num_layers=2", "--block_size=128", "--batch_size=8",
            f"--data={options.data}", f"--output_dir={options.output / name}", f"--train.steps={options.steps}",
            "--log.interval_steps=1", "--log.plot=false", "--checkpoint.interval_steps=0", "--train.valid_samples=32",
            f"--train.valid_interval_steps={max(1, options.steps // 8)}", f"--stability.enabled={is_guarded}".lower(),
            "--stability.snapshot_interval_steps=10",
        ]  # fmt: skip
        injected = [] if name == "undisturbed" else faults(options.steps)
        experiment = load_experiment(arguments, FAMILIES, world_size=1, inspect=inspect)
        run(experiment, extra_callbacks=[FaultInjector(injected)])
    for name in CASES:
        last = read_metrics(options.output / name / METRICS_FILE)[-1]
        print(json.dumps({"run": name, "step": last["step"], "valid_loss": round(last["valid_loss"], 4)}))
    for event in read_events(options.output / "with_guard"):
        print(describe(event))
    print(draw_runs([options.output / name for name in CASES], options.output / "recovery.png", x="steps"), flush=True)


if __name__ == "__main__":
    main()

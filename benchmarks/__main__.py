"""Run every benchmark, each in a process of its own: ``python -m benchmarks``."""

from __future__ import annotations

import subprocess
import sys

ALL = (
    "startup", "preprocess", "model_step", "train_step", "moe_step", "masked_head", "context", "diffusion",
    "zero_step", "zero_memory", "offload", "recompute", "checkpoint", "guard", "recovery", "plan", "decode", "fp8_step",
    "fp8_quality",
)  # fmt: skip


if __name__ == "__main__":
    for name in ALL:
        print(f"== {name}", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)

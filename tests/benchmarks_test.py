"""Every benchmark still runs; what it measures is nobody's assertion."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import ALL
from tests.distributed import run_distributed

ROOT = Path(__file__).parent.parent
FEW_STEPS = ("--steps", "1", "--warmup_steps", "0", "--batch_size", "1", "--precision", "fp32")
SMALLEST: dict[str, tuple[str, ...]] = {
    "model_step": FEW_STEPS,
    "train_step": FEW_STEPS,
    "moe_step": FEW_STEPS,
    "masked_head": FEW_STEPS,
    "zero_step": FEW_STEPS,
    "recompute": FEW_STEPS,
    "offload": ("--steps", "1"),
    "checkpoint": ("--rounds", "1"),
    "fp8_step": ("--steps", "1", "--warmup_steps", "0", "--batch_size", "1", "--block_size", "64"),
    "diffusion": (
        "--size",
        "debug",
        "--train_steps",
        "2",
        "2",
        "--new_tokens",
        "16",
        "--prompt_tokens",
        "16",
        "--block_length",
        "8",
    ),
    "fp8_quality": ("--families", "gpt", "--steps", "2", "--batch_size", "1", "--block_size", "64", "--samples", "1"),
    "preprocess": ("--repeats", "1", "--input", str(ROOT / "gptoughts")),
}
"""Flags with which a benchmark is over soon; the others are as they are."""


def test_the_list_and_the_page_name_every_benchmark() -> None:
    files = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if "def main()" in path.read_text()}
    assert set(ALL) == files
    page = (ROOT / "benchmarks" / "README.md").read_text()
    assert [name for name in ALL if f"`python -m benchmarks.{name}`" not in page] == []


def one_step(module: str) -> float:
    """One step of what a benchmark calls ours, on a short row."""
    import importlib

    import torch

    from gptoughts.config.experiment import ParallelConfig
    from gptoughts.parallel import groups

    groups.initialize(ParallelConfig(), seed=1)
    step = importlib.import_module(f"benchmarks.{module}").our_step(torch.float32)
    return float(step(torch.arange(65)[None]))


@pytest.mark.parametrize("module", ["model_step", "moe_step"])
def test_our_side_takes_a_step(module: str) -> None:
    (loss,) = run_distributed(one_step, 1, module)
    assert math.isfinite(loss)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_the_command_runs(name: str) -> None:
    command = [sys.executable, "-m", f"benchmarks.{name}", *SMALLEST.get(name, ())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()

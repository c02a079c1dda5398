"""Compare the losses of two runs step by step: the proof that a refactoring changed nothing; imports no torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from gptoughts.errors import DataError
from gptoughts.training.metrics import METRICS_FILE, read_metrics


def losses_by_step(run: Path) -> dict[int, float]:
    """Logged training losses of a run (its folder, or its metrics.jsonl).

    Raises:
        DataError: there are none.
    """
    path = run if run.is_file() else run / METRICS_FILE
    losses = {line["step"]: line["loss"] for line in read_metrics(path) if "loss" in line}
    if not losses:
        raise DataError(f"{path}: holds no losses")
    return losses


def main(argv: Sequence[str] | None = None) -> int:
    """``tools/compare_losses.py``; status 1 where the losses differ by more than was allowed."""
    parser = argparse.ArgumentParser(description="Compare the logged losses of two runs step by step.")
    parser.add_argument("a", type=Path, metavar="A", help="a run's folder, or its metrics.jsonl")
    parser.add_argument("b", type=Path, metavar="B", help="the other one")
    allowed = parser.add_mutually_exclusive_group()
    allowed.add_argument("--assert_equal", action="store_true", help="any difference, to the bit, is a failure")
    allowed.add_argument("--assert_within", type=float, metavar="R", help="a relative difference above R is a failure")
    arguments = parser.parse_args(argv)
    first, second = losses_by_step(arguments.a), losses_by_step(arguments.b)
    steps = sorted(first.keys() & second.keys())
    if not steps:
        raise DataError(f"{arguments.a} and {arguments.b}: no step was logged by both")
    differences = {step: abs(first[step] - second[step]) / max(abs(first[step]), 1e-30) for step in steps}
    worst = max(steps, key=lambda step: differences[step])
    print(
        f"{len(steps)} common steps ({steps[0]} to {steps[-1]}), largest relative difference {differences[worst]:.3g} "
        f"at step {worst}: {first[worst]!r} and {second[worst]!r}"
    )
    limit = 0.0 if arguments.assert_equal else arguments.assert_within
    return int(limit is not None and differences[worst] > limit)

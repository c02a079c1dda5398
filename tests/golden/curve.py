"""Golden curves of families and of options with one of their own: losses of 100 toy steps, and how they are recorded.

``python tools/update_golden.py NAME…`` is the only way to change one, in a commit of its own that says why.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from gptoughts.checkpoint.layout import write_atomically
from gptoughts.models.registry import FAMILIES
from tests.harness import Layout, run_layout

STEPS = 100
RUNS = {family: (family, Layout()) for family in FAMILIES} | {
    "deepseek-mtp": ("deepseek", Layout(extra=("--model.mtp_num_layers=1",)))
}
"""Name of a curve -> family and layout."""


def golden_file(name: str) -> Path:
    """Where a curve is stored."""
    return Path(__file__).parent / f"{name}.json"


def record(name: str) -> list[float]:
    """Losses of the toy run, one rank, fp32, nats per token."""
    family, layout = RUNS[name]
    with tempfile.TemporaryDirectory() as folder:
        return [step["loss"] for step in run_layout(family, layout, folder, STEPS, ())]


def main(argv: Sequence[str] | None = None) -> int:
    """Record and store the named curves."""
    parser = argparse.ArgumentParser(description="Record golden loss curves anew (tests/golden/NAME.json).")
    parser.add_argument("names", nargs="+", choices=list(RUNS), metavar="NAME", help=", ".join(RUNS))
    for name in parser.parse_args(argv).names:
        losses = [round(loss, 7) for loss in record(name)]
        write_atomically(golden_file(name), json.dumps({"losses": losses}, indent=1) + "\n")
        print(f"{golden_file(name)}: {losses[0]:.4f} to {losses[-1]:.4f}")
    return 0

"""A family's golden curve: losses of 100 steps of the toy run, and how they are recorded.

``python tools/update_golden.py FAMILY…`` is the only way to change one, in a commit of its own that says why.
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


def golden_file(family: str) -> Path:
    """Where a family's curve is stored."""
    return Path(__file__).parent / f"{family}.json"


def record(family: str) -> list[float]:
    """Losses of the toy run, one rank, fp32, nats per token."""
    with tempfile.TemporaryDirectory() as folder:
        return [step["loss"] for step in run_layout(family, Layout(), folder, STEPS, ())]


def main(argv: Sequence[str] | None = None) -> int:
    """Record and store the curves of the named families."""
    parser = argparse.ArgumentParser(description="Record golden loss curves anew (tests/golden/FAMILY.json).")
    parser.add_argument("families", nargs="+", choices=list(FAMILIES), metavar="FAMILY", help=", ".join(FAMILIES))
    for family in parser.parse_args(argv).families:
        losses = [round(loss, 7) for loss in record(family)]
        write_atomically(golden_file(family), json.dumps({"losses": losses}, indent=1) + "\n")
        print(f"{golden_file(family)}: {losses[0]:.4f} to {losses[-1]:.4f}")
    return 0

"""Start-up of the launcher: whole processes, beside an empty one.

python -m benchmarks.startup
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "--help": ["launchers/pretrain.py", "--help"],
    "--dry_run": ["launchers/pretrain.py", "--dry_run"],
}


def seconds(arguments: list[str]) -> float:
    """Wall time of one process."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    """Print the median of seven runs of each, taken in turn."""
    found: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(8):
        for name, arguments in COMMANDS.items():
            found[name].append(seconds(arguments))
    print(json.dumps({name: round(statistics.median(values[1:]), 3) for name, values in found.items()}))


if __name__ == "__main__":
    main()

"""The planner on thousands of GPUs: whole processes, beside an empty one.

python -m benchmarks.plan
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_LLAMA = ["tools/plan.py", "--gpu", "h100", "--json", "--top", "1", "--model_type", "gpt", "--size", "llama-3-8b"]
_DEEPSEEK = [*_LLAMA[:6], "--model_type", "deepseek", "--size", "deepseek-v3", "--model.mtp_num_layers", "0"]
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "llama-3-8b on 16 GPUs": [*_LLAMA, "--gpus", "16"],
    "llama-3-8b on 4096 GPUs": [*_LLAMA, "--gpus", "4096"],
    "deepseek-v3 on 4096 GPUs": [*_DEEPSEEK, "--gpus", "4096"],
}


def run(arguments: list[str]) -> tuple[float, str]:
    """Wall time of one process and what it printed."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return time.perf_counter() - started, done.stdout


def main() -> None:
    """Print the median of five runs of each, taken in turn, and how many layouts were looked at."""
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    layouts: dict[str, int] = {}
    for _ in range(6):
        for name, arguments in COMMANDS.items():
            wall, printed = run(arguments)
            seconds[name].append(wall)
            if printed:
                layouts[name] = json.loads(printed)["num_searched"]
    medians = {name: round(statistics.median(values[1:]), 3) for name, values in seconds.items()}
    print(json.dumps({"seconds": medians, "layouts": layouts}))


if __name__ == "__main__":
    main()

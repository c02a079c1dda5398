"""What a rank keeps in memory where its state is on the device, on the host or on a disk; and the time of a step.

    python -m benchmarks.offload --steps 3

On a CPU the device's memory is the host's: counted is what a process holds that is no file (``RssAnon``), after the
steps, less what it held before it built the model. Offload to the host's memory therefore saves nothing here, while
offload to a disk shows what it takes away from both. Two ranks, `gpt` of 36 million parameters, bf16.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.ranks import answers_of

FILES = ("zero3", "zero3_offload", "zero3_infinity")
RANKS = 2
_SHAPE = (
    "--model_type=gpt", "--size=debug", "--model.num_layers=8", "--model.hidden_size=512",
    "--model.ffn_hidden_size=1536", "--model.num_attention_heads=8", "--model.vocab_size=8192", "--block_size=128",
    "--batch_size=1", "--train.precision=bf16",
)  # fmt: skip
_CONFIGS = Path(__file__).parents[1] / "ds_configs"
_MIB = 2**20


def anonymous_bytes() -> int:
    """Resident memory of this process that is no file's."""
    gc.collect()
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def run_rank(rank: int, name: str, steps: int, folder: str) -> tuple[int, int, float, int]:
    """Some steps on one rank: its bytes in memory and on the disk, seconds of a step, parameters of the model."""
    from gptoughts.config.cli import load_experiment
    from gptoughts.models.registry import FAMILIES
    from gptoughts.training.setup import build_engine

    flags = [*_SHAPE, f"--deepspeed_config={_CONFIGS / name}.json", f"--output_dir={folder}"]
    experiment = load_experiment(flags, FAMILIES, world_size=RANKS)
    size, length = experiment.config.model.padded_vocab_size, experiment.config.block_size or 0
    before = anonymous_bytes()
    engine, objective, parameters = build_engine(experiment, torch.ones(size, dtype=torch.int64))
    seconds = []
    for step in range(steps):
        started = time.perf_counter()
        tokens = torch.randint(0, experiment.config.model.vocab_size, (1, length + 1))
        engine.train_step([objective.prepare(tokens, torch.tensor([step * RANKS + rank]))], lr=1e-4)
        seconds.append(time.perf_counter() - started)
    held = anonymous_bytes() - before
    on_disk = sum(path.stat().st_size for path in Path(folder).rglob("*.swp"))
    dist.barrier()
    count = sum(p.ds_numel for p in parameters.values())  # type: ignore[attr-defined]
    engine.close()
    return held, on_disk // RANKS, statistics.median(seconds), count


def _runs() -> Path:
    """A folder on a disk, which temporary ones need not be on, and that git leaves alone."""
    folder = Path.cwd() / "runs"
    folder.mkdir(exist_ok=True)
    return folder


def measure(name: str, steps: int) -> dict[str, float]:
    """The fuller of two ranks under one of the shipped files."""
    with tempfile.TemporaryDirectory(dir=_runs()) as folder:
        found = answers_of(RANKS, run_rank, name, steps, folder)
    part = found[0][3] / RANKS
    held, on_disk, seconds, _ = max(found)
    return {
        "memory_mib": round(held / _MIB, 1),
        "memory_bytes_per_parameter": round(held / part, 2),
        "disk_bytes_per_parameter": round(on_disk / part, 2),
        "step_seconds": round(seconds, 3),
    }


def main() -> None:
    """Print one JSON line per file; ``memory_ratio`` is over plain ZeRO-3."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    from gptoughts.platform import async_io

    plain = 0.0
    for name in FILES:
        if name == "zero3_infinity" and (problem := async_io.operator_problem()) is not None:
            print(json.dumps({"file": name, "not_measured": problem}), flush=True)
            continue
        found = measure(name, options.steps)
        plain = plain or found["memory_mib"]
        ratio = round(found["memory_mib"] / plain, 3)
        print(json.dumps({"file": name, **found, "memory_ratio": ratio}), flush=True)


if __name__ == "__main__":
    main()

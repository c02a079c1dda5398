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
import os
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

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


def run_rank(rank: int, port: int, name: str, steps: int, folder: str, answers: Any) -> None:
    """Some steps on one rank; its bytes and the seconds of a step go to ``answers``."""
    from gptoughts.config.cli import load_experiment
    from gptoughts.config.experiment import ParallelConfig
    from gptoughts.models.registry import FAMILIES
    from gptoughts.parallel import groups
    from gptoughts.platform import gloo
    from gptoughts.platform.startup import prepare_process
    from gptoughts.training.setup import build_engine

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS))
    prepare_process()
    torch.set_num_threads(1)
    gloo.share_device()
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    groups.initialize(ParallelConfig(), seed=1234)
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
    answers.put((held, on_disk // RANKS, statistics.median(seconds), count))
    engine.close()
    dist.barrier()
    groups.destroy()


def measure(name: str, steps: int) -> dict[str, float]:
    """The fuller of two ranks under one of the shipped files."""
    context = mp.get_context("spawn")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    answers = context.Queue()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        processes = [
            context.Process(target=run_rank, args=(rank, store.port, name, steps, folder, answers))
            for rank in range(RANKS)
        ]
        for process in processes:
            process.start()
        found = [answers.get() for _ in processes]
        for process in processes:
            process.join()
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

"""What a rank holds under ZeRO-3 on four ranks, beside what it should hold by arithmetic.

    python -m benchmarks.zero_memory --precision bf16

Counted are the storages of tensors after a step: weights, gradients and optimizer state, which ZeRO-3 divides by the
number of ranks (ZeRO, arXiv:1910.02054, section 3: w + 4 + 12 bytes per parameter, w of a weight). Apart from these:
communication buckets, and the small parameters (norms) that DeepSpeed keeps whole on every rank.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.model_step import SHAPE

WIDTHS = {"fp32": 4, "bf16": 2}
_FP32, _MOMENTS_AND_MASTERS = 4, 12


def storage_bytes(tensors: Iterable[Any]) -> int:
    """Bytes of all different storages."""
    storages = {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if isinstance(t, torch.Tensor)
    }
    return sum(storages.values())


def held_bytes(engine: Any) -> dict[str, int]:
    """What this rank holds, by kind."""
    optimizer = engine.deepspeed.optimizer
    parameters = [p for chunk in engine.chunks for p in chunk.parameters()]
    whole = [p for p in parameters if p.ds_persist]
    state = [value for entry in optimizer.optimizer.state.values() for value in entry.values()]
    buckets = [bucket.buffer for bucket in optimizer.ipg_buckets.values()]
    return {
        "weights": storage_bytes(p.ds_tensor for p in parameters),
        "gradients": storage_bytes([optimizer.grad_partitions_flat_buffer]),
        "optimizer": storage_bytes([*state, *optimizer.fp32_partitioned_groups_flat]),
        "whole small parameters": storage_bytes(p.data for p in whole),
        "buckets": storage_bytes(t for b in buckets for t in (b if isinstance(b, list) else [b])),
    }


def run_rank(rank: int, ranks: int, port: int, precision: str, answers: Any) -> None:
    """Two steps on one rank; its bytes go to ``answers``."""
    from benchmarks.zero_step import our_experiment
    from gptoughts.config.experiment import ParallelConfig
    from gptoughts.parallel import groups
    from gptoughts.platform import gloo
    from gptoughts.platform.startup import prepare_process
    from gptoughts.training.setup import build_engine

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    prepare_process()
    torch.set_num_threads(1)
    gloo.share_device()
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    groups.initialize(ParallelConfig(), seed=1234)
    with tempfile.TemporaryDirectory() as folder:
        experiment = our_experiment(3, precision, 1, Path(folder), world_size=ranks)
    engine, objective, parameters = build_engine(experiment, torch.ones(SHAPE.padded_vocab_size, dtype=torch.int64))
    for step in range(2):
        tokens = torch.randint(0, SHAPE.vocab_size, (1, SHAPE.seq_length + 1))
        engine.train_step([objective.prepare(tokens, torch.tensor([step * ranks + rank]))], lr=1e-4)
    answers.put((rank, held_bytes(engine), sum(p.ds_numel for p in parameters.values())))  # type: ignore[attr-defined]
    dist.barrier()
    groups.destroy()


def measure(precision: str, ranks: int) -> dict[str, Any]:
    """The fullest rank, and its ratio to theory."""
    context = mp.get_context("spawn")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    answers = context.Queue()
    processes = [
        context.Process(target=run_rank, args=(rank, ranks, store.port, precision, answers)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    found = [answers.get() for _ in processes]
    for process in processes:
        process.join()
    count = found[0][2]
    theory = {
        "weights": WIDTHS[precision] * count / ranks,
        "gradients": _FP32 * count / ranks,
        "optimizer": _MOMENTS_AND_MASTERS * count / ranks,
    }
    fullest = max((held for _, held, _ in found), key=lambda held: sum(held[name] for name in theory))
    total = sum(fullest[name] for name in theory)
    return {
        "precision": precision,
        "ranks": ranks,
        "parameters": count,
        "ratio": round(total / sum(theory.values()), 4),
        "ratios": {name: round(fullest[name] / expected, 4) for name, expected in theory.items()},
        "bytes": fullest,
    }


def main() -> None:
    """Print one JSON line; ``ratio`` is what a rank holds of weights, gradients and optimizer state over theory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=tuple(WIDTHS), default="bf16")
    parser.add_argument("--ranks", type=int, default=4)
    options = parser.parse_args()
    print(json.dumps(measure(options.precision, options.ranks)), flush=True)


if __name__ == "__main__":
    main()

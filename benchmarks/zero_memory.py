"""What a rank holds under ZeRO-3 on four ranks, beside what it should hold by arithmetic.

    python -m benchmarks.zero_memory --precision bf16

Counted are the storages of tensors after a step: weights, gradients and optimizer state, which ZeRO-3 divides by the
number of ranks (ZeRO, arXiv:1910.02054, section 3: w + 4 + 12 bytes per parameter, w of a weight). Apart from these:
communication buckets, and the small parameters (norms) that DeepSpeed keeps whole on every rank.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.model_step import SHAPE
from benchmarks.ranks import answers_of

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


def run_rank(rank: int, ranks: int, precision: str) -> tuple[dict[str, int], int]:
    """Two steps on one rank: its bytes, and parameters of the model."""
    from benchmarks.zero_step import our_experiment
    from gptoughts.training.setup import build_engine

    with tempfile.TemporaryDirectory() as folder:
        experiment = our_experiment(3, precision, 1, Path(folder), world_size=ranks)
    engine, objective, parameters = build_engine(experiment, torch.ones(SHAPE.padded_vocab_size, dtype=torch.int64))
    for step in range(2):
        tokens = torch.randint(0, SHAPE.vocab_size, (1, SHAPE.seq_length + 1))
        engine.train_step([objective.prepare(tokens, torch.tensor([step * ranks + rank]))], lr=1e-4)
    return held_bytes(engine), sum(p.ds_numel for p in parameters.values())  # type: ignore[attr-defined]


def measure(precision: str, ranks: int) -> dict[str, Any]:
    """The fullest rank, and its ratio to theory."""
    found = answers_of(ranks, run_rank, ranks, precision)
    count = found[0][1]
    theory = {
        "weights": WIDTHS[precision] * count / ranks,
        "gradients": _FP32 * count / ranks,
        "optimizer": _MOMENTS_AND_MASTERS * count / ranks,
    }
    fullest = max((held for held, _ in found), key=lambda held: sum(held[name] for name in theory))
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

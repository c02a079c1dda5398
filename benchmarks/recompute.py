"""Recompute by kind: bytes that a forward leaves for backward, and the time of a step, beside no recompute.

    python -m benchmarks.recompute --precision bf16

Bytes are those of a real step's graph at its fullest moment, storage by storage (``tests/planning/measure.py``), the
second forwards included. Steps are the engine's on one rank at ZeRO stage 0; kinds take turns, each in a process of its
own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.model_step import SHAPE, Step
from benchmarks.turns import Contestant, median_ratio, take_turns
from benchmarks.zero_step import our_experiment
from gptoughts.config.experiment import ParallelConfig
from gptoughts.parallel import groups
from gptoughts.platform.startup import prepare_process

_SELECTIVE = "--parallel.recompute_granularity=selective"
KINDS = {
    "none": (),
    "layernorm": (_SELECTIVE, "--parallel.recompute_modules=layernorm"),
    "core_attn": (_SELECTIVE, "--parallel.recompute_modules=core_attn"),
    "mlp": (_SELECTIVE, "--parallel.recompute_modules=mlp"),
    "layernorm,core_attn,mlp": (_SELECTIVE, "--parallel.recompute_modules=layernorm,core_attn,mlp"),
    "full": ("--parallel.recompute_granularity=full",),
}


def build(kind: str, precision: str, batch_size: int) -> tuple[Any, Any]:
    """Engine and objective of a kind; the groups exist."""
    from gptoughts.training.setup import build_engine

    with tempfile.TemporaryDirectory() as folder:
        experiment = our_experiment(0, precision, batch_size, Path(folder), world_size=1, flags=KINDS[kind])
    engine, objective, _ = build_engine(experiment, torch.ones(SHAPE.padded_vocab_size, dtype=torch.int64))
    return engine, objective


def engine_step(kind: str, precision: str, batch_size: int) -> Step:
    """One step of a kind."""
    engine, objective = build(kind, precision, batch_size)

    def step(tokens: Tensor) -> float:
        return engine.train_step([objective.prepare(tokens, torch.arange(tokens.size(0)))], lr=1e-4).loss

    return step


def kept_bytes(kind: str, precision: str, batch_size: int) -> int:
    """The most that the graph keeps at any time of a step."""
    from tests.planning.measure import KeptTensors

    engine, objective = build(kind, precision, batch_size)
    kept = KeptTensors([p for chunk in engine.chunks for p in chunk.parameters()])
    tokens = torch.randint(0, SHAPE.vocab_size, (batch_size, SHAPE.seq_length + 1))
    with kept.watched():
        engine.train_step([objective.prepare(tokens, torch.arange(batch_size))], lr=1e-4)
    engine.close()
    return kept.peak


def main() -> None:
    """Print one JSON line; ratios are over the step and the bytes without recompute."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--batch_size", type=int, default=4, help="samples per step")
    parser.add_argument("--steps", type=int, default=8, help="timed steps per kind")
    parser.add_argument("--warmup_steps", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    options = parser.parse_args()
    prepare_process()
    groups.initialize(ParallelConfig(), seed=1234)
    memory = {kind: kept_bytes(kind, options.precision, options.batch_size) for kind in KINDS}
    groups.destroy()
    turns = take_turns(
        {
            kind: Contestant(partial(engine_step, kind, options.precision, options.batch_size), is_ours=True)
            for kind in KINDS
        },
        vocab_size=SHAPE.vocab_size,
        batch_size=options.batch_size,
        seq_length=SHAPE.seq_length,
        steps=options.steps,
        warmup_steps=options.warmup_steps,
        threads=options.threads,
    )
    found = {
        kind: {
            "mebibytes": round(memory[kind] / 2**20, 1),
            "memory_ratio": round(memory[kind] / memory["none"], 3),
            "step_seconds": round(statistics.median(turns[kind].wall), 3),
            "time_ratio": round(1 / median_ratio(turns["none"].wall, turns[kind].wall), 3),
            "processor_ratio": round(1 / median_ratio(turns["none"].processor, turns[kind].processor), 3),
        }
        for kind in KINDS
    }
    print(json.dumps({"precision": options.precision, "kinds": found}), flush=True)


if __name__ == "__main__":
    main()

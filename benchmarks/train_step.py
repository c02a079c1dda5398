"""The whole Trainer beside bare loops, in one run: transformers' Llama with fused AdamW, and our own model likewise.

    python -m benchmarks.train_step --precision both --zero_stage 0

Our own bare loop has the Trainer's arithmetic (fp32 masters and moments, clipping); transformers' loops clip nothing,
and the one with bf16 weights keeps no masters.

Every contestant has a process of its own, as its users have: the Trainer with all that the launcher sets up, the peers
a plain torch process. They take turns: a callback behind the Trainer's own has each peer run one step after every step,
so all of them see the same machine at the same time. The Trainer's time is all that passes between its turns: data,
step, metrics, progress. Medians count; a ratio above 1 means that the Trainer is faster than that peer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from benchmarks.corpus import random_corpus
from benchmarks.model_step import SHAPE, llama_step, our_training_step
from gptoughts.config.cli import load_experiment
from gptoughts.config.experiment import ParallelConfig
from gptoughts.config.resolve import Experiment
from gptoughts.models.flops import flops_per_token
from gptoughts.models.registry import FAMILIES
from gptoughts.parallel import groups
from gptoughts.platform import device
from gptoughts.platform.startup import prepare_process
from gptoughts.training.run import run
from gptoughts.training.trainer import Callback, StepReport, Trainer

OURS = "gptoughts Trainer"
OUR_LOOP = "gptoughts, bare loop"
LLAMA = "llama, fp32 weights, bare loop"
LLAMA_BF16 = "llama, bf16 weights, bare loop"


def serve_steps(name: str, precision: str, threads: int, batch_size: int, pipe: Connection) -> None:
    """A peer's process: one step, timed, for every message."""
    torch.set_num_threads(threads)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    if name == OUR_LOOP:
        prepare_process()
        torch.set_num_threads(threads)
        groups.initialize(ParallelConfig(), seed=1234)
        step = our_training_step(dtype)
    elif name == LLAMA:
        step = llama_step(torch.float32, autocast=precision == "bf16")
    else:
        step = llama_step(torch.bfloat16, autocast=False)
    generator = torch.Generator().manual_seed(0)
    pipe.send(0.0)  # ready
    while pipe.recv():
        tokens = torch.randint(0, SHAPE.vocab_size, (batch_size, SHAPE.seq_length + 1), generator=generator)
        tokens = tokens.to(device.current_device())
        device.synchronize()
        started = time.perf_counter()
        step(tokens)
        device.synchronize()
        pipe.send(time.perf_counter() - started)


class PeersAfterEachStep(Callback):
    """Takes the Trainer's time and has each peer run one step after each of its steps."""

    def __init__(self, peers: dict[str, Connection], warmup_steps: int) -> None:
        self._peers = peers
        self._warmup_steps = warmup_steps
        self._resumed = 0.0
        self.seconds: dict[str, list[float]] = {name: [] for name in (OURS, *peers)}
        self.data_seconds: list[float] = []
        self.step_seconds: list[float] = []

    def on_train_start(self, trainer: Trainer) -> None:
        self._resumed = time.perf_counter()

    def on_step_end(self, trainer: Trainer, report: StepReport) -> None:
        times = {OURS: time.perf_counter() - self._resumed}
        for name, pipe in self._peers.items():
            pipe.send(True)
            times[name] = pipe.recv()
        if trainer.state.step > self._warmup_steps:
            for name, seconds in times.items():
                self.seconds[name].append(seconds)
            self.data_seconds.append(report.data_seconds)
            self.step_seconds.append(report.step_seconds)
        self._resumed = time.perf_counter()


def start_peers(precision: str, batch_size: int) -> dict[str, Connection]:
    """One process per peer."""
    names = [LLAMA, OUR_LOOP] + ([LLAMA_BF16] if precision == "bf16" else [])
    context = mp.get_context("spawn")
    pipes = {}
    for name in names:
        pipes[name], theirs = context.Pipe()
        arguments = (name, precision, torch.get_num_threads(), batch_size, theirs)
        context.Process(target=serve_steps, args=arguments, daemon=True).start()
    for pipe in pipes.values():
        pipe.recv()
    return pipes


def experiment(
    precision: str, zero_stage: int, batch_size: int, steps: int, folder: Path, flags: list[str]
) -> Experiment:
    """The Llama shape on a corpus of random tokens."""
    config = folder / "ds.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": zero_stage}}))
    prefix = random_corpus(folder / "corpus", num_tokens=1_000_000, vocab_size=SHAPE.vocab_size)
    arguments = [
        "--model_type=gpt", f"--data={prefix}", f"--output_dir={folder / 'run'}", f"--deepspeed_config={config}",
        f"--train.precision={precision}", f"--batch_size={batch_size}", f"--block_size={SHAPE.seq_length}",
        f"--model.num_layers={SHAPE.num_layers}", f"--model.hidden_size={SHAPE.hidden_size}",
        f"--model.ffn_hidden_size={SHAPE.ffn_hidden_size}", f"--model.num_attention_heads={SHAPE.num_attention_heads}",
        f"--model.vocab_size={SHAPE.vocab_size}", f"--train.steps={steps}", "--checkpoint.interval_steps=0",
        "--log.plot=false", *flags,
    ]  # fmt: skip
    return load_experiment(arguments, FAMILIES, world_size=1)


def compare(
    precision: str, zero_stage: int, batch_size: int, steps: int, warmup_steps: int, flags: list[str]
) -> dict[str, Any]:
    """Tokens per second of each contestant and the Trainer's ratio to each peer."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    peak = device.peak_tflops(dtype)  # while nothing else runs; kept for the run
    callback = PeersAfterEachStep(start_peers(precision, batch_size), warmup_steps)
    with tempfile.TemporaryDirectory() as folder:
        plan = experiment(precision, zero_stage, batch_size, warmup_steps + steps, Path(folder), flags)
        run(plan, extra_callbacks=[callback])
    medians = {name: statistics.median(values) for name, values in callback.seconds.items()}
    tokens = batch_size * SHAPE.seq_length
    rate = tokens / medians[OURS]
    achieved = flops_per_token(FAMILIES["gpt"], SHAPE, SHAPE.seq_length) * rate / 1e12
    return {
        "precision": precision,
        "zero_stage": zero_stage,
        "flags": flags,
        "tokens_per_second": {name: round(tokens / value) for name, value in medians.items()},
        "ratio_to": {name: round(value / medians[OURS], 3) for name, value in medians.items() if name != OURS},
        "step_fraction": round(statistics.median(callback.step_seconds) / medians[OURS], 5),
        "data_fraction": round(statistics.median(callback.data_seconds) / medians[OURS], 5),
        "fraction_of_matrix_product_rate": round(achieved / peak, 3),
    }


def main() -> None:
    """Print one JSON line per precision; each is measured in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("fp32", "bf16", "both"), default="both")
    parser.add_argument("--zero_stage", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=4, help="samples per step")
    parser.add_argument("--steps", type=int, default=12, help="timed steps per contestant")
    parser.add_argument("--warmup_steps", type=int, default=3)
    parser.add_argument("--flags", nargs="*", default=[], metavar="FLAG", help="further flags of the Trainer's run")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: one per core")
    options = parser.parse_args()
    if options.precision == "both":
        for precision in ("fp32", "bf16"):
            words = [word for word in sys.argv[1:] if word != "both" and not word.startswith("--precision")]
            subprocess.run(
                [sys.executable, "-m", "benchmarks.train_step", *words, "--precision", precision], check=True
            )
        return
    prepare_process()
    torch.set_num_threads(options.threads or len(os.sched_getaffinity(0)))
    result = compare(
        options.precision, options.zero_stage, options.batch_size, options.steps, options.warmup_steps, options.flags
    )
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()

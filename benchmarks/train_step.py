"""The whole Trainer beside bare loops, in one run: transformers' Llama with fused AdamW, and our own model likewise.

    python -m benchmarks.train_step --precision both --zero_stage 0

A callback behind the Trainer's own runs one step of each peer after every step, so all of them see the same machine at
the same time. The Trainer's time is all that passes between its turns: data, step, metrics, progress. Medians count;
a ratio above 1 means that the Trainer is faster than that peer.
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
from pathlib import Path
from typing import Any

import torch

from benchmarks.corpus import random_corpus
from benchmarks.model_step import SHAPE, Step, llama_step, our_step
from gptoughts.config.cli import load_experiment
from gptoughts.config.resolve import Experiment
from gptoughts.models.flops import flops_per_token
from gptoughts.models.registry import FAMILIES
from gptoughts.platform import device
from gptoughts.platform.startup import prepare_process
from gptoughts.training.run import run
from gptoughts.training.trainer import Callback, StepReport, Trainer

OURS = "gptoughts Trainer"


class PeersAfterEachStep(Callback):
    """Takes the Trainer's time and runs one step of each peer after each of its steps."""

    def __init__(self, peers: dict[str, Step], batch_size: int, warmup_steps: int) -> None:
        self._peers = peers
        self._batch_size = batch_size
        self._warmup_steps = warmup_steps
        self._generator = torch.Generator().manual_seed(0)
        self._resumed = 0.0
        self.seconds: dict[str, list[float]] = {name: [] for name in (OURS, *peers)}
        self.data_seconds: list[float] = []

    def on_train_start(self, trainer: Trainer) -> None:
        self._resumed = time.perf_counter()

    def on_step_end(self, trainer: Trainer, report: StepReport) -> None:
        times = {OURS: time.perf_counter() - self._resumed}
        shape = (self._batch_size, SHAPE.seq_length + 1)
        tokens = torch.randint(0, SHAPE.vocab_size, shape, generator=self._generator).to(device.current_device())
        for name, step in self._peers.items():
            device.synchronize()
            started = time.perf_counter()
            step(tokens)
            device.synchronize()
            times[name] = time.perf_counter() - started
        if trainer.state.step > self._warmup_steps:
            for name, seconds in times.items():
                self.seconds[name].append(seconds)
            self.data_seconds.append(report.data_seconds)
        self._resumed = time.perf_counter()


def experiment(precision: str, zero_stage: int, batch_size: int, steps: int, folder: Path) -> Experiment:
    """The 17M Llama shape on a corpus of random tokens."""
    config = folder / "ds.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": zero_stage}}))
    prefix = random_corpus(folder / "corpus", num_tokens=1_000_000, vocab_size=SHAPE.vocab_size)
    arguments = [
        "--model_type=gpt", f"--data={prefix}", f"--output_dir={folder / 'run'}", f"--deepspeed_config={config}",
        f"--train.precision={precision}", f"--batch_size={batch_size}", f"--block_size={SHAPE.seq_length}",
        f"--model.num_layers={SHAPE.num_layers}", f"--model.hidden_size={SHAPE.hidden_size}",
        f"--model.ffn_hidden_size={SHAPE.ffn_hidden_size}", f"--model.num_attention_heads={SHAPE.num_attention_heads}",
        f"--model.vocab_size={SHAPE.vocab_size}", f"--train.steps={steps}", "--checkpoint.interval_steps=0",
        "--log.plot=false", "--log.interval_steps=1",
    ]  # fmt: skip
    return load_experiment(arguments, FAMILIES, world_size=1)


def compare(precision: str, zero_stage: int, batch_size: int, steps: int, warmup_steps: int) -> dict[str, Any]:
    """Tokens per second of each contestant and the Trainer's ratio to each peer."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    with tempfile.TemporaryDirectory() as folder:
        plan = experiment(precision, zero_stage, batch_size, warmup_steps + steps, Path(folder))
        peers = {"llama, fp32 weights, bare loop": llama_step(torch.float32, autocast=precision == "bf16")}
        if precision == "bf16":
            peers["llama, bf16 weights, bare loop"] = llama_step(torch.bfloat16, autocast=False)
        callback = PeersAfterEachStep(peers, batch_size, warmup_steps)
        # Our own bare loop needs the groups that the run makes, so it is built at the first step.
        callback._peers["gptoughts, bare loop"] = _built_late(dtype)
        callback.seconds["gptoughts, bare loop"] = []
        run(plan, extra_callbacks=[callback])
    medians = {name: statistics.median(values) for name, values in callback.seconds.items()}
    tokens = batch_size * SHAPE.seq_length
    rate = tokens / medians[OURS]
    achieved = flops_per_token(FAMILIES["gpt"], SHAPE, SHAPE.seq_length) * rate / 1e12
    return {
        "precision": precision,
        "zero_stage": zero_stage,
        "tokens_per_second": {name: round(tokens / value) for name, value in medians.items()},
        "ratio_to": {name: round(value / medians[OURS], 3) for name, value in medians.items() if name != OURS},
        "data_fraction": round(statistics.median(callback.data_seconds) / medians[OURS], 5),
        "fraction_of_matrix_product_rate": round(achieved / device.peak_tflops(dtype), 3),
    }


def _built_late(dtype: torch.dtype) -> Step:
    built: list[Step] = []

    def step(tokens: torch.Tensor) -> float:
        if not built:
            built.append(our_step(dtype))
        return built[0](tokens)

    return step


def main() -> None:
    """Print one JSON line per precision; each is measured in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("fp32", "bf16", "both"), default="both")
    parser.add_argument("--zero_stage", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=4, help="samples per step")
    parser.add_argument("--steps", type=int, default=12, help="timed steps per contestant")
    parser.add_argument("--warmup_steps", type=int, default=3)
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
    result = compare(options.precision, options.zero_stage, options.batch_size, options.steps, options.warmup_steps)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()

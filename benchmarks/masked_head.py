"""A masked-diffusion step with the output layer at masked positions only, beside the same with it everywhere.

    python -m benchmarks.masked_head --precision both --threads 2

Both are one model with one set of weights, a vocabulary of 32k and the objective's own masks and weights; each step is
forward, backward and AdamW. Steps alternate, so that a noisy machine hits both, and the median step counts: a ratio
above 1 means that the masked-only output layer is faster. On a machine with other work, ``--processor_time`` with one
thread counts what the process itself used.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.model_step import fused_adamw
from gptoughts.config.experiment import ExperimentConfig, ParallelConfig, TrainConfig
from gptoughts.models.llada.config import LLaDAConfig
from gptoughts.models.llada.model import build_model, build_objective
from gptoughts.objectives.base import ModelInputs
from gptoughts.parallel import groups
from gptoughts.platform import device

SHAPE = LLaDAConfig(
    num_layers=6, hidden_size=384, ffn_hidden_size=1024, num_attention_heads=6, vocab_size=32767, seq_length=512,
    is_low_discrepancy=True,
)  # fmt: skip
"""36M parameters, of which 25M are the two vocabulary matrices; every step masks its fair share."""
MASKED, FULL = "masked positions", "all positions"


class Contestant:
    """One model and its optimizer, with or without the selection."""

    def __init__(self, config: ExperimentConfig, dtype: torch.dtype, *, is_selective: bool) -> None:
        self.model = build_model(config, params_dtype=dtype)
        self.objective = build_objective(config)
        self.optimizer = fused_adamw(self.model)
        self.is_selective = is_selective

    def step(self, inputs: ModelInputs) -> float:
        """One update; the loss."""
        per_token = self.model(
            inputs.input_ids,
            inputs.position_ids,
            inputs.attention_mask,
            inputs.labels,
            selected_positions=inputs.selected_positions if self.is_selective else None,
        )
        denominator = float(inputs.denominator)
        loss = self.objective.reduce(per_token, inputs.loss_weights) / denominator
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


def compare(
    precision: str, *, batch_size: int, steps: int, warmup_steps: int, clock: Callable[[], float]
) -> dict[str, Any]:
    """Tokens per second of both, their ratio, and the largest relative difference of their losses."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    config = ExperimentConfig(model_type="llada", model=SHAPE, train=TrainConfig(global_batch_size=batch_size))
    contestants = {name: Contestant(config, dtype, is_selective=name == MASKED) for name in (MASKED, FULL)}
    generator = torch.Generator().manual_seed(0)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    selected, difference = [], 0.0
    for index in range(warmup_steps + steps):
        tokens = torch.randint(0, SHAPE.vocab_size, (batch_size, SHAPE.seq_length), generator=generator)
        rows = torch.arange(index * batch_size, (index + 1) * batch_size)
        inputs = contestants[MASKED].objective.prepare(tokens, rows).to(device.current_device())
        losses = {}
        for name, contestant in contestants.items():
            device.synchronize()
            started = clock()
            losses[name] = contestant.step(inputs)
            device.synchronize()
            if index >= warmup_steps:
                seconds[name].append(clock() - started)
        difference = max(difference, abs(losses[MASKED] / losses[FULL] - 1.0))
        assert inputs.selected_positions is not None
        selected.append(inputs.selected_positions.numel() / tokens.numel())
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    count = batch_size * SHAPE.seq_length
    return {
        "precision": precision,
        "tokens_per_second": {name: round(count / value, 1) for name, value in medians.items()},
        "ratio": round(medians[FULL] / medians[MASKED], 3),
        "selected_fraction": round(statistics.mean(selected[warmup_steps:]), 3),
        "largest_loss_difference": difference,
    }


def main() -> None:
    """Print one JSON line per precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("fp32", "bf16", "both"), default="both")
    parser.add_argument("--batch_size", type=int, default=4, help="samples per step")
    parser.add_argument("--steps", type=int, default=10, help="timed steps per contestant")
    parser.add_argument("--warmup_steps", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--processor_time", action="store_true", help="of this process, instead of wall time")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    groups.initialize(ParallelConfig(), seed=1234)
    for precision in ("fp32", "bf16") if options.precision == "both" else (options.precision,):
        result = compare(
            precision,
            batch_size=options.batch_size,
            steps=options.steps,
            warmup_steps=options.warmup_steps,
            clock=time.process_time if options.processor_time else time.perf_counter,
        )
        print(json.dumps(result), flush=True)
    groups.destroy()


if __name__ == "__main__":
    main()

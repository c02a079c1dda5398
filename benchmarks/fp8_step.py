"""What FP8 costs or saves: a training step of our model with it / without it, both in bf16, in turns.

    python -m benchmarks.fp8_step --family gpt --steps 20
    python -m benchmarks.fp8_step --backend te --batch_size 8 --block_size 2048 --flags --model.num_layers=12 …

The figure of the emulation to keep: at most 2.5 times the bf16 step on a CPU. Forward, backward and AdamW, no Trainer;
each model in a process of its own would meet another machine a second later, so both take their steps in turn here.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from gptoughts.config.cli import load_experiment
from gptoughts.models.registry import FAMILIES
from gptoughts.objectives.base import ModelInputs
from gptoughts.parallel import groups
from gptoughts.platform import device
from gptoughts.platform.startup import prepare_process
from gptoughts.training.setup import DTYPES, precision


def training_step(arguments: list[str]) -> Callable[[torch.Tensor], float]:
    """(tokens [b, s + 1]) -> loss, of a model made from the launcher's flags."""
    config = load_experiment(arguments, FAMILIES, world_size=1).config
    groups.initialize(config.parallel, seed=config.seed)
    family = FAMILIES[config.model_type]
    model = family.load_model_builder()(config, params_dtype=DTYPES[precision(config)])
    objective = family.load_objective_builder()(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(tokens: torch.Tensor) -> float:
        inputs: ModelInputs = objective.prepare(tokens, torch.arange(tokens.size(0))).to(device.current_device())
        losses = model(
            inputs.input_ids, labels=inputs.labels, selected_positions=inputs.selected_positions,
            is_padding=inputs.is_padding,
        )  # fmt: skip
        losses = losses[0] if losses.dim() == 3 else losses
        loss = objective.reduce(losses, inputs.loss_weights) / float(inputs.denominator)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="gpt", choices=list(FAMILIES))
    parser.add_argument("--size", default="debug")
    parser.add_argument("--backend", default="emulated", choices=("emulated", "te"))
    parser.add_argument("--flags", nargs="*", default=[], metavar="FLAG", help="further flags of the launcher")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup_steps", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--block_size", type=int, default=512)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    prepare_process()
    torch.set_num_threads(options.threads)
    flags = [f"--model_type={options.family}", f"--size={options.size}", f"--block_size={options.block_size}"]
    flags += options.flags
    fp8 = ("--use_fp8=true", f"--fp8.backend={options.backend}")
    steps = {"bf16": training_step(flags), f"FP8, {options.backend}": training_step([*flags, *fp8])}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    generator = torch.Generator().manual_seed(0)
    for number in range(options.warmup_steps + options.steps):
        tokens = torch.randint(0, 8192, (options.batch_size, options.block_size + 1), generator=generator)
        for name, step in steps.items():
            started = time.perf_counter()
            step(tokens)  # ends with the loss on the host
            if number >= options.warmup_steps:
                seconds[name].append(time.perf_counter() - started)
    plain, quantised = (statistics.median(found) for found in seconds.values())
    tokens_per_step = options.batch_size * options.block_size
    for name, found in seconds.items():
        print(f"{options.family} {name}: {tokens_per_step / statistics.median(found):,.0f} tokens/s")
    print(f"{options.family}: a step in FP8 ({options.backend}) takes {quantised / plain:.2f} times as long as in bf16")


if __name__ == "__main__":
    main()

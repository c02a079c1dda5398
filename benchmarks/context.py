"""One long sequence on one rank, and over two context-parallel ranks: kept activations and tokens per second.

    python -m benchmarks.context --sequence 8192

Forward and backward of the bare model, two cores in all: one rank with two threads; two data-parallel ranks with a
thread and a sequence each; two context-parallel ranks with a thread and half a sequence each, by either method. Bytes
are the storages that the graph keeps at the end of the forward pass, weights not counted, beside those that the planner
predicts.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from gptoughts.config.experiment import ExperimentConfig, ParallelConfig, TrainConfig
from gptoughts.models.registry import FAMILIES
from gptoughts.parallel import groups
from gptoughts.planning.activations import stage_activation_bytes
from gptoughts.planning.layers import microbatch

MIB = 2**20


@dataclass(frozen=True)
class Contestant:
    name: str
    world_size: int
    context: int
    threads: int
    method: Literal["ulysses", "ring"] = "ulysses"

    @property
    def sequences(self) -> int:
        """Of one step, over all ranks."""
        return self.world_size // self.context


CONTESTANTS = (
    Contestant("one rank, two threads", 1, 1, 2),
    Contestant("two data-parallel ranks", 2, 1, 1),
    Contestant("two context ranks, ulysses", 2, 2, 1),
    Contestant("two context ranks, ring", 2, 2, 1, "ring"),
)


def experiment(family: str, contestant: Contestant, sequence: int) -> ExperimentConfig:
    """The family's debug preset with long sequences."""
    model = replace(FAMILIES[family].presets["debug"].model, seq_length=sequence).filled()
    return ExperimentConfig(
        model_type=family,
        batch_size=1,
        block_size=sequence,
        model=model,
        parallel=ParallelConfig(context=contestant.context, context_method=contestant.method),
        train=TrainConfig(precision="fp32"),
    )


def kept_bytes(model: torch.nn.Module, tokens: torch.Tensor) -> tuple[int, torch.Tensor]:
    """Bytes of the storages that one forward keeps, and its loss."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(tokens[:, :-1].contiguous(), None, None, tokens[:, 1:].contiguous()).sum()
    return sum(sizes.values()), loss


def run_rank(rank: int, family: str, contestant: Contestant, sequence: int, steps: int, store: str, out: Any) -> None:
    """One rank of a contestant; rank 0 answers."""
    torch.set_num_threads(contestant.threads)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=contestant.world_size)
    config = experiment(family, contestant, sequence)
    groups.initialize(config.parallel, seed=1)
    model = FAMILIES[family].load_model_builder()(config, params_dtype=torch.float32)
    generator = torch.Generator().manual_seed(groups.data_parallel_rank())
    tokens = torch.randint(config.model.vocab_size, (1, sequence + 1), generator=generator)
    seconds = []
    for _ in range(steps):
        dist.barrier()
        started = time.perf_counter()
        kept, loss = kept_bytes(model, tokens)
        loss.backward()
        dist.barrier()
        seconds.append(time.perf_counter() - started)
    if rank == 0:
        out.put((kept, statistics.median(seconds[1:])))
    groups.destroy()


def measure(family: str, contestant: Contestant, sequence: int, steps: int) -> tuple[int, float]:
    """Kept bytes per rank, and seconds of a forward and backward."""
    context = mp.get_context("spawn")
    out = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (family, contestant, sequence, steps, str(Path(folder) / "store"), out)
        mp.spawn(run_rank, arguments, nprocs=contestant.world_size)
    return out.get()


def main() -> None:
    """Print a line per contestant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=["gpt", "mla"], choices=["gpt", "mla"])
    parser.add_argument("--sequence", type=int, default=8192, help="tokens")
    parser.add_argument("--steps", type=int, default=3, help="of which the first does not count")
    options = parser.parse_args()
    for family in options.families:
        for contestant in CONTESTANTS:
            kept, seconds = measure(family, contestant, options.sequence, options.steps)
            config = experiment(family, contestant, options.sequence)
            predicted = stage_activation_bytes(config, microbatch(config), 0, 1)
            rate = contestant.sequences * options.sequence / seconds
            print(
                f"{family}  {contestant.name:<28}{kept / MIB:8.1f} MiB kept per rank (predicted {predicted / MIB:.1f})"
                f"{rate:8.0f} tokens/s",
                flush=True,
            )


if __name__ == "__main__":
    main()

"""A training step on two data-parallel ranks: our engine under ZeRO-1 and ZeRO-3 beside torch's DDP and FSDP2.

    python -m benchmarks.zero_step --precision fp32

All contestants train the same model, ours, on the same tokens, with AdamW and clipping at norm 1. DDP and FSDP2
(``fully_shard`` of every layer and of the whole) run it in a bare loop; the engine does what it does in a run: exact
denominators, the schedule, the gradient's norm and the check whether it is finite. In bf16 FSDP2 keeps fp32 weights,
sends bf16 gradients and adds them to fp32 ones, as ZeRO does; DDP has no such mode and is left out. FSDP2 gathers
weights once per step (``reshard_after_forward=False``), as DeepSpeed does with a model below its
``stage3_max_reuse_distance``.

Every rank is a process; contestants take turns step by step (``benchmarks.turns``), and the slowest rank counts. A
ratio above 1 means that the engine is faster than that peer. Rates of processor time count work only: waiting for the
other rank, and other work on the machine, are left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.model_step import SHAPE, Step, fused_adamw
from benchmarks.turns import Contestant, Turns, median_ratio, take_turns
from gptoughts.config.experiment import ExperimentConfig
from gptoughts.config.resolve import Experiment

RANKS = 2
PEERS = {"ZeRO-1": "DDP", "ZeRO-3": "FSDP2"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def our_experiment(
    stage: int,
    precision: str,
    batch_size: int,
    folder: Path,
    *,
    world_size: int = RANKS,
    flags: Sequence[str] = (),
) -> Experiment:
    """The 17M Llama shape under a ZeRO stage, as a command line gives it."""
    from gptoughts.config.cli import load_experiment
    from gptoughts.models.registry import FAMILIES

    config = folder / "ds.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    shape = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "vocab_size")
    arguments = [
        "--model_type=gpt", f"--deepspeed_config={config}", f"--train.precision={precision}",
        f"--batch_size={batch_size}", f"--block_size={SHAPE.seq_length}", f"--output_dir={folder}",
        *(f"--model.{name}={getattr(SHAPE, name)}" for name in shape), *flags,
    ]  # fmt: skip
    return load_experiment(arguments, FAMILIES, world_size=world_size)


def engine_step(stage: int, precision: str, batch_size: int) -> Step:
    """One step of the engine."""
    from gptoughts.training.setup import build_engine

    with tempfile.TemporaryDirectory() as folder:
        experiment = our_experiment(stage, precision, batch_size, Path(folder))
    token_bytes = torch.ones(SHAPE.padded_vocab_size, dtype=torch.int64)
    engine, objective, _ = build_engine(experiment, token_bytes)

    def step(tokens: Tensor) -> float:
        return engine.train_step([objective.prepare(tokens, torch.arange(tokens.size(0)))], lr=1e-4).loss

    return step


def bare_model(dtype: torch.dtype) -> nn.Module:
    """The model without an engine; whoever shards it has initialised torch.distributed."""
    from gptoughts.models.gpt.model import build_model

    return build_model(ExperimentConfig(model=SHAPE), params_dtype=dtype)


def bare_step(model: nn.Module) -> Step:
    """One update of a model that reduces its gradients by itself."""
    optimizer = fused_adamw(model)

    def step(tokens: Tensor) -> float:
        loss = model(tokens[:, :-1], None, None, tokens[:, 1:]).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def ddp_step() -> Step:
    """torch's replicas."""
    return bare_step(nn.parallel.DistributedDataParallel(bare_model(torch.float32), gradient_as_bucket_view=True))


def fsdp_step(precision: str) -> Step:
    """torch's shards: parameters, gradients and optimizer state, as ZeRO-3."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from gptoughts.platform import device

    mesh = init_device_mesh(device.current_device().type, (RANKS,))
    is_mixed = precision == "bf16"
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16) if is_mixed else MixedPrecisionPolicy()
    model: Any = bare_model(torch.float32)
    for layer in model.decoder.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    return bare_step(model)


def contestants(precision: str, batch_size: int) -> dict[str, Contestant]:
    """All of a precision, each on two ranks."""
    found = {
        f"ZeRO-{stage}": Contestant(partial(engine_step, stage, precision, batch_size), is_ours=True, ranks=RANKS)
        for stage in (1, 3)
    }
    if precision == "fp32":
        found["DDP"] = Contestant(ddp_step, is_ours=True, ranks=RANKS)
    found["FSDP2"] = Contestant(partial(fsdp_step, precision), is_ours=True, ranks=RANKS)
    return found


def figures(turns: dict[str, Turns]) -> dict[str, Any]:
    """Medians, and how many times faster the engine is than its peer."""
    pairs = [(ours, theirs) for ours, theirs in PEERS.items() if theirs in turns]
    return {
        "step_seconds": {name: round(statistics.median(found.wall), 4) for name, found in turns.items()},
        "ratio": {
            f"{ours} / {theirs}": round(median_ratio(turns[theirs].wall, turns[ours].wall), 3) for ours, theirs in pairs
        },
        "processor_ratio": {
            f"{ours} / {theirs}": round(median_ratio(turns[theirs].processor, turns[ours].processor), 3)
            for ours, theirs in pairs
        },
    }


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch_size", type=int, default=2, help="samples per rank and step")
    parser.add_argument("--steps", type=int, default=12, help="timed steps per contestant")
    parser.add_argument("--warmup_steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads per rank")
    options = parser.parse_args()
    turns = take_turns(
        contestants(options.precision, options.batch_size),
        vocab_size=SHAPE.vocab_size,
        batch_size=options.batch_size * RANKS,
        seq_length=SHAPE.seq_length,
        steps=options.steps,
        warmup_steps=options.warmup_steps,
        threads=options.threads,
    )
    print(json.dumps({"precision": options.precision, **figures(turns)}), flush=True)


if __name__ == "__main__":
    main()

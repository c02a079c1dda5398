"""Small real runs for tests: a family's debug preset made tiny, on real text, through the whole configuration path."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gptoughts.config.cli import load_experiment, to_yaml
from gptoughts.config.resolve import Experiment
from gptoughts.models.registry import FAMILIES
from gptoughts.objectives.base import ModelInputs, Objective

TEXT = Path(__file__).parent.parent / "LICENSE"
SEQUENCE = 64
SAMPLES_PER_STEP = 8
_CUT_OFTEN = "--model.random_length_probability=0.3"
VARIANTS = {
    "llada-mla": ("--model_type=llada", "--model.attention=mla", _CUT_OFTEN),
    "llada-moe": ("--model_type=llada", "--model.num_moe_experts=4", _CUT_OFTEN),
    "llada-mla-moe": ("--model_type=llada", "--model.attention=mla", "--model.num_moe_experts=4", _CUT_OFTEN),
}
"""Toys beside the families' own: name -> flags."""
WORLD_KEYS = ("tensor", "sequence", "data", "expert", "zero", "accumulation")


@dataclass(frozen=True)
class Layout:
    """One way to run the same model on the same global batch."""

    tensor: int = 1
    sequence: bool = False
    pipeline: int = 1
    virtual: int = 1
    data: int = 1
    zero: int = 0
    accumulation: int = 1
    precision: str = "fp32"
    layers: int = 2
    expert: int = 1
    tied: bool = False
    """One matrix for embedding and output layer."""
    extra: tuple[str, ...] = field(default=())
    context: int = 1
    context_method: str = "ulysses"

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data

    def __str__(self) -> str:
        pipeline = f"-pp{self.pipeline}" if self.pipeline > 1 else ""
        virtual = f"-vpp{self.virtual}" if self.virtual > 1 else ""
        expert = f"-ep{self.expert}" if self.expert > 1 else ""
        context = f"-cp{self.context}{'ring' if self.context_method == 'ring' else ''}" if self.context > 1 else ""
        name = f"tp{self.tensor}{'sp' if self.sequence else ''}{pipeline}{virtual}{context}-dp{self.data}{expert}"
        name = f"{name}-zero{self.zero}-acc{self.accumulation}{'-tied' if self.tied else ''}"
        return name if self.precision == "fp32" else f"{name}-{self.precision}"


def toy_experiment(family: str, layout: Layout, folder: Path, *, steps: int = 20) -> Experiment:
    """A run of a family's or variant's debug preset with two layers, a byte vocabulary and AdamW's eps at 1e-4."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / f"ds-{layout}.json"
    is_untied = str(not layout.tied).lower()
    content = {"zero_optimization": {"stage": layout.zero}, "bf16": {"enabled": layout.precision == "bf16"}}
    # Every rank writes it: no rank may see another's half-written file.
    own = config.with_suffix(f".{os.getpid()}")
    own.write_text(json.dumps(content))
    os.replace(own, config)
    batch_size = SAMPLES_PER_STEP // (layout.data * layout.accumulation)
    arguments = [
        *VARIANTS.get(family, (f"--model_type={family}",)), "--size=debug",
        f"--deepspeed_config={config}", f"--output_dir={folder / 'run'}",
        f"--batch_size={batch_size}", f"--train.global_batch_size={SAMPLES_PER_STEP}", f"--block_size={SEQUENCE}",
        f"--model.num_layers={layout.layers}", "--model.vocab_size=256", f"--train.steps={steps}", "--optim.lr=1e-3",
        "--optim.eps=1e-4", "--optim.warmup_steps=5", f"--parallel.tensor={layout.tensor}",
        f"--parallel.sequence={str(layout.sequence).lower()}", f"--parallel.pipeline={layout.pipeline}",
        f"--parallel.virtual_pipeline={layout.virtual}", f"--parallel.expert={layout.expert}",
        f"--parallel.context={layout.context}", f"--parallel.context_method={layout.context_method}",
        f"--model.untie_embeddings_and_output_weights={is_untied}",
        "--grad_clip=0", *layout.extra,
    ]  # fmt: skip
    return load_experiment(arguments, FAMILIES, world_size=layout.world_size)


def text_rows(count: int, width: int) -> np.ndarray:
    """int64 [count, width]: overlapping windows of a fixed English text, one byte per token."""
    text = np.frombuffer(TEXT.read_bytes(), dtype=np.uint8).astype(np.int64)
    starts = (np.arange(count) * 37) % (len(text) - width)
    return np.stack([text[start : start + width] for start in starts])


def step_microbatches(experiment: Experiment, objective: Objective, step: int, data_rank: int) -> list[ModelInputs]:
    """This data-parallel rank's microbatches of one step, cut from the same global batch in every layout."""
    from gptoughts.platform import device

    rows = experiment.config.batch_size or 1
    first = step * experiment.samples_per_step
    length = experiment.config.block_size or SEQUENCE
    everything = text_rows(first + experiment.samples_per_step, length + objective.num_extra_tokens)
    found = []
    for microbatch in range(experiment.num_microbatches):
        start = first + (microbatch * experiment.data_parallel_size + data_rank) * rows
        indices = np.arange(start, start + rows)
        batch = objective.prepare(torch.from_numpy(everything[indices]), torch.from_numpy(indices))
        found.append(batch.to(device.current_device()))
    return found


class ToyRun:
    """A toy experiment on this rank: engine, objective, parameters. Collective: every rank of the world."""

    def __init__(self, family: str, layout: Layout, folder: Path, *, steps: int = 20) -> None:
        from gptoughts.checkpoint.identity import model_identity
        from gptoughts.checkpoint.manager import CheckpointManager
        from gptoughts.engine.lr_schedule import build_schedule
        from gptoughts.parallel import groups
        from gptoughts.platform import determinism, device
        from gptoughts.training.setup import build_engine

        determinism.enable()
        self.experiment = toy_experiment(family, layout, folder, steps=steps)
        config = self.experiment.config
        groups.initialize(config.parallel, seed=config.seed)
        token_bytes = torch.ones(config.model.padded_vocab_size, dtype=torch.int64, device=device.current_device())
        self.engine, self.objective, self.parameters = build_engine(self.experiment, token_bytes)
        self.learning_rate = build_schedule(config.optim, steps=steps)
        self.data_rank = groups.data_parallel_rank()
        self.manager = CheckpointManager(Path(config.output_dir), 0, to_yaml(config), model_identity(config))
        self.step = 0

    def train(self, steps: int) -> Iterator[Any]:
        """Run the next ``steps`` steps, yielding each result."""
        for _ in range(steps):
            batches = step_microbatches(self.experiment, self.objective, self.step, self.data_rank)
            result = self.engine.train_step(batches, lr=self.learning_rate(self.step), flags={})
            self.step += 1
            yield result

    def save(self) -> Path:
        """Write a checkpoint of the present step."""
        return self.manager.save(self.engine, {"step": self.step})

    def resume(self) -> None:
        """Go on from the newest checkpoint of the run's folder."""
        from gptoughts.models.stages import all_names

        reader = self.manager.find("auto")
        assert reader is not None
        self.step = self.manager.restore(reader, self.engine, all_names(list(self.parameters)))["step"]

    def close(self) -> None:
        """Give the engine back, so that the next case starts clean."""
        self.engine.close()


def run_layout(family: str, layout: Layout, folder: str, steps: int, save_at: Sequence[int]) -> list[dict[str, Any]]:
    """Train a toy run on this rank and save at the given steps; returns each step's figures."""
    run = ToyRun(family, layout, Path(folder), steps=steps)
    history = []
    for result in run.train(steps):
        history.append({**dataclasses.asdict(result), "loss": result.loss})
        if run.step in save_at:
            run.save()
    run.close()
    return history

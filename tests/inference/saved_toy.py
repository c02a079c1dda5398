"""A tiny model with strong random weights in a checkpoint, made without an engine: what inference reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from gptoughts.checkpoint.identity import model_identity
from gptoughts.checkpoint.manager import CheckpointManager
from gptoughts.checkpoint.portable import BUFFER, WEIGHT
from gptoughts.config.cli import to_yaml
from gptoughts.config.experiment import ExperimentConfig
from gptoughts.data.pretrain import build_validation_samples
from gptoughts.engine.interface import StateFragment
from gptoughts.models.language_model import LanguageModel
from gptoughts.models.parameter_names import global_buffer_names, global_parameter_names
from gptoughts.models.registry import FAMILIES
from gptoughts.objectives.base import ModelInputs, Objective
from gptoughts.parallel import groups
from gptoughts.training.evaluate import TARGET_BYTES, Validator
from tests.harness import SEQUENCE, Layout, toy_experiment

STRONG = ("--model.vocab_size=384", "--model.init_method_std=0.15")
"""384: a multiple of 128, so that training has no padding in its softmax either. Weights with which tokens matter."""

MASK = 2
"""Third of the special tokens that ``train_tokenizer`` makes."""


def build_toy(family: str, folder: Path) -> tuple[LanguageModel, ExperimentConfig]:
    """On this process alone."""
    extra = STRONG if FAMILIES[family].is_causal else (*STRONG, f"--model.mask_token_id={MASK}")
    config = toy_experiment(family, Layout(extra=extra), folder).config
    groups.initialize(config.parallel, seed=config.seed)
    model = FAMILIES[family].load_model_builder()(config, params_dtype=torch.float32)
    return model.eval(), config


def save_toy(family: str, folder: str, tokenizer: str) -> str:
    """The checkpoint's path."""
    model, config = build_toy(family, Path(folder))
    parameters, buffers = global_parameter_names(model), global_buffer_names(model)
    fragments = [_fragment(name, WEIGHT, tensor.detach()) for name, tensor in parameters.items()]
    fragments += [_fragment(name, BUFFER, tensor) for name, tensor in buffers.items()]
    engine: Any = SimpleNamespace(
        state_fragments=lambda: fragments, scalar_state=dict, before_next_update=lambda wait: wait()
    )
    manager = CheckpointManager(
        Path(config.output_dir), 0, to_yaml(config), model_identity(config), Path(tokenizer) / "tokenizer.json"
    )
    return str(manager.save(engine, {"step": 0}))


def validation_loss(family: str, folder: str, prefix: str) -> float:
    """What validation in training finds with the same weights, nats per token."""
    model, config = build_toy(family, Path(folder))
    objective = FAMILIES[family].load_objective_builder()(config)
    samples = build_validation_samples(
        [(1.0, prefix)], seq_length=SEQUENCE, num_extra_tokens=objective.num_extra_tokens, cache_dir=None
    )
    validator = Validator(
        samples, -1, objective=objective.for_validation(len(samples)), batch_size=4, data_parallel_rank=0,
        data_parallel_size=1, device=torch.device("cpu"),
    )  # fmt: skip
    engine: Any = SimpleNamespace(eval_step=lambda microbatches: _eval_step(model, objective, microbatches))
    return validator.run(engine).nats_per_token


@torch.no_grad()
def _eval_step(model: LanguageModel, objective: Objective, microbatches: Sequence[ModelInputs]) -> Any:
    (inputs,) = microbatches
    loss = model(
        inputs.input_ids, inputs.position_ids, inputs.attention_mask, labels=inputs.labels,
        selected_positions=inputs.selected_positions,
    )  # fmt: skip
    loss_sum = float(objective.reduce(loss, inputs.loss_weights))
    return SimpleNamespace(loss_sum=loss_sum, denominator=float(inputs.denominator), extras={TARGET_BYTES: 1.0})


def _fragment(name: str, kind: str, tensor: torch.Tensor) -> StateFragment:
    return StateFragment(name, kind, tensor.reshape(-1).float(), 0, tuple(tensor.shape), None, 1, True)

"""The engine on real models: tensor and sequence parallelism and ZeRO against one rank at stage 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from gptoughts.config.experiment import ExperimentConfig, OptimConfig, ParallelConfig
from gptoughts.config.model import ModelConfig
from gptoughts.models.gpt.config import GPTConfig
from gptoughts.models.mla.config import MLAConfig
from tests.distributed import run_distributed

SHAPE = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "vocab_size": 256,
    "seq_length": 16,
}
MODELS: dict[str, ModelConfig] = {
    "gpt": GPTConfig(**SHAPE, num_query_groups=2),
    "gpt_qk_norm": GPTConfig(**SHAPE, num_query_groups=2, qk_layernorm=True),
    "gpt_tied": GPTConfig(**SHAPE, untie_embeddings_and_output_weights=False),
    "mla": MLAConfig(**SHAPE, q_lora_rank=16, kv_lora_rank=16, qk_head_dim=8, qk_pos_emb_head_dim=4, v_head_dim=8),
}
OPTIM = OptimConfig(lr=1e-3, eps=1e-4)
STEPS = 3


@dataclass(frozen=True)
class TokenBatch:
    tokens: Tensor
    weights: Tensor

    @property
    def denominator(self) -> Tensor:
        return self.weights.double().sum()


def _batch(seed: int) -> TokenBatch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 256, (2, 17), generator=generator)
    weights = (torch.rand(2, 16, generator=generator) < 0.2 + 0.2 * (seed % 4)).float()
    return TokenBatch(tokens, weights)


def _forward_step(chunk: Any, batch: TokenBatch) -> Any:
    from gptoughts.engine.interface import ForwardOutput

    positions = torch.arange(16).expand(2, 16)
    losses = chunk(batch.tokens[:, :-1], positions, None, labels=batch.tokens[:, 1:])
    return ForwardOutput((losses * batch.weights).sum())


def _build(model: str, stage: int, tensor: int, sequence: bool, dtype: torch.dtype = torch.float32) -> Any:
    from gptoughts.engine.deepspeed_engine import TrainEngine, construction_context, gathered
    from gptoughts.models.parameter_names import global_parameter_names
    from gptoughts.models.registry import FAMILIES
    from gptoughts.parallel import groups

    parallel = ParallelConfig(tensor=tensor, sequence=sequence)
    groups.initialize(parallel, seed=1)
    family = model.split("_")[0]
    config = ExperimentConfig(model_type=family, model=MODELS[model], parallel=parallel, block_size=16, seed=3)
    deepspeed_json: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 100},
        "bf16": {"enabled": dtype == torch.bfloat16},
    }
    built = FAMILIES[family].load_model_builder()(
        config,
        params_dtype=dtype,
        construction_context=construction_context(deepspeed_json, dtype),
        gathered=gathered,
    )
    names = global_parameter_names(built)
    return TrainEngine([built], _forward_step, OPTIM, deepspeed_json, parameter_names=names, seq_length=16)


def _train(model: str, stage: int, tensor: int, sequence: bool) -> list[tuple[float, float]]:
    engine = _build(model, stage, tensor, sequence)
    replicas = torch.distributed.get_world_size() // tensor
    replica = torch.distributed.get_rank() // tensor
    history = []
    for step in range(STEPS):
        batches = [_batch((step * 2 + m) if replicas == 1 else step * 2 + replica) for m in range(2 // replicas)]
        result = engine.train_step(batches, lr=1e-3)
        history.append((result.loss, result.grad_norm))
    before = engine.eval_step([_batch(50 + m) for m in range(2)]).loss
    history.append((before, 0.0))
    engine.close()
    return history


_REFERENCES: dict[str, list[tuple[float, float]]] = {}


def _reference(model: str) -> list[tuple[float, float]]:
    if model not in _REFERENCES:
        _REFERENCES[model] = run_distributed(_train, 1, model, 0, 1, False)[0]
    return _REFERENCES[model]


def _check(model: str, stage: int, tensor: int, sequence: bool) -> None:
    expected = _reference(model)
    for history in run_distributed(_train, 2, model, stage, tensor, sequence):
        for (loss, norm), (expected_loss, expected_norm) in zip(history, expected, strict=True):
            assert loss == pytest.approx(expected_loss, rel=2e-6)
            assert norm == pytest.approx(expected_norm, rel=2e-5)


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("model", ["gpt", "mla"])
def test_tensor_parallel_equals_one_rank(model: str, stage: int, sequence: bool) -> None:
    _check(model, stage, 2, sequence)


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("model", ["gpt_qk_norm", "gpt_tied"])
def test_awkward_parameters_under_tensor_parallelism(model: str, sequence: bool) -> None:
    _check(model, 1, 2, sequence)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("model", ["gpt_tied", "mla"])
def test_data_parallel_equals_one_rank(model: str, stage: int) -> None:
    _check(model, stage, 1, False)

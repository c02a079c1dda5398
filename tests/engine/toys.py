"""A toy model, microbatches with very unequal denominators, and a plain torch loop to compare the engine with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

HIDDEN = 12
ROWS = 6


@dataclass(frozen=True)
class ToyBatch:
    """Inputs [ROWS, HIDDEN], targets [ROWS, HIDDEN] and row weights [ROWS]."""

    inputs: Tensor
    targets: Tensor
    weights: Tensor

    @property
    def denominator(self) -> Tensor:
        return self.weights.double().sum()


def toy_batch(seed: int) -> ToyBatch:
    """Batch number ``seed``: between one and ROWS rows count, some of them much."""
    generator = torch.Generator().manual_seed(1000 + seed)
    weights = torch.zeros(ROWS)
    weights[: 1 + seed % ROWS] = 1.0 + 10.0 * (seed % 3)
    return ToyBatch(
        torch.randn(ROWS, HIDDEN, generator=generator), torch.randn(ROWS, HIDDEN, generator=generator), weights
    )


class ToyModel(nn.Module):
    """Two layers with a norm, odd sizes so that shards need padding; carries what megatron-core's schedule asks for."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        from megatron.core.enums import ModelType
        from megatron.core.transformer import TransformerConfig

        self.config = TransformerConfig(num_layers=1, hidden_size=HIDDEN, num_attention_heads=1)
        self.model_type = ModelType.encoder_or_decoder
        self.up = nn.Linear(HIDDEN, 7, dtype=dtype)
        self.norm = nn.LayerNorm(7, dtype=dtype)
        self.down = nn.Linear(7, HIDDEN, dtype=dtype)

    def set_input_tensor(self, tensor: Any) -> None:
        pass

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.up(inputs.to(self.up.weight.dtype))))
        return self.down(hidden).float()


def initial_values() -> dict[str, Tensor]:
    """Weights by name, the same for every layout."""
    generator = torch.Generator().manual_seed(7)
    shapes = {
        "up.weight": (7, HIDDEN),
        "up.bias": (7,),
        "norm.weight": (7,),
        "norm.bias": (7,),
        "down.weight": (HIDDEN, 7),
        "down.bias": (HIDDEN,),
    }
    return {name: torch.randn(shape, generator=generator) * 0.3 + 0.1 for name, shape in shapes.items()}


def toy_loss(model: nn.Module, batch: ToyBatch) -> Tensor:
    """Weighted sum of squared errors, fp32 scalar."""
    errors = (model(batch.inputs) - batch.targets).square().sum(dim=1)
    return (errors * batch.weights).sum()


def toy_forward_step(chunk: nn.Module, batch: ToyBatch) -> Any:
    from gptoughts.engine.interface import ForwardOutput

    loss = toy_loss(chunk, batch)
    return ForwardOutput(loss, {"rows": (batch.weights > 0).sum().float()})


def zero_json(stage: int, *, dtype: str = "fp32", clip: float = 0.5, **zero: Any) -> dict[str, Any]:
    """A resolved DeepSpeed JSON."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 8, **zero},
        "wall_clock_breakdown": False,
    }
    if dtype == "bf16":
        config["bf16"] = {"enabled": True}
    return config


def build_toy_engine(config: Mapping[str, Any], optim: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A TrainEngine around a toy with :func:`initial_values`. Collective: every rank of the world."""
    from gptoughts.engine import deepspeed_engine

    with deepspeed_engine.construction_context(config, dtype)():
        model = ToyModel(dtype)
    values = initial_values()
    for name, parameter in model.named_parameters():
        with deepspeed_engine.gathered([parameter]), torch.no_grad():
            parameter.copy_(values[name])
    names = dict(model.named_parameters())
    return deepspeed_engine.TrainEngine([model], toy_forward_step, optim, config, parameter_names=names)


def reference_run(optim: Any, lr: float, clip: float, steps: int, per_step: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of a plain fp32 loop over the same global batches."""
    model = ToyModel()
    model.load_state_dict(initial_values())
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": optim.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=lr, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    history = []
    for step in range(steps):
        batches = [toy_batch(step * per_step + i) for i in range(per_step)]
        denominator = sum(float(b.denominator) for b in batches)
        adam.zero_grad()
        loss = sum(toy_loss(model, b) for b in batches) / denominator
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        adam.step()
        history.append((float(loss), float(norm)))
    return history

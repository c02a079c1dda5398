"""Checkpoints as DeepSpeed itself writes them, of a module that knows nothing of this package; for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WIDTH = 10


class Toy(nn.Module):
    """Odd sizes (padding everywhere), a tied weight, a frozen one, a scalar, and buffers of two dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(7, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("average", torch.full((WIDTH,), 0.25))
        self.frozen = nn.Linear(WIDTH, WIDTH, bias=False)
        self.frozen.weight.requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor([1.5]))
        self.first = nn.Linear(WIDTH, 3, bias=False)
        self.second = nn.Linear(WIDTH, 3, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        h = self.frozen(self.norm(self.inner(x)) + self.average.to(x.dtype)) * self.scale
        return (self.first(h) + self.second(h)).square().mean()


def train_and_save(folder: str, stage: int, precision: str, has_groups: bool) -> dict[str, Tensor]:
    """Three steps, then save_checkpoint; returns the whole live fp32 weights and the buffers."""
    import deepspeed
    from deepspeed.utils import groups, safe_get_full_fp32_param

    assert groups.mpu is None, "a case before this one left its engine open"
    torch.manual_seed(1)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4, "optimizer": {"type": "AdamW", "params": {"lr": 0.05, "torch_adam": True}},
        "zero_optimization": {"stage": stage, "sub_group_size": 40}, "bf16": {"enabled": precision == "bf16"},
    }  # fmt: skip
    model = Toy()
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups: Any = [p for _, p in trainable]
    if has_groups:
        groups = [
            {"params": [p for name, p in trainable if name.endswith(kind) == wanted], "weight_decay": 0.1 * wanted}
            for kind, wanted in (("bias", True), ("bias", False))
        ]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=config)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    for _ in range(3):
        engine.backward(engine(torch.randn(4, 7, generator=generator).to(dtype)))
        engine.step()
    engine.save_checkpoint(folder, tag="step3")
    live = {
        name: safe_get_full_fp32_param(p).clone() for name, p in engine.module.named_parameters() if p.requires_grad
    }
    with deepspeed.zero.GatheredParameters([engine.module.frozen.weight], enabled=stage == 3):
        live["frozen.weight"] = engine.module.frozen.weight.detach().float().clone()
    live["second.weight"] = live["first.weight"]
    live |= {name: b.float() if b.is_floating_point() else b.clone() for name, b in engine.module.named_buffers()}
    engine.destroy()
    return live


def path_of(folder: Path, name: str) -> Path:
    """A file of the checkpoint that ``train_and_save`` writes."""
    return folder / "step3" / name

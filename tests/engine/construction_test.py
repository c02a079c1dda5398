"""Under ZeRO-3 no rank ever holds the whole model, not even while it is built."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from torch import nn

from gptoughts.config.experiment import ParallelConfig
from tests.distributed import run_distributed
from tests.engine.toys import zero_json

LAYERS = 24
WIDTH = 1024
MODEL_BYTES = LAYERS * WIDTH * WIDTH * 4
M_MMAP_THRESHOLD = -3
RESET_PEAK = Path("/proc/self/clear_refs")


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def _construction_peak_bytes(stage: int) -> int:
    """Growth of this process's resident memory at the peak of construction and initialization."""
    from gptoughts.engine.deepspeed_engine import construction_context, gathered
    from gptoughts.parallel import groups

    # glibc raises its mmap threshold with every large block that is freed, and its heap then keeps holes; with a fixed
    # threshold resident memory is what is alive.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536)
    groups.initialize(ParallelConfig(), seed=1)
    with construction_context(zero_json(stage), torch.float32)():
        nn.Linear(8, 8)  # what DeepSpeed loads once is not the model's
    before = _status_bytes("VmRSS")
    RESET_PEAK.write_text("5")
    with construction_context(zero_json(stage), torch.float32)():
        model = Tower()
    for parameter in model.parameters():
        with gathered([parameter]), torch.no_grad():
            parameter.fill_(1.0)
    return _status_bytes("VmHWM") - before


@pytest.mark.skipif(not RESET_PEAK.exists(), reason="needs Linux to reset the peak of resident memory")
def test_zero3_construction_stays_below_the_model() -> None:
    for peak in run_distributed(_construction_peak_bytes, 2, 3):
        assert peak < 0.75 * MODEL_BYTES
    for peak in run_distributed(_construction_peak_bytes, 2, 2):
        assert peak > 0.95 * MODEL_BYTES


def _written_values() -> list[float]:
    from gptoughts.engine.deepspeed_engine import construction_context, gathered
    from gptoughts.parallel import groups

    groups.initialize(ParallelConfig(), seed=1)
    with construction_context(zero_json(3), torch.float32)():
        layer = nn.Linear(5, 3)
    values = torch.arange(15.0).view(3, 5) + 1 / 3  # not representable in bf16
    with gathered([layer.weight]), torch.no_grad():
        layer.weight.copy_(values)
    assert layer.weight.numel() == 0
    with gathered([layer.weight]):
        return (layer.weight - values).abs().flatten().tolist()


def test_values_written_while_gathered_stay_to_the_bit() -> None:
    for differences in run_distributed(_written_values, 2):
        assert differences == [0.0] * 15

"""Every shipped JSON trains; offload to the host's memory changes where state lives and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_distributed
from tests.harness import Layout, ToyRun

SHIPPED = Path(__file__).parents[2] / "ds_configs"
FP32 = "--train.precision=fp32"
OFFLOADED = {"zero2_offload": "zero2", "zero3_offload": "zero3"}
STEPS = 3


def run_file(path: str, folder: str, resumes: bool) -> dict[str, Any]:
    """Losses and norms of the steps, saved after the first; with ``resumes`` the later ones once more."""
    layout = Layout(data=2, accumulation=2, extra=(f"--deepspeed_config={path}", FP32))
    run = ToyRun("gpt", layout, Path(folder))
    history = []
    for result in run.train(STEPS):
        history.append((result.loss, result.grad_norm))
        if run.step == 1:
            run.save()
    where = {str(fragment.tensor.device) for fragment in run.engine.state_fragments()}
    weights = {f.name: f.tensor.clone() for f in run.engine.state_fragments() if f.kind == "weight"}
    run.close()
    again, same = [], True
    if resumes:
        run = ToyRun("gpt", layout, Path(folder))
        run.resume()
        again = [(result.loss, result.grad_norm) for result in run.train(STEPS - 1)]
        same = all(torch.equal(weights[f.name], f.tensor) for f in run.engine.state_fragments() if f.kind == "weight")
        run.close()
    return {"history": history, "again": again, "weights_equal": same, "where": where}


@pytest.mark.parametrize("name", OFFLOADED)
def test_offload_learns_the_same_and_resumes_to_the_bit(name: str, tmp_path: Path) -> None:
    expected = run_distributed(run_file, 2, str(SHIPPED / f"{OFFLOADED[name]}.json"), str(tmp_path / "on"), False)[0]
    for found in run_distributed(run_file, 2, str(SHIPPED / f"{name}.json"), str(tmp_path / "off"), True):
        losses, norms = zip(*found["history"], strict=True)
        assert losses == pytest.approx([loss for loss, _ in expected["history"]], rel=1e-4)
        assert norms == pytest.approx([norm for _, norm in expected["history"]], rel=1e-3)
        assert losses[-1] < losses[0]
        assert found["again"] == found["history"][1:]
        assert found["weights_equal"]
        assert found["where"] == {"cpu"}


ELSEWHERE = {"zero3_infinity"}  # nvme_test.py
REST = sorted(
    path.name for path in SHIPPED.glob("*.json") if path.stem not in {*OFFLOADED, *OFFLOADED.values(), *ELSEWHERE}
)


@pytest.mark.parametrize("name", REST)
def test_the_other_files_train(name: str, tmp_path: Path) -> None:
    path, precision = str(SHIPPED / name), () if "fp8" in name else (FP32,)
    for losses in run_distributed(losses_of_file, 2, path, str(tmp_path), precision):
        assert losses[-1] < losses[0]


def losses_of_file(path: str, folder: str, flags: tuple[str, ...]) -> list[float]:
    run = ToyRun("gpt", Layout(data=2, extra=(f"--deepspeed_config={path}", *flags)), Path(folder))
    losses = [result.loss for result in run.train(STEPS)]
    run.close()
    return losses

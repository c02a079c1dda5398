"""--init_from for a mixture of experts: stacked experts in any layout, and the router's bias, which is no weight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gptoughts.checkpoint.huggingface.exporting import export_model
from gptoughts.checkpoint.portable import CheckpointReader
from tests.distributed import run_distributed
from tests.harness import Layout, ToyRun

EXTRA = ("--model.layernorm_epsilon=1e-6", "--model.moe_router_bias_update_rate=0.1")


def train(folder: str) -> str:
    run = ToyRun("deepseek", Layout(extra=EXTRA), Path(folder))
    list(run.train(2))
    saved = run.save()
    run.close()
    return str(saved)


def start(layout: Layout, source: str, folder: str) -> str:
    from gptoughts.training.initial_weights import load_initial_weights

    run = ToyRun("deepseek", layout, Path(folder))
    load_initial_weights(Path(source), run.engine, run.parameters, run.experiment.config.model)
    saved = run.save()
    run.close()
    return str(saved)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint of ours and its export."""
    folder = tmp_path_factory.mktemp("trained")
    (saved,) = run_distributed(train, 1, str(folder))
    export_model(Path(saved), folder / "published")
    return Path(saved), folder / "published"


@pytest.mark.parametrize("which", ["checkpoint", "published"])
@pytest.mark.parametrize(
    "layout", [Layout(extra=EXTRA), Layout(data=2, zero=3, extra=EXTRA), Layout(tensor=2, zero=1, extra=EXTRA)], ids=str
)
def test_weights_and_biases_are_exact(
    layout: Layout, which: str, trained: tuple[Path, Path], tmp_path: Path
) -> None:  # fmt: skip
    source = trained[0] if which == "checkpoint" else trained[1]
    saved, *_ = run_distributed(start, layout.world_size, layout, str(source), str(tmp_path))
    before, after = CheckpointReader(trained[0]), CheckpointReader(Path(saved))
    names = [(name, kind) for kind in ("weight", "buffer") for name in before.names(kind)]
    biases = [name for name, kind in names if kind == "buffer"]
    assert biases
    assert all(before.full(name, "buffer").any() for name in biases)
    for name, kind in names:
        assert torch.equal(after.full(name, kind), before.full(name, kind)), name

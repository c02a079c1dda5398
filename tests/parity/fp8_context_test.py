"""FP8 with sequences divided over ranks: scales and losses are those of one rank.

Context-parallel peers cast the tokens of one microbatch, each its own, with one scale: the largest magnitude is the one
of whole sequences. Gradients are N times those of one rank, as the mean over the N peers follows.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.distributed import run_distributed
from tests.harness import Layout, ToyRun
from tests.parity.fp8_test import FP8, TENSOR_LOSS_RELATIVE, TENSOR_STEP_1_AMAX_RELATIVE
from tests.parity.matrix.routing import load_table, logged_routing

STEPS = 50
CALM = (*FP8, "--grad_clip=1.0", "--optim.lr=3e-4", "--optim.warmup_steps=20")
"""As real runs have it. At the toys' own rate, without clipping, the loss of latent attention jumps, and rounding moves
later losses of one rank by some percent."""
CASES = [
    ("gpt", Layout(context=2, context_method="ring", zero=3, extra=CALM)),
    ("gpt", Layout(context=4, zero=2, extra=CALM)),
    ("gpt", Layout(context=2, context_method="ring", pipeline=2, zero=1, accumulation=2, extra=CALM)),
    ("mla", Layout(context=2, context_method="ring", extra=CALM)),
    ("mla", Layout(context=2, tensor=2, sequence=True, zero=1, extra=CALM)),
    ("deepseek", Layout(context=2, expert=2, zero=3, accumulation=2, extra=CALM)),
    ("llada", Layout(context=2, extra=CALM)),
]


def train(
    family: str, layout: Layout, folder: str, table: str | None, steps: int
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses on this rank, and histories and scales after the first step.

    Args:
        family: Of the model.
        layout: Of the run.
        folder: Where it may write.
        table: Which experts each token passes; None: that is recorded in ``folder``.
        steps: How many of the run's :data:`STEPS`.
    """
    run = ToyRun(family, layout, Path(folder), steps=STEPS)
    losses, state = [], {}
    with logged_routing(run, None if table is None else load_table(Path(table))) as log:
        for result in run.train(steps):
            losses.append(result.loss)
            if run.step == 1:
                state = {f.name: f.tensor.clone() for f in run.engine.state_fragments() if ".fp8." in f.name}
    if table is None:
        torch.save(log.table(), Path(folder) / "routing.pt")
    run.close()
    return losses, state


@pytest.mark.parametrize(
    ("family", "layout", "steps"),
    [
        pytest.param(*CASES[0], 10, id="gpt-10-steps"),
        *(pytest.param(*case, STEPS, id=f"{case[0]}-{case[1]}", marks=pytest.mark.slow) for case in CASES),
    ],
)
def test_parts_of_sequences_have_the_scales_of_one_rank(
    family: str, layout: Layout, steps: int, tmp_path: Path
) -> None:
    one_rank = Layout(accumulation=layout.accumulation, layers=layout.layers, extra=layout.extra)
    ((expected, there),) = run_distributed(train, 1, family, one_rank, str(tmp_path / "one"), None, steps)
    everyone = run_distributed(
        train, layout.world_size, family, layout, str(tmp_path / "parts"), str(tmp_path / "one" / "routing.pt"), steps
    )
    seen = set()
    for found, here in everyone:
        assert found == pytest.approx(expected, rel=TENSOR_LOSS_RELATIVE)
        seen |= here.keys()
        for name, tensor in here.items():
            # Gradients of the last products have passed no cast; those below have, from other numbers than one rank's.
            is_last = f".{layout.layers - 1}.mlp." in name and "linear_fc2" in name
            if name.endswith("_bwd") and not is_last:
                continue
            times = {"amax_history_bwd": layout.context, "scale_bwd": 1 / layout.context}.get(
                name.rpartition(".")[2], 1
            )
            wanted = torch.where(there[name] == 1, 1.0, there[name] * times) if "scale" in name else there[name] * times
            torch.testing.assert_close(tensor, wanted, rtol=TENSOR_STEP_1_AMAX_RELATIVE, atol=0, msg=name)
    assert seen == there.keys()
    assert any(name.endswith("_bwd") and "linear_fc2" in name for name in seen)

"""What stages have to agree on: skipped updates, evaluation, norms of what each has, resuming."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from gptoughts.checkpoint import layout as checkpoint_layout
from gptoughts.checkpoint.portable import CheckpointReader
from tests.distributed import run_distributed
from tests.harness import Layout, ToyRun, step_microbatches

MTP = ("--model.mtp_num_layers=1",)
INTERLEAVED = Layout(pipeline=2, virtual=2, zero=3, accumulation=2, layers=4)


def _batches(run: ToyRun, step: int) -> list[Any]:
    return step_microbatches(run.experiment, run.objective, step, run.data_rank)


def skip_and_evaluate(layout: Layout, folder: str) -> dict[str, Any]:
    """A good step, one whose gradients are infinite on the last stage alone, evaluation before and after a good one."""
    run = ToyRun("gpt", layout, Path(folder))
    good = run.engine.train_step(_batches(run, 0), lr=1e-3)
    before = [fragment.tensor.clone() for fragment in run.engine.state_fragments()]
    is_last = any(chunk.post_process for chunk in run.engine.chunks)
    hooks = []
    if is_last:
        norm = next(p for name, p in run.parameters.items() if name.startswith("decoder.final_layernorm"))
        hooks.append(norm.register_hook(lambda gradient: torch.full_like(gradient, math.inf)))
    poisoned = run.engine.train_step(_batches(run, 1), lr=1e-3)
    for hook in hooks:
        hook.remove()
    is_untouched = all(torch.equal(a, b.tensor) for a, b in zip(before, run.engine.state_fragments(), strict=True))
    evaluated = run.engine.eval_step(_batches(run, 2))
    again = run.engine.eval_step(_batches(run, 2))
    trained = run.engine.train_step(_batches(run, 2), lr=1e-3)
    run.close()
    return {
        "applied": (good.applied, poisoned.applied, trained.applied),
        "poisoned_norm": poisoned.grad_norm,
        "is_untouched": is_untouched,
        "losses": (evaluated.loss, again.loss, trained.loss),
        "extras": (evaluated.extras, trained.extras),
    }


@pytest.mark.parametrize(
    "layout",
    [
        INTERLEAVED,
        *(pytest.param(Layout(pipeline=2, zero=zero, layers=2), marks=pytest.mark.slow) for zero in range(4)),
    ],
    ids=str,
)
def test_stages_skip_together_and_evaluation_changes_nothing(layout: Layout, tmp_path: Path) -> None:
    ranks = run_distributed(skip_and_evaluate, layout.world_size, layout, str(tmp_path))
    for found in ranks:
        assert found["applied"] == (True, False, True)
        assert found["poisoned_norm"] == math.inf
        assert found["is_untouched"]
        evaluated, again, trained = found["losses"]
        assert evaluated == again
        assert evaluated == pytest.approx(trained, rel=1e-6)
        assert found["extras"][0] == found["extras"][1]
        assert found["losses"] == ranks[0]["losses"]


def train(layout: Layout, folder: str, steps: int, resumes: bool) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step; saves at the end."""
    run = ToyRun("deepseek", layout, Path(folder))
    if resumes:
        run.resume()
    found = [(result.loss, result.grad_norm) for result in run.train(steps)]
    run.save()
    run.close()
    return found


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (INTERLEAVED, Layout(layers=4)),
        (Layout(layers=4, data=2, zero=1), Layout(pipeline=2, zero=2, layers=4, accumulation=2)),
        pytest.param(
            Layout(pipeline=2, data=2, zero=3, layers=4), Layout(tensor=2, pipeline=2, zero=1, layers=4),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            Layout(pipeline=2, virtual=2, zero=3, accumulation=2, layers=4, tied=True, extra=MTP),
            Layout(tensor=2, data=2, zero=1, layers=4, tied=True, extra=MTP),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            Layout(data=2, zero=2, layers=4, extra=MTP),
            Layout(pipeline=2, zero=1, layers=4, accumulation=4, extra=MTP),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            Layout(pipeline=4, zero=3, layers=4, accumulation=4), Layout(tensor=2, data=2, zero=3, layers=4),
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)  # fmt: skip
def test_a_run_goes_on_under_another_layout(first: Layout, second: Layout, tmp_path: Path) -> None:
    one_rank = Layout(layers=4, tied=first.tied, extra=first.extra)
    expected = run_distributed(train, 1, one_rank, str(tmp_path / "whole"), 6, False)[0]
    run_distributed(train, first.world_size, first, str(tmp_path / "moved"), 3, False)
    for history in run_distributed(train, second.world_size, second, str(tmp_path / "moved"), 3, True):
        for (loss, norm), (expected_loss, expected_norm) in zip(history, expected[3:], strict=True):
            assert loss == pytest.approx(expected_loss, rel=1e-4)
            assert norm == pytest.approx(expected_norm, rel=1e-3)
    there, here = (
        CheckpointReader(checkpoint_layout.step_folder(tmp_path / name / "run", 6)) for name in ("whole", "moved")
    )
    assert here.names() == there.names()
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        for name in there.names():
            ours, theirs = here.full(name, kind), there.full(name, kind)
            assert float((ours - theirs).norm()) <= 1e-4 * float(theirs.norm()), (name, kind)


def shared_weight(run: ToyRun) -> torch.Tensor:
    """This stage's embedding, whole: the owner's or the copy."""
    from gptoughts.engine.deepspeed_engine import gathered_for_reading
    from gptoughts.models.stages import shared_embedding_weight

    weight = shared_embedding_weight(run.engine.chunks)
    assert weight is not None
    with gathered_for_reading([weight]):
        return weight.detach().clone()


def shared_weights(family: str, layout: Layout, folder: str) -> tuple[bool, list[str]]:
    """Whether owner and copy are equal to the bit, trained and resumed; and the names in the checkpoint."""
    trained = ToyRun(family, layout, Path(folder))
    assert all(result.applied for result in trained.train(3))
    folder_of_step = trained.save()
    seen = [shared_weight(trained)]
    trained.close()
    resumed = ToyRun(family, layout, Path(folder))  # replaces the groups of the first
    resumed.resume()
    seen.append(shared_weight(resumed))
    resumed.close()
    everyone = [torch.empty_like(seen[0]) for _ in range(torch.distributed.get_world_size())]
    found = []
    for weight in seen:
        torch.distributed.all_gather(everyone, weight)
        found += [torch.equal(other, seen[0]) for other in everyone]
    return all(found), CheckpointReader(folder_of_step).names()


@pytest.mark.parametrize("zero", [1, pytest.param(0, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_tied_matrices_stay_equal_to_the_bit_and_are_saved_once(zero: int, tmp_path: Path) -> None:
    layout = Layout(pipeline=2, zero=zero, accumulation=2, precision="bf16", tied=True)
    for are_equal, names in run_distributed(shared_weights, 2, "gpt", layout, str(tmp_path)):
        assert are_equal
        assert "embedding.word_embeddings.weight" in names
        assert "output_layer.weight" not in names


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("zero", range(4))
def test_the_embedding_of_multi_token_prediction_stays_equal_to_the_bit(zero: int, tied: bool, tmp_path: Path) -> None:
    layout = Layout(pipeline=2, zero=zero, accumulation=2, precision="bf16", tied=tied, extra=MTP)
    for are_equal, names in run_distributed(shared_weights, 2, "deepseek", layout, str(tmp_path)):
        assert are_equal
        assert [name for name in names if "word_embeddings" in name] == ["embedding.word_embeddings.weight"]
        assert ("output_layer.weight" in names) != tied
        assert "mtp.layers.0.eh_proj.weight" in names

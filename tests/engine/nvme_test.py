"""ZeRO-Infinity: state in files learns, resumes and moves like state in memory, and leaves nothing behind."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_distributed
from tests.engine.nvme import LARGE, SHIPPED, async_io, write_json  # noqa: F401 (a fixture)
from tests.harness import Layout, ToyRun, step_microbatches

STEPS = 4
ZERO3 = str(SHIPPED.with_name("zero3.json"))
WITHOUT_PIPELINE = {"device": "nvme", "nvme_path": "auto"}

pytestmark = pytest.mark.usefixtures("async_io")


def _run(path: str, folder: str, precision: str, pipeline: int = 1) -> ToyRun:
    extra = (f"--deepspeed_config={path}", f"--train.precision={precision}", *LARGE)
    return ToyRun("gpt", Layout(data=2 // pipeline, pipeline=pipeline, accumulation=2, extra=extra), Path(folder))


def _state(run: ToyRun) -> dict[tuple[str, str, int], torch.Tensor]:
    return {(f.name, f.kind, f.start): f.tensor.clone() for f in run.engine.state_fragments()}


def _is_equal(a: dict[Any, torch.Tensor], b: dict[Any, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


def _files(folder: str) -> list[str]:
    return sorted(path.name for path in Path(folder, "run").rglob("*.swp"))


def _train_and_resume(path: str, folder: str, precision: str, resumes: bool) -> dict[str, Any]:
    """Losses and norms of the steps, saved after the second; with ``resumes`` the later ones once more."""
    run = _run(path, folder, precision)
    history = []
    for result in run.train(STEPS):
        history.append((result.loss, result.grad_norm))
        if run.step == 2:
            run.save()
    state = _state(run)
    files = _files(folder)
    torch.distributed.barrier()
    run.close()
    again, is_equal = [], True
    if resumes:
        run = _run(path, folder, precision)
        run.resume()
        again = [(result.loss, result.grad_norm) for result in run.train(STEPS - 2)]
        is_equal = _is_equal(state, _state(run))
        run.close()
    torch.distributed.barrier()
    return {"history": history, "again": again, "equal": is_equal, "files": files, "left": _files(folder)}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, float]]:
    """Losses and norms of plain ZeRO-3 in fp32."""
    folder = str(tmp_path_factory.mktemp("plain"))
    return run_distributed(_train_and_resume, 2, ZERO3, folder, "fp32", False)[0]["history"]


def _check(found: dict[str, Any], expected: list[tuple[float, float]]) -> None:
    losses, norms = zip(*found["history"], strict=True)
    assert losses == pytest.approx([loss for loss, _ in expected], rel=1e-4)
    assert norms == pytest.approx([norm for _, norm in expected], rel=1e-3)
    assert losses[-1] < losses[0]
    assert found["again"] == found["history"][2:]
    assert found["equal"], "state after resuming"
    assert found["files"]
    assert not found["left"]


def test_the_shipped_file_learns_the_same_and_resumes_to_the_bit(
    plain: list[tuple[float, float]], tmp_path: Path
) -> None:
    for found in run_distributed(_train_and_resume, 2, str(SHIPPED), str(tmp_path), "fp32", True):
        _check(found, plain)
        kinds = {name.rsplit(".tensor", 1)[0].rstrip("0123456789_-") for name in found["files"]}
        assert {"exp_avg", "exp_avg_sq"} <= kinds, "moments are in files"
        assert any("_param." in name for name in found["files"]), "weights are in files"


OTHERS: dict[str, dict[str, Any]] = {
    "optimizer": {"offload_optimizer": WITHOUT_PIPELINE, "offload_param": None},
    "optimizer-weights-on-the-host": {"offload_optimizer": WITHOUT_PIPELINE, "offload_param": {"device": "cpu"}},
    "weights": {"offload_optimizer": None},
    "weights-optimizer-on-the-host": {"offload_optimizer": {"device": "cpu"}},
    "some-weights-on-the-host": {"offload_param": {"device": "nvme", "max_in_cpu": 600_000}},
    "no-reuse": {"stage3_max_reuse_distance": 0},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_every_combination(name: str, plain: list[tuple[float, float]], tmp_path: Path) -> None:
    path = write_json(tmp_path, name, **OTHERS[name])
    for found in run_distributed(_train_and_resume, 2, path, str(tmp_path), "fp32", True):
        _check(found, plain)


AXES = {
    "gpt-tensor": ("gpt", Layout(tensor=2, sequence=True)),
    "gpt-interleaved": ("gpt", Layout(pipeline=2, virtual=2, layers=4, accumulation=2)),
    "deepseek-expert": ("deepseek", Layout(data=2, expert=2)),
    "mla-context": ("mla", Layout(context=2)),
}


def _losses(family: str, layout: Layout, path: str, folder: str) -> tuple[list[float], list[str]]:
    extra = (f"--deepspeed_config={path}", "--train.precision=fp32", *LARGE)
    run = ToyRun(family, dataclasses.replace(layout, extra=extra), Path(folder))
    losses = [result.loss for result in run.train(3)]
    files = _files(folder)
    torch.distributed.barrier()
    run.close()
    return losses, files


@pytest.mark.slow
@pytest.mark.parametrize("name", AXES)
def test_beside_every_axis(name: str, tmp_path: Path) -> None:
    family, layout = AXES[name]
    expected = run_distributed(_losses, 2, family, layout, ZERO3, str(tmp_path / "plain"))
    for (losses, _), (found, files) in zip(
        expected, run_distributed(_losses, 2, family, layout, str(SHIPPED), str(tmp_path / "nvme")), strict=True
    ):
        assert found == pytest.approx(losses, rel=1e-4)
        assert any("_param." in file for file in files)
        assert any(file.startswith("exp_avg") for file in files)


def _whole(run: ToyRun) -> dict[tuple[str, str], list[tuple[int, torch.Tensor]]]:
    """This rank's own pieces of every tensor, with where they begin."""
    found: dict[tuple[str, str], list[tuple[int, torch.Tensor]]] = {}
    for fragment in run.engine.state_fragments():
        if fragment.is_owner:
            found.setdefault((fragment.name, fragment.kind), []).append((fragment.start, fragment.tensor.clone()))
    return found


def _join(ranks: list[dict[tuple[str, str], list[tuple[int, torch.Tensor]]]]) -> dict[tuple[str, str], torch.Tensor]:
    keys = {key for rank in ranks for key in rank}
    return {
        key: torch.cat(
            [piece for _, piece in sorted((p for rank in ranks for p in rank.get(key, [])), key=lambda p: p[0])]
        )
        for key in keys
    }


def _go_on(path: str, folder: str, pipeline: int, steps: int) -> tuple[Any, list[float], Any]:
    """State after resuming, losses of further steps, state after these; the last step is saved."""
    run = _run(path, folder, "bf16", pipeline)
    if Path(folder, "run", "checkpoints").exists():
        run.resume()
    before = _whole(run)
    losses = [result.loss for result in run.train(steps)]
    run.save()
    after = _whole(run)
    run.close()
    return before, losses, after


@pytest.mark.slow
def test_checkpoints_move_to_other_layouts_and_back(tmp_path: Path) -> None:
    zero1, nvme = str(SHIPPED.with_name("zero1.json")), str(SHIPPED)
    ours, folder = [], str(tmp_path / "moved")
    for path, pipeline in ((nvme, 1), (zero1, 1), (nvme, 2), (ZERO3, 1)):
        ranks = run_distributed(_go_on, 2, path, folder, pipeline, 2)
        before, after = _join([rank[0] for rank in ranks]), _join([rank[2] for rank in ranks])
        if ours:
            assert _is_equal(before, ours[-1]), "as it was saved, to the bit"
        ours.append(after)
    assert len(ours) == 4


def _disturb(path: str, folder: str) -> dict[str, bool]:
    """A refused update, a snapshot that is gone back to, and a save that is written while training goes on."""
    from gptoughts.checkpoint import random_state
    from gptoughts.training.snapshot import Snapshot

    run = _run(path, folder, "bf16")
    list(run.train(1))
    start, found = _state(run), {}
    batches = step_microbatches(run.experiment, run.objective, run.step, run.data_rank)
    snapshot = Snapshot()

    def judge(loss: float, norm: float) -> bool:
        snapshot.take(run.engine, {"step": run.step}, random_state.capture())
        return False

    result = run.engine.train_step(batches, lr=1e-3, judge=judge)
    found["refused"] = not result.applied and result.is_refused
    found["untouched"] = _is_equal(start, _state(run))
    pending = run.manager.begin(run.engine, {"step": run.step}, is_asynchronous=True)
    losses = [result.loss for result in run.train(2)]
    run.manager.finish(pending)
    end = _state(run)
    found["learns"] = not _is_equal(start, end)
    snapshot.restore(run.engine)
    run.step = 1
    found["restored"] = _is_equal(start, _state(run))
    found["the same again"] = [result.loss for result in run.train(2)] == losses and _is_equal(end, _state(run))
    run.resume()
    found["saved"] = _is_equal(start, _state(run))
    folders = {str(fragment.folder) for fragment in run.engine.state_fragments() if fragment.folder is not None}
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("(deleted)")]
    found["snapshot on the disk"] = any(folder in line for folder in folders for line in mapped)
    run.close()
    torch.distributed.barrier()
    found["nothing left"] = not list(Path(folder, "run").rglob("gptoughts-*"))
    return found


def test_refused_updates_snapshots_and_saves_beside_training(tmp_path: Path) -> None:
    for found in run_distributed(_disturb, 2, str(SHIPPED), str(tmp_path)):
        assert all(found.values()), found

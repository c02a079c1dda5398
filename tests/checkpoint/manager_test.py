"""Saving while training goes on: the same files as a save that waits, and the former checkpoint until then."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from gptoughts.checkpoint import layout
from gptoughts.errors import CheckpointError
from tests.distributed import run_distributed
from tests.harness import Layout, ToyRun

LAYOUT = {"data": 2, "zero": 3}


def _records(folder: Path) -> dict[str, str]:
    return {name: record["xxh3_128"] for name, record in layout.read_manifest(folder)["files"].items()}


def _save_both_ways(folder: str) -> dict[str, str]:
    """Save step 2 at once and again asynchronously, with three steps in between writing and finishing."""
    run = ToyRun("gpt", Layout(**LAYOUT), Path(folder), steps=8)
    for _ in run.train(2):
        pass
    waited = _records(run.save())
    former = layout.step_folder(run.manager.run, 2)
    # Another step's name, so that the former stays; what is compared is the state.
    pending = run.manager.begin(run.engine, {"step": 3, "is": "of step 2"}, is_asynchronous=True)
    for _ in run.train(3):
        assert layout.list_checkpoints(run.manager.run) == [former]
        reader = run.manager.find("auto")
        assert reader is not None
        assert reader.folder == former
    pending._record.exception()  # waits
    assert pending.is_written
    assert pending.is_next_due
    run.manager.publish(pending)
    finished = run.manager.finish(pending)
    assert layout.list_checkpoints(run.manager.run) == [former, finished]
    now = _records(finished)
    assert json.loads((finished / layout.TRAIN_STATE).read_text())["is"] == "of step 2"
    run.close()
    return {name: now[name] for name in waited if name.startswith("rank_") and now[name] != waited[name]}


def test_training_on_does_not_change_what_is_written(tmp_path: Path) -> None:
    for different in run_distributed(_save_both_ways, 2, str(tmp_path)):
        assert different == {}


def _fail_on_one_rank(folder: str) -> list[str]:
    run = ToyRun("gpt", Layout(**LAYOUT), Path(folder), steps=8)
    for _ in run.train(1):
        pass
    run.save()
    for _ in run.train(1):
        pass
    partial = layout.partial_folder(layout.step_folder(run.manager.run, 2))
    pending = run.manager.begin(run.engine, {"step": 2}, is_asynchronous=True)
    pending._record.exception()
    if run.data_rank == 1:
        pending._record._result = None
        pending._record._exception = OSError(28, "No space left on device")
    with pytest.raises(CheckpointError) as caught:
        run.manager.finish(pending)
    if run.data_rank == 0:  # who removes it
        assert not partial.exists()
    reader = run.manager.find("auto")
    assert reader is not None
    assert layout.step_of(reader.folder) == 1
    # A failure leaves nothing in the way of the next save.
    run.manager.finish(run.manager.begin(run.engine, {"step": 2}, is_asynchronous=True))
    assert [layout.step_of(found) for found in layout.list_checkpoints(run.manager.run)] == [1, 2]
    run.close()
    return caught.value.problems


def test_a_rank_that_cannot_write(tmp_path: Path) -> None:
    for problems in run_distributed(_fail_on_one_rank, 2, str(tmp_path)):
        assert len(problems) == 1
        assert "rank 1" in problems[0]
        assert "No space left" in problems[0]
        assert "the last good checkpoint is" in problems[0]


def _losses_with_dropout(layout_of_run: Layout, folder: str, is_of_an_earlier_version: bool) -> tuple[list[float], ...]:
    """Steps 3 and 4 of a run that saved after 2, and of one that resumed there."""
    run = ToyRun("gpt", layout_of_run, Path(folder))
    for _ in run.train(2):
        pass
    saved = run.save()
    expected = [result.loss for result in run.train(2)]
    run.close()
    if is_of_an_earlier_version and run.data_rank == 0:
        manifest = json.loads((saved / layout.MANIFEST).read_text())
        del manifest["layout"]["context"], manifest[layout._OWN_CHECKSUM]
        layout.write_atomically(saved / layout.MANIFEST, json.dumps(manifest))
    torch.distributed.barrier()
    run = ToyRun("gpt", layout_of_run, Path(folder))
    run.resume()
    found = [result.loss for result in run.train(2)]
    run.close()
    return expected, found


@pytest.mark.parametrize(
    ("layout_of_run", "is_of_an_earlier_version"), [(Layout(context=2, zero=1), False), (Layout(data=2), True)]
)
def test_generators_go_on_where_the_layout_is_the_same(
    layout_of_run: Layout, is_of_an_earlier_version: bool, tmp_path: Path
) -> None:
    dropout = ("--model.hidden_dropout=0.1", "--model.attention_dropout=0.1")
    run = dataclasses.replace(layout_of_run, extra=dropout)
    for expected, found in run_distributed(_losses_with_dropout, 2, run, str(tmp_path), is_of_an_earlier_version):
        assert found == expected


def _refusals(layout_of_run: Layout, folder: str) -> dict[str, str]:
    """What resuming says where one file, each in turn, is missing or has one bit turned."""
    run = ToyRun("gpt", layout_of_run, Path(folder), steps=8)
    for _ in run.train(1):
        pass
    saved = run.save()
    said = {}
    for path in sorted(saved.iterdir()):
        content = path.read_bytes()
        for damage in ("missing", "flipped"):
            torch.distributed.barrier()
            if run.data_rank == 0 and damage == "missing":
                path.unlink()
            elif run.data_rank == 0:
                place = len(content) // 2
                path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            torch.distributed.barrier()
            for resume in ("auto", str(saved)):
                try:
                    run.manager.find(resume)
                    said[f"{path.name} {damage} {resume}"] = "accepted"
                except CheckpointError as error:
                    said[f"{path.name} {damage} {resume}"] = error.problems[0]
            torch.distributed.barrier()
            if run.data_rank == 0:
                path.write_bytes(content)
    torch.distributed.barrier()
    assert run.manager.find("auto") is not None
    run.close()
    return said


@pytest.mark.parametrize("layout_of_run", [Layout(), Layout(**LAYOUT)], ids=str)
def test_a_missing_or_flipped_file_is_refused_by_name(layout_of_run: Layout, tmp_path: Path) -> None:
    said, *others = run_distributed(_refusals, layout_of_run.world_size, layout_of_run, str(tmp_path))
    assert all(other == said for other in others), "every rank has to end, and knows why"
    files = {key.split()[0] for key in said}
    of_ranks = {f"rank_{rank:05d}.safetensors" for rank in range(layout_of_run.world_size)}
    assert files == {*of_ranks, layout.MANIFEST, layout.CONFIG, layout.TRAIN_STATE}
    folder = layout.step_folder(tmp_path / "run", 1)
    for key, problem in said.items():
        file, damage, resume = key.split()
        if (file, damage) == (layout.MANIFEST, "missing"):
            reason = "no manifest.json" if resume == "auto" else "expected"
            assert str(folder) in problem
            assert reason in problem
        else:
            assert problem.startswith(f"{folder / file}: "), key
            assert (
                "missing" if damage == "missing" else "damaged" if file == layout.MANIFEST else "checksum"
            ) in problem

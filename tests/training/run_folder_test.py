"""One run per folder, and no former course overwritten."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptoughts.checkpoint import layout
from gptoughts.errors import CheckpointError
from gptoughts.training.metrics import METRICS_FILE
from gptoughts.training.run_folder import open_run, set_aside
from tests.distributed import run_distributed


def make_checkpoint(run: Path, step: int) -> Path:
    folder = layout.step_folder(run, step)
    layout.write_manifest(layout.start_partial(folder), {}, {"step": step})
    layout.publish(folder, keep_last=0)
    return folder


def steps_in(run: Path) -> list[int]:
    return [layout.step_of(folder) for folder in layout.list_checkpoints(run)]


@pytest.mark.parametrize(
    ("resumed", "kept", "moved"),
    [(6, [2, 4, 6], []), (4, [2, 4], [6]), (None, [], [2, 4, 6])],
    ids=["newest", "earlier", "anew"],
)
def test_what_a_run_does_not_go_on_from_is_set_aside(
    tmp_path: Path, resumed: int | None, kept: list[int], moved: list[int]
) -> None:
    folders = {step: make_checkpoint(tmp_path, step) for step in (2, 4, 6)}
    (tmp_path / METRICS_FILE).write_text("{}\n")
    resumed_from = None if resumed is None else folders[resumed]
    aside = set_aside(tmp_path, resumed_from=resumed_from, step=resumed or 0)
    assert steps_in(tmp_path) == kept
    assert (steps_in(aside) if aside else []) == moved
    if aside is not None:
        assert (aside / METRICS_FILE).read_text() == "{}\n"
        assert layout.locate(aside) == layout.step_folder(aside, 6)


def test_a_checkpoint_of_another_run_replaces_the_course(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "run", 2)
    other = make_checkpoint(tmp_path / "other", 2)
    for number in (1, 2):
        assert set_aside(tmp_path / "run", resumed_from=other, step=2) == tmp_path / "run" / f"superseded_{number}"
        make_checkpoint(tmp_path / "run", 3)
    assert steps_in(tmp_path / "other") == [2]


def open_twice(run: Path) -> str:
    with open_run(run), pytest.raises(CheckpointError) as caught, open_run(run):
        pass
    with open_run(run):  # free again
        return str(caught.value)


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    (message,) = run_distributed(open_twice, 1, tmp_path / "run")
    assert f"output_dir={tmp_path / 'run'}: another run (process " in message

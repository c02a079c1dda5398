"""Folders of checkpoints: what is whole, what is damaged, which one is taken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gptoughts.checkpoint import layout
from gptoughts.errors import CheckpointError


def make_checkpoint(run: Path, step: int, *, keep_last: int = 0) -> Path:
    folder = layout.step_folder(run, step)
    partial = layout.start_partial(folder)
    (partial / "data.bin").write_bytes(bytes([step]) * 100)
    layout.write_manifest(partial, {"data.bin": layout.FileRecord.of(partial / "data.bin")}, {"step": step})
    layout.publish(folder, keep_last=keep_last)
    return folder


def damage_of(folder: Path) -> list[str]:
    files = layout.read_manifest(folder)["files"]
    return [found for name, record in files.items() if (found := layout.find_damage(folder, name, record))]


def test_publish_leaves_whole_folders_and_names_the_latest(tmp_path: Path) -> None:
    folders = [make_checkpoint(tmp_path, step) for step in (10, 20, 100)]
    assert layout.list_checkpoints(tmp_path) == folders
    assert (layout.checkpoints_folder(tmp_path) / layout.LATEST).read_text() == "step_00000100\n"
    assert not list(tmp_path.rglob("*.partial"))


def test_keep_last_drops_the_oldest(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        make_checkpoint(tmp_path, step, keep_last=2)
    assert [layout.step_of(folder) for folder in layout.list_checkpoints(tmp_path)] == [2, 3]


def test_a_half_written_checkpoint_is_not_listed(tmp_path: Path) -> None:
    whole = make_checkpoint(tmp_path, 1)
    partial = layout.start_partial(layout.step_folder(tmp_path, 2))
    (partial / "data.bin").write_bytes(b"half")
    assert layout.list_checkpoints(tmp_path) == [whole]


def test_leftovers_of_an_earlier_try_do_not_reach_the_next(tmp_path: Path) -> None:
    folder = layout.step_folder(tmp_path, 5)
    (layout.start_partial(folder) / "stale").write_text("x")
    make_checkpoint(tmp_path, 5)
    assert not (folder / "stale").exists()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "99 bytes, 100 expected"),
        (lambda path: path.write_bytes(b"\xff" + path.read_bytes()[1:]), "checksum differs"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage, expected: str) -> None:
    folder = make_checkpoint(tmp_path, 7)
    assert damage_of(folder) == []
    damage(folder / "data.bin")
    (problem,) = damage_of(folder)
    assert expected in problem
    assert str(folder / "data.bin") in problem


def test_the_one_before_a_damaged_checkpoint_is_used_and_the_damage_said(tmp_path: Path) -> None:
    older, newer = make_checkpoint(tmp_path, 1), make_checkpoint(tmp_path, 2)
    (newer / "data.bin").write_bytes(b"")
    said: list[str] = []
    assert layout.first_good(layout.candidates(tmp_path, "auto"), damage_of, said.append) == older
    assert any(str(newer) in line for line in said)
    assert any(str(older) in line for line in said)


def test_nothing_good_left_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    (make_checkpoint(tmp_path, 1) / "data.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no undamaged checkpoint is left"):
        layout.first_good(layout.candidates(tmp_path, "auto"), damage_of, print)


def test_resume_values(tmp_path: Path) -> None:
    assert layout.candidates(tmp_path, "auto") == []
    older, newer = make_checkpoint(tmp_path, 1), make_checkpoint(tmp_path, 2)
    assert layout.candidates(tmp_path, "none") == []
    assert layout.candidates(tmp_path, "auto") == [newer, older]
    assert layout.candidates(tmp_path, str(older)) == [older]
    assert layout.candidates(tmp_path, str(tmp_path)) == [newer]
    assert layout.candidates(tmp_path, str(tmp_path / "checkpoints")) == [newer]
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        layout.candidates(tmp_path, str(tmp_path / "nowhere"))


def test_latest_pointing_nowhere_falls_back_to_the_newest(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 3)
    (layout.checkpoints_folder(tmp_path) / layout.LATEST).write_text("step_00000009\n")
    assert layout.locate(tmp_path) == folder


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": {}}', '{"format_version": 1}'])
def test_a_damaged_manifest_is_named(tmp_path: Path, content: str) -> None:
    folder = make_checkpoint(tmp_path, 1)
    (folder / layout.MANIFEST).write_text(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json: damaged"):
        layout.read_manifest(folder)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 1)
    manifest = json.loads((folder / layout.MANIFEST).read_text()) | {"format_version": 99}
    (folder / layout.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="format_version=99"):
        layout.read_manifest(folder)

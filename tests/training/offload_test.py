"""What offload to NVMe asks of a machine is asked before anything starts; each answer says what would be right."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from gptoughts.config.cli import load_experiment
from gptoughts.config.resolve import Experiment
from gptoughts.errors import ConfigError
from gptoughts.models.registry import FAMILIES
from gptoughts.platform import async_io
from gptoughts.training.offload import swap_problems
from gptoughts.training.setup import check_machine

RUN_FOLDER = "run"


def experiment(folder: Path, *flags: str, nvme_path: str = "auto", **zero: Any) -> Experiment:
    """Of ``gpt`` with optimizer and weights on a disk."""
    offload = {"device": "nvme", "nvme_path": nvme_path}
    content = {"zero_optimization": {"stage": 3, "offload_optimizer": offload, "offload_param": offload, **zero}}
    path = folder / "ds.json"
    path.write_text(json.dumps(content))
    arguments = [f"--deepspeed_config={path}", f"--output_dir={folder / RUN_FOLDER}", "--train.precision=fp32", *flags]
    return load_experiment(arguments, FAMILIES, world_size=2)


@pytest.fixture(autouse=True)
def is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_io, "operator_problem", lambda: None)


def test_what_is_there_is_no_problem(tmp_path: Path) -> None:
    assert swap_problems(experiment(tmp_path)) == []
    assert list(tmp_path.iterdir()) == [tmp_path / "ds.json"], "a question leaves nothing behind"
    assert swap_problems(experiment(tmp_path, nvme_path=str(tmp_path))) == []


def test_without_such_offload_nothing_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_io, "operator_problem", lambda: pytest.fail("nobody needs it"))
    cpu = {"device": "cpu"}
    assert swap_problems(experiment(tmp_path, offload_optimizer=cpu, offload_param=cpu)) == []


def test_all_problems_come_together_through_check_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_io, "operator_problem", lambda: f"needs {async_io.LIBAIO}")
    monkeypatch.setattr(async_io, "lock_problem", lambda num_bytes: f"{num_bytes} cannot be locked")
    with pytest.raises(ConfigError) as caught:
        check_machine(experiment(tmp_path, nvme_path="/nowhere/at/all"))
    operator, folder, locked = caught.value.problems
    assert operator.startswith(f"{tmp_path}/ds.json: zero_optimization.offload_optimizer: needs libaio")
    assert "apt-get install libaio-dev" in operator
    assert folder.startswith(f"{tmp_path}/ds.json: zero_optimization.offload_optimizer.nvme_path=/nowhere/at/all: ")
    assert "no such folder" in folder
    assert int(locked.split(": ")[2].split()[0]) > 2**20


def test_a_file_is_no_folder_and_one_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    (problem,) = swap_problems(experiment(tmp_path, nvme_path=str(file)))
    assert problem.endswith(f"nvme_path={file}: is no folder")
    (problem,) = swap_problems(experiment(tmp_path, nvme_path="/proc"))
    assert "nvme_path=/proc: cannot be written" in problem


def test_space_is_that_of_the_ranks_of_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = experiment(tmp_path, "--stability.snapshot_interval_steps=0")
    # fp32: weights 4, state 12 and gradients 4 bytes per parameter, half of them on each of two ranks
    on_rank = 20 * run.config.model.total_parameters() / 2
    free = 2.1 * on_rank
    monkeypatch.setattr(async_io.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": free}))
    monkeypatch.setitem(os.environ, "LOCAL_WORLD_SIZE", "2")
    assert swap_problems(run) == []
    monkeypatch.setitem(os.environ, "LOCAL_WORLD_SIZE", "3")
    (problem,) = swap_problems(run)
    assert (
        f"{3 * on_rank / 2**30:.1f} GiB are needed for the ranks of this host, {free / 2**30:.1f} GiB are free"
        in problem
    )


def test_what_a_killed_run_left_is_no_longer_in_the_way(tmp_path: Path) -> None:
    left = tmp_path / "gptoughts-left"
    left.mkdir()
    (tmp_path / "gptoughts-left.lock").touch()
    assert swap_problems(experiment(tmp_path, nvme_path=str(tmp_path))) == []
    assert not left.exists()

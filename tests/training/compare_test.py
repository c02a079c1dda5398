"""tools/compare_losses.py: the status says whether two runs are the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gptoughts.errors import DataError
from gptoughts.training.compare import main


def write(folder: Path, losses: dict[int, float]) -> str:
    folder.mkdir()
    lines = (json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in losses.items())
    (folder / "metrics.jsonl").write_text("".join(lines))
    return str(folder)


def test_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "a", {1: 2.0, 2: 1.0})
    same = write(tmp_path / "same", {1: 2.0, 2: 1.0, 3: 0.5})
    other = write(tmp_path / "other", {1: 2.0, 2: 1.0 + 1e-12})
    assert main([a, same, "--assert_equal"]) == 0
    assert main([a, other, "--assert_equal"]) == 1
    assert "at step 2" in capsys.readouterr().out
    assert main([a, other, "--assert_within", "1e-9"]) == 0
    assert main([a, other]) == 0


def test_runs_without_a_common_step_cannot_be_compared(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", {1: 2.0}), write(tmp_path / "b", {2: 2.0})
    with pytest.raises(DataError, match="no step was logged by both"):
        main([a, b, "--assert_equal"])

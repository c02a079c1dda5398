"""metrics.jsonl: appended, continued without a seam, read in spite of a cut last line."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptoughts.errors import DataError, PlatformError
from gptoughts.training.metrics import MetricsFile, read_metrics


def test_lines_come_back(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path, resumed_step=0)
    file.write({"step": 1, "loss": 2.5})
    assert read_metrics(file.path) == [{"step": 1, "loss": 2.5}]  # written through at once
    file.close()


def test_a_resumed_run_drops_the_steps_it_will_run_again(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path, resumed_step=0)
    for step in (10, 20, 30):
        file.write({"step": step})
    file.close()
    resumed = MetricsFile(tmp_path, resumed_step=20)
    resumed.write({"step": 30})
    resumed.close()
    assert [line["step"] for line in read_metrics(resumed.path)] == [10, 20, 30]


def test_a_last_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]


def test_damage_in_the_middle_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nrubbish\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: not JSON"):
        read_metrics(path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_a_message(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    file = MetricsFile.__new__(MetricsFile)
    file.path = tmp_path / "metrics.jsonl"
    file._file = file.path.open("w", encoding="utf-8")
    with pytest.raises(PlatformError, match=r"metrics\.jsonl: cannot be written: No space left"):
        file.write({"step": 1})

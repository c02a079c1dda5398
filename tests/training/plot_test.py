"""The loss curve: a PNG with something drawn in it, clear errors otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from matplotlib import image

from gptoughts.errors import DataError
from gptoughts.training.plot import X_AXES, draw_runs, main, smoothed


def write_run(folder: Path) -> Path:
    folder.mkdir()
    lines = [
        {"step": s, "consumed_tokens": s * 1000, "seconds": s * 2.0, "loss": 9 / s}
        | ({"valid_loss": 9.5 / s} if s % 5 == 0 else {})
        for s in range(1, 21)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize("x", list(X_AXES))
def test_draws_several_runs(tmp_path: Path, x: str) -> None:
    runs = [write_run(tmp_path / name) for name in ("a", "b")]
    picture = image.imread(draw_runs(runs, tmp_path / "loss.png", x=x))
    assert picture.std() > 0.01
    assert not list(tmp_path.glob("*.partial"))


def test_smoothing_has_no_bias_towards_the_start() -> None:
    assert smoothed([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])


def test_a_run_without_metrics_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        draw_runs([tmp_path / "nowhere"], tmp_path / "loss.png")


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    assert main([str(run), "--x", "steps"]) == 0
    assert capsys.readouterr().out.strip() == str(run / "loss.png")
    assert (run / "loss.png").exists()


def test_the_guards_marks_and_spikes_leave_the_curve_readable(tmp_path: Path) -> None:
    plain, healed = write_run(tmp_path / "plain"), write_run(tmp_path / "healed")
    events = [
        {"step": 7, "action": "skip"},
        {"step": 9, "action": "rollback", "abandoned": [[5, 2.0], [6, 1e6], [7, 1.9]]},
    ]
    (healed / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    lines = (healed / "metrics.jsonl").read_text().splitlines()
    lines[10] = json.dumps(json.loads(lines[10]) | {"loss": 5e4})
    (healed / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    pictures = [image.imread(draw_runs([run], run / "loss.png", x="steps")) for run in (plain, healed)]
    assert not (pictures[0] == pictures[1]).all()
    # The curve falls from 9 to under 1: were the spike's axis kept, it would lie in the lowest row of pixels.
    blue = (pictures[1][..., 2] > 0.6) & (pictures[1][..., 0] < 0.3)
    rows = blue.any(axis=1).nonzero()[0]
    assert rows.max() - rows.min() > 0.4 * pictures[1].shape[0]

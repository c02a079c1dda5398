"""Loss curves of one or several runs as a PNG, with what the stability guard did; imports no torch."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptoughts.errors import DataError
from gptoughts.platform.figure import save_figure
from gptoughts.training.events import Event, read_events
from gptoughts.training.metrics import METRICS_FILE, read_metrics

X_AXES = {
    "steps": ("step", "optimizer steps", 1.0),
    "tokens": ("consumed_tokens", "tokens seen (millions)", 1e-6),
    "time": ("seconds", "training time (minutes)", 1 / 60),
}
_SMOOTHING = 0.9


def smoothed(values: Sequence[float]) -> list[float]:
    """Exponential moving average without the bias towards the first value."""
    out, total, weight = [], 0.0, 0.0
    for value in values:
        total = _SMOOTHING * total + (1 - _SMOOTHING) * value
        weight = _SMOOTHING * weight + (1 - _SMOOTHING)
        out.append(total / weight)
    return out


def draw_runs(runs: Sequence[Path], output: Path, *, x: str = "tokens") -> Path:
    """Draw training loss (raw and smoothed) and validation loss of each run, and where its guard stepped in.

    Args:
        runs: Run folders, or their metrics.jsonl.
        output: PNG to write; replaced as a whole.
        x: ``steps``, ``tokens`` or ``time``.
    Returns:
        ``output``.
    Raises:
        DataError: a run has no metrics, or the picture cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    key, label, scale = X_AXES[x]
    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    for number, run in enumerate(runs):
        path = run if run.is_file() else run / METRICS_FILE
        lines = [line for line in read_metrics(path) if key in line]
        train = [line for line in lines if "loss" in line]
        valid = [line for line in lines if "valid_loss" in line]
        if not train and not valid:
            raise DataError(f"{path}: holds no losses to draw")
        name, colour = path.parent.name, f"C{number}"
        # What was not learned from (NaN, spikes) is no part of the curve; the guard's marks say where it was.
        train = [line for line in train if line.get("applied", True)] or train
        xs = [line[key] * scale for line in train]
        losses = [line["loss"] for line in train]
        axes.plot(xs, losses, color=colour, alpha=0.25, linewidth=1)
        axes.plot(xs, smoothed(losses), color=colour, label=f"{name}: train")
        if valid:
            _draw_validation(axes, valid, key, scale, name, colour)
        if train and x != "time":  # a step that was left behind is at two times
            per_step = scale * train[-1][key] / train[-1]["step"]
            _draw_events(axes, read_events(path.parent), per_step, colour)
    _keep_spikes_out(axes)
    axes.set_xlabel(label)
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    return save_figure(figure, output, dpi=120)


def _draw_validation(axes: Any, valid: list[dict[str, Any]], key: str, scale: float, name: str, colour: str) -> None:
    axes.plot(
        [line[key] * scale for line in valid],
        [line["valid_loss"] for line in valid],
        color=colour,
        linestyle="--",
        marker="o",
        markersize=4,
        label=f"{name}: validation, last {valid[-1]['valid_loss']:.3f}",
    )


def _keep_spikes_out(axes: Any) -> None:
    """A loss of thousands would press everything else flat: the axis ends above where the curves begin."""
    curves = [[y for y in line.get_ydata() if math.isfinite(y)] for line in axes.lines if line.get_linestyle() == "-"]
    top = max((curve[0] for curve in curves if curve), default=0.0)
    if top > 0 and max(max(curve) for curve in curves if curve) > 2 * top:
        lowest = min(min(curve) for curve in curves if curve)
        axes.set_ylim(lowest - 0.05 * (top - lowest), top + 0.05 * (top - lowest))


_MARKS = {"skip": "x", "rollback": "v", "fallback": "^", "cut_lr": "D", "stop": "s"}


def _draw_events(axes: Any, events: list[Event], per_step: float, colour: str) -> None:
    """Marks at the foot of the picture, and the courses that rollbacks left behind."""
    for action, mark in _MARKS.items():
        steps = [event["step"] * per_step for event in events if event["action"] == action]
        if steps:
            foot = {"transform": axes.get_xaxis_transform(), "clip_on": False}
            axes.plot(steps, [0.02] * len(steps), mark, color=colour, label=f"guard: {action}", **foot)
    for event in events:
        if len(event.get("abandoned", [])) > 1:
            course = event["abandoned"]
            xs = [step * per_step for step, _ in course]
            axes.plot(xs, [loss for _, loss in course], color="grey", linestyle=":", linewidth=1)


def main(argv: Sequence[str] | None = None) -> int:
    """``tools/plot_run.py``."""
    parser = argparse.ArgumentParser(description="Draw the loss curves of one or several runs into one PNG.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or its metrics.jsonl")
    parser.add_argument(
        "--x", choices=list(X_AXES), default="tokens", help="the horizontal axis (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, help="PNG to write (default: loss.png in the first run's folder)")
    arguments = parser.parse_args(argv)
    first: Path = arguments.runs[0]
    output = arguments.output or (first.parent if first.is_file() else first) / "loss.png"
    print(draw_runs(arguments.runs, output, x=arguments.x))
    return 0

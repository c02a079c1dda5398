"""What a run's ``fp8.jsonl`` says: which layers FP8 does not suit, and a picture of all of them; imports no torch.

A layer should stay in bf16 where, in the median over the later half of its lines, a role loses too much:

    signal to noise below SNR_FLOOR_DB, more than SATURATED_LIMIT saturated, or more than UNDERFLOWED_LIMIT underflowed.

E4M3 rounds to 4 significant bits and E5M2 to 3. With errors evenly spread over the space between two numbers that is
about 31.5 and 25.5 dB where nothing saturates or underflows, for any distribution: lower is a scale that does not fit.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptoughts.config.experiment import Fp8Config
from gptoughts.config.fp8 import FROM_REPORT
from gptoughts.errors import DataError
from gptoughts.platform.figure import save_figure

REPORT_FILE = "fp8.jsonl"
PICTURE_FILE = "fp8.png"
ROLES = ("input", "weight", "grad_output")
SNR_FLOOR_DB = {"input": 25.0, "weight": 25.0, "grad_output": 19.0}
"""About 6 dB, one bit, below what the formats give."""
SATURATED_LIMIT = 1e-3
UNDERFLOWED_LIMIT = {"input": 0.02, "weight": 0.02, "grad_output": 0.1}


@dataclass(frozen=True)
class Finding:
    """A layer that should stay out of FP8."""

    name: str
    reasons: tuple[str, ...]


def read_report(path: Path) -> list[dict[str, Any]]:
    """Lines of a run's fp8.jsonl; a last line that was cut off is left out.

    Args:
        path: The file, or the run's folder.
    Raises:
        DataError: there is none, it is empty, or it is damaged.
    """
    file = path / REPORT_FILE if path.is_dir() else path
    try:
        texts = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{file}: {reason}; a run writes it with --use_fp8 true --log.fp8 true") from None
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
            lines.append({key: line[key] for key in ("step", "name", "role", *_FIGURES)})
        except (ValueError, KeyError, TypeError):
            if number < len(texts):
                raise DataError(f"{file}:{number}: no line of an FP8 report: {text[:80]!r}") from None
    if not lines:
        raise DataError(f"{file}: holds no lines")
    return lines


_FIGURES = ("amax", "scale", "saturated_fraction", "underflowed_fraction", "snr_db")


def judge(lines: Sequence[dict[str, Any]]) -> list[Finding]:
    """The layers that should stay out of FP8, in the order of the report."""
    steps = sorted({line["step"] for line in lines})
    late = [line for line in lines if line["step"] >= steps[len(steps) // 2]]
    found = []
    for name in dict.fromkeys(line["name"] for line in lines):
        reasons = []
        for role in ROLES:
            own = [line for line in late if line["name"] == name and line["role"] == role]
            reasons += _reasons(role, own)
        if reasons:
            found.append(Finding(name, tuple(reasons)))
    return found


def _reasons(role: str, lines: Sequence[dict[str, Any]]) -> list[str]:
    reasons = []
    snr = _median(lines, "snr_db")
    if snr is not None and snr < SNR_FLOOR_DB[role]:
        reasons.append(f"{role}: {snr:.1f} dB, below {SNR_FLOOR_DB[role]:.0f}")
    for key, limit in (("saturated_fraction", SATURATED_LIMIT), ("underflowed_fraction", UNDERFLOWED_LIMIT[role])):
        value = _median(lines, key)
        if value is not None and value > limit:
            reasons.append(f"{role}: {value:.2%} {key.removesuffix('_fraction')}, above {limit:.2%}")
    return reasons


def _median(lines: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [line[key] for line in lines if line[key] is not None]
    return statistics.median(values) if values else None


def kept_words(section: Fp8Config) -> list[str]:
    """``fp8.keep_bf16`` with ``auto`` replaced by what the report says.

    Raises:
        DataError: the report cannot be read.
    """
    words = [word for word in section.keep_bf16 if word != FROM_REPORT]
    if FROM_REPORT in section.keep_bf16:
        assert section.report is not None
        words += [finding.name for finding in judge(read_report(Path(section.report)))]
    return words


def draw(lines: Sequence[dict[str, Any]], output: Path) -> Path:
    """A heat map per role, layers over steps, of the signal-to-noise ratio; layers that fail are marked.

    Raises:
        DataError: the picture cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(line["name"] for line in lines))
    steps = sorted({line["step"] for line in lines})
    failing = {finding.name for finding in judge(lines)}
    figure, panels = pyplot.subplots(
        1, len(ROLES), figsize=(15, 1.8 + 0.24 * len(names)), layout="constrained", sharey=True
    )
    image: Any = None
    for axes, role in zip(panels, ROLES, strict=True):
        cells = {(line["name"], line["step"]): line["snr_db"] for line in lines if line["role"] == role}
        grid = [[_number(cells.get((name, step))) - SNR_FLOOR_DB[role] for step in steps] for name in names]
        image = axes.imshow(grid, aspect="auto", cmap="RdYlGn", vmin=-8, vmax=8, interpolation="nearest")
        axes.set_title(f"{role} (needs {SNR_FLOOR_DB[role]:.0f} dB)")
        shown = range(0, len(steps), max(1, len(steps) // 6))
        axes.set_xticks(list(shown), [str(steps[place]) for place in shown])
        axes.set_xlabel("step")
    labels = [f"{'keep in bf16 > ' if name in failing else ''}{_short(name)}" for name in names]
    panels[0].set_yticks(range(len(names)), labels, fontsize=8)
    for label, name in zip(panels[0].get_yticklabels(), names, strict=True):
        label.set_color("firebrick" if name in failing else "black")
    figure.colorbar(image, ax=panels, label="signal to noise of the cast, dB above what is needed")
    return save_figure(figure, output, dpi=110)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _short(name: str) -> str:
    return name.removeprefix("decoder.").replace("self_attention.", "").replace("layers.", "layer ")

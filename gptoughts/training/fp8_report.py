"""``--log.fp8``: what casts lose, written while a run trains; and ``tools/fp8_report.py``, which reads it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptoughts.precision.amax_report import PICTURE_FILE, draw, judge, read_report

if TYPE_CHECKING:
    from gptoughts.precision.amax_report import Finding


def summary(lines: Sequence[dict[str, Any]], findings: Sequence[Finding]) -> list[str]:
    """The newest figures of every layer and role, and which layers should stay in bf16."""
    newest = max(line["step"] for line in lines)
    text = [
        f"{'step ' + str(newest):48}{'role':12}{'amax':>11}{'scale':>11}{'saturated':>11}{'underflow':>11}{'SNR':>9}"
    ]
    for line in lines:
        if line["step"] == newest:
            snr = "-" if line["snr_db"] is None else f"{line['snr_db']:.1f} dB"
            amax = "inf" if line["amax"] is None else f"{line['amax']:.3g}"
            text.append(
                f"{line['name']:48}{line['role']:12}{amax:>11}{line['scale']:>11.3g}"
                f"{line['saturated_fraction']:>11.2%}{line['underflowed_fraction']:>11.2%}{snr:>9}"
            )
    if not findings:
        return [*text, "every layer is fit for FP8"]
    text.append("better in bf16 (--fp8.keep_bf16 auto takes these):")
    return [*text, *(f"  {finding.name}: {'; '.join(finding.reasons)}" for finding in findings)]


def main(argv: Sequence[str] | None = None) -> int:
    """``tools/fp8_report.py``."""
    parser = argparse.ArgumentParser(
        description="Say what FP8 casts of a run lost, and which layers should stay in bf16; draw a heat map.",
        epilog="The run has to be trained with --use_fp8 true --log.fp8 true.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, or its fp8.jsonl")
    parser.add_argument("--output", type=Path, help=f"PNG to write (default: {PICTURE_FILE} in the run's folder)")
    arguments = parser.parse_args(argv)
    run: Path = arguments.run
    lines = read_report(run)
    for line in summary(lines, judge(lines)):
        print(line)
    print(draw(lines, arguments.output or (run if run.is_dir() else run.parent) / PICTURE_FILE))
    return 0

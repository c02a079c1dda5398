"""The measured table of docs/parallelism.md, made from a results file."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.parity.comparison import TOLERANCES
from tests.parity.matrix.layouts import AXES, FAMILIES, RECOMPUTE, feasible_cases
from tests.parity.matrix.results import PACKAGES, ROOT, Record

PAGE = ROOT / "docs" / "parallelism.md"
BEGIN, END = "<!-- parity table: begin -->", "<!-- parity table: end -->"
_TITLES = {
    "step_1_loss": "step 1: loss", "step_1_gradient": "step 1: gradients", "loss": "later steps: loss",
    "grad_norm": "gradient norm", "weight": "weights after 20 steps",
}  # fmt: skip


def latest(records: Sequence[Record], source: str | None = None) -> list[Record]:
    """The last record of each case of one state of the sources; unset: that of the newest record."""
    if not records:
        return []
    source = source or records[-1].source
    return list({record.case: record for record in records if record.source == source}.values())


def render(records: Sequence[Record]) -> str:
    """Markdown: how much was measured, errors per family, errors per axis and family.

    Args:
        records: Of one state of the sources, each case once (:func:`latest`).
    """
    passed = [record for record in records if not record.problems]
    failed = [record for record in records if record.problems]
    plain = [record for record in passed if record.settings["recompute"] == RECOMPUTE[0]]
    feasible = {str(case): case.family for case in feasible_cases()}
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    days = sorted({record.day for record in records})
    lines = [
        f"{len(plain)} of {len(feasible)} feasible layouts measured and equal to one rank, {len(passed) - len(plain)} "
        f"more with recompute, {len(failed)} not equal "
        f"({' to '.join(dict.fromkeys((days[0], days[-1])))}; sources {records[0].source}; {versions}; CPU, gloo; "
        f"median {statistics.median(record.seconds for record in records):.1f} s per layout). Largest relative errors:",
        "",
        _row(["family", "layouts", *_TITLES.values()]),
        _row(["---"] * (2 + len(_TITLES))),
        _row(["tolerance", "", *(f"{TOLERANCES[name]:.0e}" for name in _TITLES)]),
    ]
    for family in FAMILIES:
        of_family = [record for record in passed if record.settings["family"] == family]
        measured = sum(record.settings["family"] == family for record in plain)
        count = f"{measured} of {sum(value == family for value in feasible.values())}"
        lines.append(_row([f"`{family}`", count, *(_largest(of_family, name) for name in _TITLES)]))
    lines += [
        "",
        "Largest error of a gradient in step 1 and of a weight after 20 steps (number of layouts), by axis:",
        "",
        _row(["axis", *(f"`{family}`" for family in FAMILIES)]),
        _row(["---"] * (1 + len(FAMILIES))),
    ]
    for axis, values in {**AXES, "recompute": RECOMPUTE}.items():
        for value in values:
            cells = [_cell(passed, lambda s, f=family, a=axis, v=value: s["family"] == f and s[a] == v)
                     for family in FAMILIES]  # fmt: skip
            lines.append(_row([f"{axis} {str(value).lower()}", *cells]))
    lines += [f"\nNot equal: {record.case}: {'; '.join(record.problems).splitlines()[0]}" for record in failed]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _largest(records: Sequence[Record], name: str) -> str:
    return f"{max(record.errors[name] for record in records if record.errors):.1e}" if records else "-"


def _cell(records: Sequence[Record], is_meant: Callable[[dict[str, Any]], bool]) -> str:
    meant = [record for record in records if is_meant(record.settings)]
    return f"{_largest(meant, 'step_1_gradient')}, {_largest(meant, 'weight')} ({len(meant)})" if meant else "-"


def write_table(text: str, page: Path = PAGE) -> None:
    """Replace what stands between the page's two marks."""
    before, rest = page.read_text().split(BEGIN)
    _, after = rest.split(END)
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")

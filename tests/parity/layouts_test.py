"""Layouts beyond the matrix (matrix_test): variants of families, the other token dispatcher, four ranks for experts.

Tolerances and their reasons: docs/numerical_stability.md.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import VARIANTS, Layout
from tests.parity.comparison import assert_equal, reference, run_case

LAYOUTS = [
    *(Layout(zero=zero) for zero in (1, 2, 3)),
    *(Layout(zero=zero, accumulation=4) for zero in (0, 1, 2, 3)),
    *(Layout(data=2, zero=zero) for zero in (0, 1, 2, 3)),
    *(Layout(data=2, zero=zero, accumulation=4) for zero in (1, 3)),
    *(Layout(tensor=2, zero=zero) for zero in (0, 1, 2, 3)),
    *(Layout(tensor=2, sequence=True, zero=zero) for zero in (0, 1, 3)),
    Layout(tensor=2, sequence=True, data=2, zero=3, accumulation=2),
    Layout(tensor=2, data=2, zero=1),
]
ALL_GATHER = ("--model.moe_token_dispatcher_type=allgather",)
EXPERT_LAYOUTS = [
    *(Layout(data=2, expert=2, zero=zero) for zero in (0, 1, 2, 3)),
    *(Layout(data=2, expert=2, zero=zero, extra=ALL_GATHER) for zero in (0, 1, 2, 3)),
    *(Layout(data=2, expert=2, zero=zero, accumulation=4) for zero in (0, 1, 2, 3)),
    *(Layout(data=4, expert=2, zero=zero, accumulation=2) for zero in (0, 1, 2, 3)),
    *(Layout(data=4, expert=4, zero=zero) for zero in (0, 1, 2, 3)),
    *(Layout(data=4, expert=4, zero=zero, extra=ALL_GATHER) for zero in (0, 3)),
    *(Layout(tensor=2, data=2, expert=2, zero=zero) for zero in (0, 1, 2, 3)),
    *(Layout(tensor=2, sequence=True, data=2, expert=2, zero=zero) for zero in (0, 1, 2, 3)),
    *(Layout(tensor=2, sequence=True, data=2, expert=2, zero=zero, extra=ALL_GATHER) for zero in (1, 3)),
]
"""For the families with experts."""
CORE = {
    "deepseek": {Layout(data=2, expert=2, zero=0, extra=ALL_GATHER)},
    "llada-moe": {Layout(tensor=2, sequence=True, zero=3), Layout(data=2, expert=2, zero=3)},
    "llada-mla-moe": {Layout(data=2, zero=3)},
}
"""What runs in `make test`."""
BEYOND = {
    "deepseek": [layout for layout in EXPERT_LAYOUTS if layout.extra or layout.expert > 2],
    "llada-mla": LAYOUTS,
    "llada-moe": LAYOUTS + EXPERT_LAYOUTS,
    "llada-mla-moe": LAYOUTS + EXPERT_LAYOUTS,
}
assert BEYOND.keys() >= VARIANTS.keys()
CASES = [
    pytest.param(
        family,
        layout,
        id=f"{family}-{layout}{'-allgather' if layout.extra else ''}",
        marks=() if layout in CORE.get(family, ()) else pytest.mark.slow,
    )
    for family, layouts in BEYOND.items()
    for layout in layouts
]


@pytest.fixture(scope="module")
def reference_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reference")


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_layout_equals_one_rank(family: str, layout: Layout, tmp_path: Path, reference_folder: Path) -> None:
    expected = reference(family, layout, reference_folder)
    assert_equal(run_case(family, layout, tmp_path), expected)
    history, _ = expected
    assert history[-1]["loss"] < 0.9 * history[0]["loss"], "the reference does not learn"

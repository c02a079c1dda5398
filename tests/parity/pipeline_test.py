"""Pipeline stages beyond the matrix (matrix_test): uneven ones, tied embeddings, figures of experts, bf16."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptoughts.models.registry import FAMILIES
from tests.harness import Layout
from tests.parity.comparison import assert_equal, reference, run_case

BF16_LOSS_RELATIVE = 1e-2
BF16_GRAD_NORM_RELATIVE = 5e-2
UNEVEN = ("--parallel.pipeline_layout=1,3",)


def _every_layout() -> list[Layout]:
    """Uneven stages and tied embeddings; four microbatches with two stages."""
    found = []
    for zero in (0, 1, 2, 3):
        found.append(Layout(1, False, 2, 1, 2, zero, 4, layers=4, extra=UNEVEN))
        found += [Layout(1, False, 2, virtual, 2, zero, 4, layers=4, tied=True) for virtual in (1, 2)]
        found.append(Layout(2, True, 2, 1, 1, zero, 2, layers=4, tied=True))
    return found


CORE = {
    ("gpt", Layout(pipeline=2, data=2, zero=3, accumulation=4, layers=4, extra=UNEVEN)),
    ("deepseek", Layout(pipeline=2, virtual=2, data=2, zero=3, accumulation=2, layers=4, expert=2)),
    ("llada", Layout(pipeline=2, zero=3, accumulation=2, layers=4, tied=True)),
}
CASES = [
    *CORE,
    *((family, layout) for family in FAMILIES for layout in _every_layout() if (family, layout) not in CORE),
]
"""Family and layout; what is not in the core is slow."""


@pytest.fixture(scope="module")
def reference_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reference")


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        pytest.param(*case, id=f"{case[0]}-{case[1]}", marks=() if case in CORE else pytest.mark.slow)
        for case in sorted(CASES, key=str)
    ],
)
def test_stages_equal_one_rank(family: str, layout: Layout, tmp_path: Path, reference_folder: Path) -> None:
    found, expected = run_case(family, layout, tmp_path), reference(family, layout, reference_folder)
    assert_equal(found, expected)
    # Figures of experts come from all stages; step 1 routes as one rank does.
    assert found[0][0]["figures"] == pytest.approx(expected[0][0]["figures"])


@pytest.mark.parametrize("zero", [pytest.param(zero, marks=() if zero == 3 else pytest.mark.slow) for zero in range(4)])
def test_stages_in_bf16(zero: int, tmp_path: Path, reference_folder: Path) -> None:
    layout = Layout(pipeline=2, virtual=2, zero=zero, accumulation=4, layers=4, precision="bf16", tied=True)
    found, _ = run_case("gpt", layout, tmp_path)
    expected, _ = reference("gpt", layout, reference_folder)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=BF16_LOSS_RELATIVE)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=BF16_GRAD_NORM_RELATIVE)

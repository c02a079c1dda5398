"""Context parallelism equals the one-rank run, beside every other axis and ZeRO stage, for every family.

Tolerances are those of comparison.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from gptoughts.models.registry import FAMILIES
from tests.distributed import run_distributed
from tests.harness import VARIANTS, Layout
from tests.parity import mtp_layouts_test as weighted
from tests.parity.comparison import (
    LATER_LOSS_RELATIVE,
    STEP_1_GRADIENT_RELATIVE,
    STEP_1_LOSS_RELATIVE,
    Run,
    assert_equal,
    gradients,
    reference,
    relative,
    run_case,
)
from tests.parity.expert_test import resume, save_after_three

ALL_GATHER = ("--model.moe_token_dispatcher_type=allgather",)
LAYOUTS = [
    *(Layout(context=2, zero=zero) for zero in (0, 1, 2, 3)),
    Layout(context=2, zero=2, accumulation=4),
    Layout(context=4, zero=1),
    *(Layout(context=2, data=2, zero=zero, accumulation=2) for zero in (0, 1, 2, 3)),
    *(Layout(context=2, tensor=2, zero=zero) for zero in (0, 3)),
    *(Layout(context=2, tensor=2, sequence=True, zero=zero) for zero in (0, 1, 2, 3)),
    *(Layout(context=2, pipeline=2, zero=zero, accumulation=4, layers=4) for zero in (0, 1, 2, 3)),
    Layout(context=2, pipeline=2, virtual=2, zero=3, accumulation=2, layers=4, tied=True),
    *(Layout(context=2, context_method="ring", zero=zero) for zero in (0, 3)),
    Layout(context=4, context_method="ring", zero=2, accumulation=2),
    Layout(context=2, context_method="ring", tensor=2, sequence=True, zero=1),
    Layout(context=2, context_method="ring", pipeline=2, data=1, zero=3, accumulation=2, layers=4),
]
EXPERT_LAYOUTS = [
    *(Layout(context=2, expert=2, zero=zero) for zero in (0, 1, 2, 3)),
    Layout(context=2, expert=2, zero=2, extra=ALL_GATHER),
    *(Layout(context=2, data=2, expert=2, zero=zero, accumulation=2) for zero in (0, 1, 3)),
    Layout(context=2, data=2, expert=4, zero=2),
    Layout(context=2, pipeline=2, expert=2, zero=1, accumulation=2, layers=4),
    Layout(context=2, tensor=2, sequence=True, expert=2, zero=3),
    Layout(context=4, context_method="ring", expert=2, zero=1),
]
EXPERT_FAMILIES = ("deepseek", "llada-moe")
CORE = {
    ("gpt", Layout(context=2, context_method="ring", zero=3)),
    ("mla", Layout(context=2, tensor=2, sequence=True, zero=1)),
    ("deepseek", Layout(context=2, data=2, expert=2, zero=3, accumulation=2)),
    ("llada", Layout(context=2, zero=0)),
}
"""What runs in `make test`, beside what the matrix has."""
CASES = [
    *((family, layout) for family in (*FAMILIES, *VARIANTS) for layout in LAYOUTS),
    *((family, layout) for family in EXPERT_FAMILIES for layout in EXPERT_LAYOUTS),
]


@pytest.fixture(scope="module")
def reference_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reference")


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        pytest.param(
            *case,
            id=f"{case[0]}-{case[1]}{'-allgather' if case[1].extra else ''}",
            marks=() if case in CORE else pytest.mark.slow,
        )
        for case in CASES
    ],
)
def test_parts_of_sequences_equal_whole_ones(
    family: str, layout: Layout, tmp_path: Path, reference_folder: Path
) -> None:
    found, expected = run_case(family, layout, tmp_path), reference(family, layout, reference_folder)
    assert_equal(found, expected)
    # Bytes of the targets; of experts, counts of all parts (step 1 routes as one rank does).
    assert found[0][0]["extras"] == pytest.approx(expected[0][0]["extras"])
    assert found[0][0]["figures"] == pytest.approx(expected[0][0]["figures"])


def test_the_core_is_made_of_cases() -> None:
    assert set(CASES) >= CORE


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return weighted.run_case(Layout(), weighted.DEPTHS, tmp_path_factory.mktemp("one_rank"))


@pytest.mark.parametrize(
    "layout",
    [
        Layout(context=2, zero=1, expert=2),
        pytest.param(Layout(context=2, context_method="ring", zero=3), marks=pytest.mark.slow),
        pytest.param(Layout(context=2, data=2, zero=3, accumulation=2), marks=pytest.mark.slow),
        pytest.param(Layout(context=2, tensor=2, sequence=True, zero=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_targets_of_multi_token_prediction_are_in_other_parts(layout: Layout, tmp_path: Path, one_rank: Run) -> None:
    """Two depths, very unequal token weights: a part's last tokens learn from tokens and weights of the next part."""
    found = weighted.run_case(layout, weighted.DEPTHS, tmp_path)
    assert_equal(found, one_rank)
    for step, (ours, theirs) in enumerate(zip(found[0], one_rank[0], strict=True), start=1):
        tolerance = STEP_1_LOSS_RELATIVE if step == 1 else LATER_LOSS_RELATIVE
        assert ours["extras"] == pytest.approx(theirs["extras"], rel=tolerance), step


@pytest.fixture(scope="module")
def balanced(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return weighted.run_case(Layout(), weighted.BALANCE, tmp_path_factory.mktemp("balanced"), 1)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(context=2, zero=2, accumulation=2),
        pytest.param(Layout(context=2, context_method="ring"), marks=pytest.mark.slow),
        pytest.param(Layout(context=2, tensor=2, sequence=True, zero=1), marks=pytest.mark.slow),
        pytest.param(Layout(context=2, data=2, expert=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_balance_is_that_of_whole_sequences(layout: Layout, tmp_path: Path, balanced: Run) -> None:
    """Strong balance losses, step 1: how often an expert is chosen is counted over all parts of a sequence."""
    found, run = weighted.run_case(layout, weighted.BALANCE, tmp_path, 1)
    assert found[0]["loss"] == pytest.approx(balanced[0][0]["loss"], rel=STEP_1_LOSS_RELATIVE)
    here, there = gradients(run), gradients(balanced[1])
    for name, gradient in there.items():
        assert relative(here[name], gradient) <= STEP_1_GRADIENT_RELATIVE, name


@pytest.mark.parametrize(
    ("saved", "resumed"),
    [
        (Layout(context=2, zero=3), Layout(zero=1)),
        pytest.param(Layout(), Layout(context=2, expert=2, zero=2), marks=pytest.mark.slow),
        pytest.param(Layout(context=2), Layout(context=4, context_method="ring", zero=3), marks=pytest.mark.slow),
        pytest.param(Layout(context=2, data=2, expert=4, zero=1), Layout(context=2, tensor=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_checkpoint_fits_any_number_of_parts(saved: Layout, resumed: Layout, tmp_path: Path) -> None:
    expected = run_distributed(save_after_three, saved.world_size, saved, str(tmp_path))[0]
    found = run_distributed(resume, resumed.world_size, resumed, str(tmp_path), str(tmp_path / "copy"))[0]
    assert found == pytest.approx(expected[3:], rel=LATER_LOSS_RELATIVE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "extra"),
    [
        (Layout(context=4, zero=2), "--model.num_query_groups=2"),  # each key head goes to two ranks
        (Layout(context=4, context_method="ring", zero=3), "--model.num_attention_heads=2"),
    ],
    ids=str,
)
def test_more_ranks_than_heads(layout: Layout, extra: str, tmp_path: Path) -> None:
    found, expected = (
        run_case("gpt", dataclasses.replace(one, extra=(extra,)), tmp_path / str(one)) for one in (layout, Layout())
    )
    assert_equal(found, expected)

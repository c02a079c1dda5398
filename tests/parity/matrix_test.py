"""Every family under a few layouts that cover all pairs of settings; ``python -m tests.parity.matrix`` runs them all.

Tolerances and their reasons: docs/numerical_stability.md; the measured table: docs/parallelism.md.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gptoughts.errors import ConfigError
from tests.distributed import run_distributed
from tests.harness import Layout, toy_experiment
from tests.parity.comparison import STEP_1_LOSS_RELATIVE, STEPS, TOLERANCES, Errors
from tests.parity.matrix import table
from tests.parity.matrix.layouts import (
    AXES,
    FAMILIES,
    LIMIT,
    RECOMPUTE,
    Case,
    all_cases,
    covering,
    covering_cases,
    every_case,
    feasible_cases,
    make_case,
    pairs_of,
)
from tests.parity.matrix.results import Record, ResultsFile, record_of, shard_of, source_hash
from tests.parity.matrix.routing import TIE_MARGIN
from tests.parity.matrix.runs import Outcome, one_rank_run, run_case, train_case

SUBSET = covering_cases()
POSSIBLE = [case.recomputed(recompute) for case in feasible_cases() for recompute in RECOMPUTE]


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("one_rank")


@pytest.mark.parametrize("case", SUBSET, ids=str)
def test_layout_equals_one_rank(case: Case, tmp_path: Path, references: Path) -> None:
    assert run_case(case, tmp_path, references).problems() == []
    history, _ = one_rank_run(case, references)
    assert history[-1]["loss"] < 0.9 * history[0]["loss"], "the reference does not learn"


def test_the_subset_covers_every_pair_that_can_be() -> None:
    assert len(SUBSET) <= LIMIT
    assert set().union(*map(pairs_of, SUBSET)) == set().union(*map(pairs_of, POSSIBLE))
    assert {case.family for case in SUBSET} == set(FAMILIES)
    assert tuple(covering(POSSIBLE, LIMIT)) == SUBSET, "the same cases each time"
    assert set(all_cases()) == {*feasible_cases(), *SUBSET}
    assert len(set(map(str, all_cases()))) == len(all_cases()), "results are kept by name"


def test_a_case_recomputes_what_its_name_says(tmp_path: Path) -> None:
    for case in SUBSET:
        parallel = toy_experiment(case.family, case.layout, tmp_path).config.parallel
        assert parallel.recompute_granularity == case.recompute
        assert case.one_rank.recompute == "none"
    assert {case.family for case in SUBSET if "moe" in case.layout.extra[-1]} == {"deepseek"}


def test_a_smaller_subset_takes_the_most_telling_cases_first() -> None:
    def count(cases: list[Case]) -> int:
        return len(set().union(*map(pairs_of, cases)))

    few = covering(POSSIBLE, 5)
    assert len(few) == 5
    assert count(few) > 4 * len(pairs_of(few[0])), "hardly any pair twice"


def test_what_cannot_be_is_refused_with_the_reason(tmp_path: Path) -> None:
    """The configuration names an axis of the layout; the command line says the same."""
    tried, feasible = set(), set(feasible_cases())
    for case in every_case():
        reasons = case.refusal()
        assert (not reasons) == (case in feasible)
        for reason in reasons:
            assert reason.startswith("parallel."), reason
            if (kind := reason.partition("(")[0] + reason.partition(":")[2]) not in tried:
                tried.add(kind)
                with pytest.raises(ConfigError) as caught:
                    toy_experiment(case.family, case.layout, tmp_path)
                assert reason in caught.value.problems
    assert len(tried) > 5


@pytest.mark.parametrize(
    ("family", "values", "reason"),
    [
        ("gpt", {"data": 2, "expert": 2}, "parallel.expert=2 (command line): this model (gpt) has no experts"),
        ("deepseek", {"expert": 2}, "the number of data-parallel ranks=1 is not divisible by 2"),
        ("mla", {"sequence": True}, "parallel.sequence=true (command line): shards over tensor-parallel ranks"),
        ("llada", {"virtual": 2}, "parallel.virtual_pipeline=2 (command line): interleaves the layers of several"),
        ("gpt", {"pipeline": 2, "virtual": 2}, "the 1 microbatches of a step are not a multiple of"),
    ],
)
def test_reasons(family: str, values: dict[str, Any], reason: str) -> None:
    case = make_case(family, {name: axis[0] for name, axis in AXES.items()} | values)
    assert any(reason in problem for problem in case.refusal())
    assert case not in feasible_cases()


FREE = [
    {"tensor": 2, "sequence": True, "data": 2, "expert": 2, "zero": 1},
    {"pipeline": 2, "data": 2, "zero": 3, "accumulation": 4},
    {"data": 4, "expert": 2, "zero": 2},
]


@pytest.mark.parametrize(
    "values", [pytest.param(values, marks=() if i == 0 else pytest.mark.slow) for i, values in enumerate(FREE)], ids=str
)
def test_experts_chosen_freely_differ_in_ties_alone(values: dict[str, Any], tmp_path: Path, references: Path) -> None:
    """Up to the first step with a tie that was decided otherwise, after which it is another run."""
    case = make_case("deepseek", {name: axis[0] for name, axis in AXES.items()} | values)
    expected, folder = one_rank_run(case, references)
    arguments = (case, str(tmp_path), str(folder.parent / "routing.pt"), STEPS, True)
    ranks = run_distributed(train_case, case.layout.world_size, *arguments)
    ties = [max(step) for step in zip(*(rank["widest_tie"] for rank in ranks), strict=True)]
    decided = next((step for step, tie in enumerate(ties) if tie > 0), len(ties))
    assert decided == len(ties) or ties[decided] <= TIE_MARGIN
    for step in range(decided):
        found = ranks[0]["history"][step]["loss"]
        tolerance = STEP_1_LOSS_RELATIVE if step == 0 else TOLERANCES["loss"]
        assert found == pytest.approx(expected[step]["loss"], rel=tolerance), step


def test_replay_is_what_makes_the_choice(tmp_path: Path, references: Path) -> None:
    """A layout that is given another run's choice follows it, and says how far its own would have been from it."""
    import torch

    case = make_case("deepseek", {name: axis[0] for name, axis in AXES.items()})
    _, folder = one_rank_run(case, references)
    tables = torch.load(folder.parent / "routing.pt", weights_only=True)
    wrong = {layer: (chosen + 1) % 4 for layer, chosen in tables.items()}
    torch.save(wrong, tmp_path / "wrong.pt")
    (found,) = run_distributed(train_case, 1, case, str(tmp_path), str(tmp_path / "wrong.pt"), 1, False)
    assert found["widest_tie"][0] > 100 * TIE_MARGIN
    expected, _ = one_rank_run(case, references)
    assert abs(found["history"][0]["loss"] / expected[0]["loss"] - 1) > STEP_1_LOSS_RELATIVE


ERRORS = Errors(step_1_loss=1e-8, step_1_gradient=2e-7, loss=3e-7, grad_norm=4e-7, weight=5e-7)


def test_errors_beyond_their_tolerance_are_named() -> None:
    assert ERRORS.beyond() == []
    assert replace(ERRORS, weight=2e-4, loss=float("nan")).beyond() == [
        "loss: nan is more than 1e-04",
        "weight: 2.00e-04 is more than 1e-04",
    ]
    assert "differ by 1.0e-03" in Outcome(ERRORS, 1e-3, 1.0).problems()[0]


def test_a_finished_case_is_not_run_again(tmp_path: Path) -> None:
    first, second, third = feasible_cases()[:3]
    results = ResultsFile(tmp_path / "results.jsonl")
    results.append(record_of(first, "now", Outcome(ERRORS, 0.0, 1.0)))
    results.append(record_of(second, "now", AssertionError("rank 1: no answer")))
    results.append(record_of(third, "before", Outcome(ERRORS, 0.0, 1.0)))
    with results.path.open("a") as file:
        file.write('{"case": "half a li')
    assert results.passed("now") == {str(first)}
    assert results.read()[1].problems == ["AssertionError: rank 1: no answer"]


def test_a_change_of_the_sources_counts(tmp_path: Path) -> None:
    before = source_hash(tmp_path)
    (tmp_path / "gptoughts" / "engine").mkdir(parents=True)
    (tmp_path / "gptoughts" / "engine" / "new.py").write_text("x = 1\n")
    assert source_hash(tmp_path) != before
    assert source_hash() == source_hash()


def test_shards_share_nothing_and_miss_nothing() -> None:
    cases = feasible_cases()
    parts = [shard_of(cases, index, 7) for index in range(1, 8)]
    assert sorted(str(case) for part in parts for case in part) == sorted(map(str, cases))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_table_says_what_was_measured(tmp_path: Path) -> None:
    cases = [case for case in feasible_cases() if case.family == "gpt"][:3]
    cases.append(cases[0].recomputed("full"))
    records = [record_of(case, "now", Outcome(replace(ERRORS, weight=1e-7 * (i + 1)), 0.0, 1.0))
               for i, case in enumerate(cases)]  # fmt: skip
    old = replace(records[0], source="before", problems=["loss"])
    text = table.render(table.latest([old, *records]))
    total = len(feasible_cases())
    assert f"3 of {total} feasible layouts measured and equal to one rank, 1 more with recompute, 0 not equal" in text
    of_gpt = sum(case.family == "gpt" for case in feasible_cases())
    assert f"| `gpt` | 3 of {of_gpt} | 1.0e-08 | 2.0e-07 | 3.0e-07 | 4.0e-07 | 4.0e-07 |" in text
    assert "| tensor 1 | 2.0e-07, 4.0e-07 (4) | - | - | - |" in text
    assert "| recompute none | 2.0e-07, 3.0e-07 (3) | - | - | - |" in text
    assert "| recompute full | 2.0e-07, 4.0e-07 (1) | - | - | - |" in text
    failed = Record("x", "now", cases[0].settings(), ["weight: too much"], None)
    assert "1 not equal" in table.render([*records, failed])
    page = tmp_path / "page.md"
    page.write_text(f"a\n{table.BEGIN}\nold\n{table.END}\nb\n")
    table.write_table(text, page)
    assert page.read_text() == f"a\n{table.BEGIN}\n{text}\n{table.END}\nb\n"


def test_the_page_has_room_for_the_table() -> None:
    page = table.PAGE.read_text()
    assert page.index(table.BEGIN) < page.index(table.END)


def test_layouts_name_every_axis() -> None:
    layout = Layout()
    assert all(hasattr(layout, name) for name in AXES)

"""Each transform undoes itself and puts rows where its docstring says."""

from __future__ import annotations

import pytest
import torch

from gptoughts.checkpoint.huggingface.transforms import GroupedHeads, InterleavedRotary, PaddedRows, Stacked, Transform

CASES: list[tuple[Transform, list[int]]] = [
    (Stacked((3, 5)), [3, 5]),
    (GroupedHeads(groups=2, queries_per_group=3, head_size=4), [24, 8, 8]),
    (PaddedRows(5, 8), [5]),
    (InterleavedRotary(heads=3, plain=4, rotary=6), [30]),
]


@pytest.mark.parametrize(("transform", "rows"), CASES, ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("columns", [(), (7,)])
def test_split_undoes_join(transform: Transform, rows: list[int], columns: tuple[int, ...]) -> None:
    parts = [torch.randn(count, *columns) for count in rows]
    for found, part in zip(transform.split(transform.join(parts)), parts, strict=True):
        assert torch.equal(found, part)


def test_heads_lie_group_by_group() -> None:
    joined = GroupedHeads(groups=2, queries_per_group=2, head_size=1).join(
        [torch.tensor([0, 1, 2, 3]), torch.tensor([10, 11]), torch.tensor([20, 21])]
    )
    assert joined.tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


def test_rotary_neighbours_become_halves() -> None:
    joined = InterleavedRotary(heads=1, plain=2, rotary=4).join([torch.arange(6)])
    assert joined.tolist() == [0, 1, 2, 4, 3, 5]

"""State as named fragments: they cover every parameter once, move between ZeRO stages and resume to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gptoughts.config.experiment import OptimConfig, ParallelConfig
from tests.distributed import run_distributed
from tests.engine.toys import build_toy_engine, initial_values, toy_batch, zero_json

OPTIM = OptimConfig(lr=1e-2)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Whole = dict[tuple[str, str], Tensor]
"""(name, kind) -> the whole flattened tensor."""


def _engine(stage: int, dtype: str) -> Any:
    from gptoughts.parallel import groups

    groups.initialize(ParallelConfig(), seed=1)
    return build_toy_engine(zero_json(stage, dtype=dtype), OPTIM, DTYPES[dtype])


def _steps(engine: Any, first: int, count: int) -> list[float]:
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    losses = []
    for step in range(first, first + count):
        batches = [toy_batch((step * 2 + m) * size + rank) for m in range(2)]
        losses.append(engine.train_step(batches, lr=1e-2 / (step + 1)).loss)
    return losses


def _pieces(engine: Any) -> list[tuple[str, str, int, Tensor]]:
    return [(f.name, f.kind, f.start, f.tensor.clone()) for f in engine.state_fragments() if f.is_owner]


def _train_and_save(stage: int, dtype: str) -> Any:
    engine = _engine(stage, dtype)
    _steps(engine, 0, 3)
    saved = (_pieces(engine), engine.scalar_state())
    losses = _steps(engine, 3, 3)
    final = _pieces(engine)
    engine.close()
    return saved, losses, final


def _load_and_train(stage: int, dtype: str, whole: Whole, scalars: dict[str, Any]) -> Any:
    engine = _engine(stage, dtype)

    def read(fragment: Any) -> Tensor:
        return whole[fragment.name, fragment.kind].narrow(0, fragment.start, fragment.tensor.numel())

    engine.load_state(read, scalars)
    loaded = _pieces(engine)
    losses = _steps(engine, 3, 3)
    final = _pieces(engine)
    engine.close()
    return loaded, losses, final


def _assemble(ranks: list[list[tuple[str, str, int, Tensor]]]) -> Whole:
    """Put the owners' pieces together; every element has to be there exactly once."""
    whole: Whole = {}
    seen: Whole = {}
    for name, value in initial_values().items():
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            whole[name, kind] = torch.full((value.numel(),), float("nan"))
            seen[name, kind] = torch.zeros(value.numel())
    for pieces in ranks:
        for name, kind, start, piece in pieces:
            assert piece.dtype == torch.float32
            whole[name, kind][start : start + piece.numel()] = piece
            seen[name, kind][start : start + piece.numel()] += 1
    for key, count in seen.items():
        assert bool((count == 1).all()), key
    return whole


def _equal(a: Whole, b: Whole) -> None:
    for key, value in a.items():
        assert torch.equal(value, b[key]), key


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resume_is_bitwise(stage: int, world_size: int, dtype: str) -> None:
    ranks = run_distributed(_train_and_save, world_size, stage, dtype)
    saved = _assemble([rank[0][0] for rank in ranks])
    scalars = ranks[0][0][1]
    assert scalars["optimizer_steps"] == 3
    resumed = run_distributed(_load_and_train, world_size, stage, dtype, saved, scalars)
    _equal(_assemble([rank[0] for rank in resumed]), saved)
    assert [rank[1] for rank in resumed] == [rank[1] for rank in ranks]
    _equal(_assemble([rank[2] for rank in resumed]), _assemble([rank[2] for rank in ranks]))


@pytest.mark.parametrize(("source", "target"), [(3, 0), (0, 3), (1, 2), (2, 3)])
def test_state_moves_between_stages_and_world_sizes(source: int, target: int) -> None:
    ranks = run_distributed(_train_and_save, 2, source, "bf16")
    saved = _assemble([rank[0][0] for rank in ranks])
    moved = run_distributed(_load_and_train, 1, target, "bf16", saved, ranks[0][0][1])
    _equal(_assemble([rank[0] for rank in moved]), saved)


def test_fragments_are_live_views() -> None:
    for changed in run_distributed(_write_fragment, 1, 1):
        assert changed


def _write_fragment(stage: int) -> bool:
    engine = _engine(stage, "fp32")
    fragment = next(f for f in engine.state_fragments() if f.kind == "weight")
    fragment.tensor.fill_(3.0)
    again = next(f for f in engine.state_fragments() if f.kind == "weight")
    engine.close()
    return bool((again.tensor == 3.0).all())


def test_a_piece_of_another_length_is_refused() -> None:
    run_distributed(_load_short, 1)


def _load_short() -> None:
    from gptoughts.errors import CheckpointError

    engine = _engine(0, "fp32")
    with pytest.raises(CheckpointError, match=r"up\.weight \(weight\): 1 elements"):
        engine.load_state(lambda fragment: torch.zeros(1), {"optimizer_steps": 0})
    engine.close()

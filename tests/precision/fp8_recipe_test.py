"""Histories and scales: worked out by hand, and against an independent walk through the kernel."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from gptoughts.config.experiment import Fp8Config
from gptoughts.precision.fp8_recipe import E4M3, E5M2, DelayedScaling, update

CASES = json.loads((Path(__file__).parent / "fp8_histories.json").read_text())["cases"]


def number(value: Any) -> float:
    return float(value)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"].split(":")[0])
def test_hand_computed_histories(case: dict[str, Any]) -> None:
    recipe = DelayedScaling("hybrid", case["margin"], case["length"], case["algorithm"])
    fp8 = E4M3 if case["fp8_max"] == 448 else E5M2
    history, scale = torch.zeros(case["length"], 1), torch.ones(1)
    for step in case["steps"]:
        for amax in step["amaxes"]:
            seen = torch.tensor(number(amax))
            history[0] = seen if seen.isnan() else torch.maximum(history[0], seen)
        update([history], [scale], history[0].clone(), fp8, recipe)
        expected = torch.tensor([number(value) for value in step["history"]])
        torch.testing.assert_close(history[:, 0], expected, rtol=0, atol=0, equal_nan=True)
        assert scale.item() == torch.tensor(number(step["scale"])).item(), step


Column = tuple[list[float], float]
"""History and scale."""


def walk(history: list[float], scale: float, latest: float, fp8_max: float, algorithm: str) -> Column:
    """The kernel's steps for one column, in its order."""
    last = latest if latest != 0 else history[0]
    amax = 0.0
    if last != 0:
        rolled = [history[i + 1] if i < len(history) - 1 else last for i in range(len(history))]
        for value in rolled:
            amax = amax if math.isnan(value) else max(amax, value)
        history = [0.0, *rolled[1:]]
    amax = last if algorithm == "most_recent" else amax
    if math.isfinite(amax) and amax > 0:
        scale = float(torch.tensor(fp8_max) / torch.tensor(amax))
    return history, min(scale, torch.finfo(torch.float32).max)


@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_many_columns_move_on_each_for_itself(algorithm: str, length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    recipe = DelayedScaling(amax_history_len=length, amax_compute_algo=algorithm)
    histories = [torch.zeros(length, n) for n in (3, 2, 6)]
    scales = [torch.ones(n) for n in (3, 2, 6)]
    columns: list[Column] = [([0.0] * length, 1.0) for _ in range(11)]
    odd = torch.tensor([0.0, math.inf, math.nan])
    for _ in range(4 * length):
        latest = torch.rand(11, generator=generator) * 100
        where = torch.randint(0, 8, (11,), generator=generator)
        latest = torch.where(where < 3, odd[where.clamp(max=2)], latest)
        update(histories, scales, latest, E4M3, recipe)
        columns = [walk(*c, float(a), 448.0, algorithm) for c, a in zip(columns, latest, strict=True)]
        expected = torch.tensor([history for history, _ in columns]).t()
        torch.testing.assert_close(torch.cat(histories, 1), expected, rtol=0, atol=0, equal_nan=True)
        assert torch.cat(scales).tolist() == [scale for _, scale in columns]


def test_a_rank_that_saw_less_takes_the_groups_magnitude() -> None:
    history, scale = torch.tensor([[2.0], [0.0]]), torch.ones(1)
    update([history], [scale], torch.tensor([7.0]), E4M3, DelayedScaling(amax_history_len=2))
    assert history.tolist() == [[0.0], [7.0]]
    assert scale.item() == 64.0


def test_the_recipe_follows_the_section() -> None:
    section = Fp8Config("e4m3", "delayed", 1, 8, "most_recent", "emulated")
    recipe = DelayedScaling.of(section)
    assert recipe == DelayedScaling("e4m3", 1, 8, "most_recent")
    assert (recipe.forward_format, recipe.backward_format) == (E4M3, E4M3)
    assert DelayedScaling().backward_format is E5M2


@pytest.mark.te
@pytest.mark.parametrize("format", ["hybrid", "e4m3"])
def test_the_recipe_is_transformer_engines(format: str) -> None:
    """Field by field, as megatron-core builds it from what ``te_backend.configure`` sets."""
    te = pytest.importorskip("transformer_engine.common.recipe")
    from types import SimpleNamespace

    from megatron.core.fp8_utils import get_fp8_recipe

    from gptoughts.precision.te_backend import configure

    ours = DelayedScaling(format, 2, 16, "most_recent")
    config = SimpleNamespace(fp8_wgrad=True, fp8_dot_product_attention=False, fp8_multi_head_attention=False,
                             fp8_interval=1, tp_only_amax_red=False)  # fmt: skip
    configure(config, ours)
    theirs = get_fp8_recipe(config)
    assert isinstance(theirs, te.DelayedScaling)
    assert (theirs.margin, theirs.amax_history_len, theirs.amax_compute_algo) == (2, 16, "most_recent")
    assert theirs.fp8_format == (te.Format.HYBRID if format == "hybrid" else te.Format.E4M3)
    assert theirs.fp8_format.value.max_fwd == ours.forward_format.max_value
    assert theirs.fp8_format.value.max_bwd == ours.backward_format.max_value
    assert theirs.reduce_amax
    assert (te.DelayedScaling().amax_history_len, te.DelayedScaling().amax_compute_algo) == (1024, "max")

"""Validation: every sample counts once, however many ranks share them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from gptoughts.engine.interface import StepResult
from gptoughts.objectives.base import ModelInputs
from gptoughts.objectives.causal_lm import CausalLM
from gptoughts.training.evaluate import TARGET_BYTES, Validator, bytes_of

SEQUENCE = 4
TOKEN_BYTES = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 9])


class SumOfLabels:
    """An engine whose token loss is the label itself, and that sees all data-parallel ranks' microbatches at once."""

    chunks: Sequence[Any] = ()

    def eval_step(self, microbatches: Sequence[ModelInputs]) -> StepResult:
        loss = sum(float((m.labels * m.loss_weights).sum()) for m in microbatches)
        count = sum(float(m.denominator) for m in microbatches)
        num_bytes = sum(float(bytes_of(m.labels, m.is_counted, TOKEN_BYTES)) for m in microbatches)
        return StepResult(loss, count, 0.0, False, {TARGET_BYTES: num_bytes}, {})


def samples(count: int) -> list[np.ndarray]:
    return [np.full(SEQUENCE + 1, i % 10, dtype=np.int64) for i in range(count)]


def evaluate(
    count: int, limit: int, batch_size: int, ranks: int, together: int = 1
) -> tuple[float, Mapping[str, float]]:
    """Sums over ranks of what each rank's validator hands to the engine."""
    seen: list[list[ModelInputs]] = []

    class Recorder(SumOfLabels):
        def eval_step(self, microbatches: Sequence[ModelInputs]) -> StepResult:
            seen[-1].extend(microbatches)
            # What one rank alone would see means nothing: the sums below are over all ranks, as the engine's are.
            return StepResult(1.0, 1.0, 0.0, False, {TARGET_BYTES: 1.0}, {})

    for rank in range(ranks):
        seen.append([])
        Validator(
            samples(count), limit, objective=CausalLM(), batch_size=batch_size, data_parallel_rank=rank,
            data_parallel_size=ranks, device=torch.device("cpu"), microbatches_per_step=together,
        ).run(Recorder())  # type: ignore[arg-type]  # fmt: skip
    assert len({len(rounds) for rounds in seen}) == 1, "every rank has to run as many microbatches"
    total = SumOfLabels().eval_step([inputs for rounds in seen for inputs in rounds])
    return total.loss_sum / total.denominator, {"tokens": total.denominator, **total.extras}


@pytest.mark.parametrize(
    ("batch_size", "ranks", "together"), [(1, 1, 1), (4, 1, 1), (3, 2, 1), (8, 3, 1), (1, 1, 2), (2, 2, 4)]
)
def test_each_sample_counts_once_for_any_layout(batch_size: int, ranks: int, together: int) -> None:
    mean, extras = evaluate(count=7, limit=-1, batch_size=batch_size, ranks=ranks, together=together)
    assert mean == pytest.approx(np.mean(range(7)))
    assert extras == {"tokens": 7 * SEQUENCE, TARGET_BYTES: SEQUENCE * sum(range(7))}


def test_a_limit_takes_the_first_samples() -> None:
    mean, extras = evaluate(count=9, limit=5, batch_size=2, ranks=1)
    assert mean == pytest.approx(2.0)
    assert extras["tokens"] == 5 * SEQUENCE


def test_bits_per_byte() -> None:
    validator = Validator(
        samples(3), -1, objective=CausalLM(), batch_size=3, data_parallel_rank=0, data_parallel_size=1,
        device=torch.device("cpu"),
    )  # fmt: skip
    result = validator.run(SumOfLabels())  # type: ignore[arg-type]
    assert result.nats_per_token == pytest.approx(1.0)
    assert result.bits_per_byte == pytest.approx(1.0 / math.log(2)), "each label stands for as many bytes as its loss"
    assert (result.num_samples, result.num_tokens) == (3, 3 * SEQUENCE)

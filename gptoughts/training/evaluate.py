"""Validation: mean loss over a fixed set of samples, the same for any layout, in nats per token and bits per byte."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gptoughts.engine.interface import Engine
from gptoughts.objectives.base import ModelInputs, Objective

TARGET_BYTES = "target_bytes"


@dataclass(frozen=True)
class ValidationResult:
    """Loss over the validation samples."""

    nats_per_token: float
    bits_per_byte: float | None
    """None where the corpus names no tokenizer, so that bytes cannot be counted."""
    num_samples: int
    num_tokens: float


class SampleSet(Protocol):
    """A finite set of samples, each int64 [s + num_extra_tokens]."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        """One sample."""


class Validator:
    """Evaluates a fixed set of samples.

    Args:
        samples: Validation samples.
        num_samples: How many of them count; -1: all.
        objective: Turns rows into microbatches.
        batch_size: Samples per microbatch.
        data_parallel_rank, data_parallel_size: Which share of the samples is this rank's.
        device: Where microbatches go.
        microbatches_per_step: How many go through the model together; pipeline stages want one each.
    """

    def __init__(
        self,
        samples: SampleSet,
        num_samples: int,
        *,
        objective: Objective,
        batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        device: torch.device,
        microbatches_per_step: int = 1,
    ) -> None:
        self._samples = samples
        self._num_samples = len(samples) if num_samples < 0 else min(num_samples, len(samples))
        self._objective = objective
        self._batch_size = batch_size
        self._rank = data_parallel_rank
        self._size = data_parallel_size
        self._device = device
        self._microbatches_per_step = microbatches_per_step

    def run(self, engine: Engine) -> ValidationResult:
        """Evaluate the present weights. Collective: every rank of the world."""
        per_round = self._batch_size * self._size * self._microbatches_per_step
        loss_sum = denominator = num_bytes = 0.0
        for start in range(0, self._num_samples, per_round):
            first = start + self._rank * self._batch_size
            microbatches = [
                self._microbatch(first + number * self._batch_size * self._size)
                for number in range(self._microbatches_per_step)
            ]
            result = engine.eval_step(microbatches)
            loss_sum += result.loss_sum
            denominator += result.denominator
            num_bytes += result.extras[TARGET_BYTES]
        return ValidationResult(
            nats_per_token=loss_sum / denominator,
            bits_per_byte=loss_sum / (math.log(2) * num_bytes) if num_bytes else None,
            num_samples=self._num_samples,
            num_tokens=denominator,
        )

    def _microbatch(self, first: int) -> ModelInputs:
        """Samples first, first + 1, ...; rows past the end repeat the first sample with weight 0."""
        indices = [first + row for row in range(self._batch_size)]
        rows = [self._samples[index] if index < self._num_samples else self._samples[0] for index in indices]
        tokens = torch.from_numpy(np.stack(rows))
        inputs = self._objective.prepare(tokens, torch.tensor(indices))
        is_real = torch.tensor([index < self._num_samples for index in indices])
        weights = inputs.loss_weights * is_real[:, None]
        is_counted = inputs.is_counted & is_real[:, None]
        counted = inputs.denominator * float(is_real.sum()) / self._batch_size
        return replace(inputs, loss_weights=weights, denominator=counted, is_counted=is_counted).to(self._device)


def bytes_of(labels: Tensor, is_counted: Tensor, token_bytes: Tensor) -> Tensor:
    """UTF-8 bytes that the counted labels [b, s] stand for: fp32 scalar.

    Args:
        labels: int64 [b, s].
        is_counted: bool [b, s].
        token_bytes: UTF-8 bytes of each token id, int64 [vocabulary], on the labels' device.
    """
    return (token_bytes[labels] * is_counted).sum().float()

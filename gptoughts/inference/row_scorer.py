"""Rows of tokens through a model to log-probabilities of given tokens at given positions.

Legend: b rows of a batch, s positions, n selected positions, v padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gptoughts.models.cross_entropy import cross_entropy
from gptoughts.platform import device


@dataclass(frozen=True)
class Row:
    """One sequence and what to read from it."""

    input_ids: Sequence[int]
    """What the model sees."""
    positions: Sequence[int]
    """Where its output is read."""
    targets: Sequence[int]
    """The token whose probability is read at each of the positions."""
    key: Any = None
    """Whose row it is: handed back with the result."""


@dataclass(frozen=True)
class RowScores:
    """What a row's positions say, in the order of ``Row.positions``; fp64 and int64 [n] on the CPU."""

    log_probs: Tensor
    """Of the targets, nats."""
    best_ids: Tensor
    """The likeliest token of each position."""
    best_log_probs: Tensor
    """Its log-probability, nats."""


class RowScorer:
    """Scores rows in batches.

    Args:
        model: Maps input ids [b, s], position ids, attention mask and selected positions [n] to logits [n, v].
        num_entries: Entries of the vocabulary, from id 0: the padding above them is no token and has no probability.
        is_causal: Whether a position sees earlier ones only; if not, the padding of shorter rows is hidden.
        batch_tokens: Tokens of a batch, padding included; a longer row is a batch by itself.
    """

    def __init__(self, model: nn.Module, *, num_entries: int, is_causal: bool, batch_tokens: int) -> None:
        self._model = model
        self._num_entries = num_entries
        self._is_causal = is_causal
        self._batch_tokens = batch_tokens

    def run(self, rows: Iterable[Row]) -> Iterator[tuple[Row, RowScores]]:
        """Score rows one after another; neighbours of like length waste the least.

        Collective: tensor-parallel group (every rank gives the same rows).
        """
        batch: list[Row] = []
        for row in rows:
            longest = max(len(other.input_ids) for other in (*batch, row))
            if batch and (len(batch) + 1) * longest > self._batch_tokens:
                yield from self._score(batch)
                batch = []
            batch.append(row)
        if batch:
            yield from self._score(batch)

    @torch.inference_mode()
    def _score(self, batch: Sequence[Row]) -> list[tuple[Row, RowScores]]:
        here = device.current_device()
        lengths = torch.tensor([len(row.input_ids) for row in batch])
        s = int(lengths.max())
        input_ids = torch.zeros(len(batch), s, dtype=torch.int64)
        for line, row in zip(input_ids, batch, strict=True):
            line[: len(row.input_ids)] = torch.tensor(row.input_ids, dtype=torch.int64)
        selected = [number * s + position for number, row in enumerate(batch) for position in row.positions]
        targets = torch.tensor([target for row in batch for target in row.targets], device=here)
        mask = None
        if not self._is_causal and int(lengths.min()) < s:
            mask = (torch.arange(s) >= lengths[:, None])[:, None, None, :].to(here)
        logits = self._model(
            input_ids.to(here), None, mask, selected_positions=torch.tensor(selected, device=here)
        )  # fmt: skip
        logits[:, self._num_entries :] = -torch.inf
        best_ids = logits.argmax(dim=-1)
        found = [-cross_entropy(logits, targets), best_ids, -cross_entropy(logits, best_ids)]
        log_probs, best_ids, best_log_probs = (tensor.cpu() for tensor in found)
        counts = [len(row.positions) for row in batch]
        parts = zip(
            log_probs.double().split(counts), best_ids.split(counts), best_log_probs.double().split(counts), strict=True
        )
        return [(row, RowScores(*part)) for row, part in zip(batch, parts, strict=True)]

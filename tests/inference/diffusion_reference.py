"""The published sampler of LLaDA and Fast-dLLM's choice of tokens, written plainly and on their own, one row at a time.

As arXiv:2502.09992 (appendices A.3, B.4) and arXiv:2505.22618 (section 3.3) describe them, in Python's own loops;
nothing here is of the package. Where there is noise it is drawn from the generator in the order that is said below.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Logits = Callable[[list[int]], Tensor]
"""A whole row to the logits [length, v] of its own tokens, without the mask's."""


@dataclass
class Plain:
    """A sampler; ``restore`` fills the masks of a row."""

    logits_of: Logits
    mask: int
    block_length: int
    steps_per_block: int
    temperature: float = 0.0
    is_random: bool = False
    guidance: float = 0.0
    never: tuple[int, ...] = ()
    last: tuple[int, ...] = ()
    threshold: float | None = None
    factor: float | None = None
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    kept_by_step: list[list[int]] = field(default_factory=list)

    def restore(self, row: list[int]) -> list[int]:
        row = list(row)
        given = [i for i, token in enumerate(row) if token != self.mask]
        holes = [i for i, token in enumerate(row) if token == self.mask]
        for start in range(0, len(holes), self.block_length):
            block = holes[start : start + self.block_length]
            size, step = len(block), 0
            while any(row[i] == self.mask for i in block):
                wanted = [i for i in block if row[i] == self.mask]
                predictions = self.predict(self.guided(row, given), wanted)
                best_first = sorted(wanted, key=lambda i: -predictions[i][1])
                number = size // self.steps_per_block + (step < size % self.steps_per_block)
                kept = best_first[: self.how_many([predictions[i][1] for i in best_first], number)]
                for i in kept:
                    row[i] = predictions[i][0]
                self.kept_by_step.append(kept)
                step += 1
        return row

    def guided(self, row: list[int], given: list[int]) -> Tensor:
        logits = self.logits_of(row)
        if self.guidance == 0:
            return logits
        without = [self.mask if i in given else token for i, token in enumerate(row)]
        other = self.logits_of(without)
        return other + (self.guidance + 1) * (logits - other)

    def predict(self, logits: Tensor, wanted: list[int]) -> dict[int, tuple[int, float]]:
        """Position -> token, confidence. Draws [masks, v] for the noise, then [masks, 1] for random confidences."""
        logits = logits.double().clone()
        for token in self.never:
            logits[:, token] = -math.inf
        noise = [[1.0]] * len(wanted)
        if self.temperature > 0:
            uniform = torch.rand(len(wanted), logits.size(1), generator=self.generator, dtype=torch.float64)
            noise = (-torch.log(uniform)) ** self.temperature
        tokens = {i: int((logits[i].exp() / torch.as_tensor(noise[n])).argmax()) for n, i in enumerate(wanted)}
        if self.is_random:
            drawn = torch.rand(len(wanted), 1, generator=self.generator, dtype=torch.float64)
            return {i: (tokens[i], float(drawn[n])) for n, i in enumerate(wanted)}
        found = {}
        for i in wanted:
            weights = logits[i].exp()
            for token in self.last:
                weights[token] = 0.0
            found[i] = tokens[i], float(weights[tokens[i]] / weights.sum())
        return found

    def how_many(self, sorted_confidences: list[float], number: int) -> int:
        if self.threshold is not None:
            return max(1, sum(c >= self.threshold for c in sorted_confidences))
        if self.factor is not None:
            count = 1
            for n, c in enumerate(sorted_confidences, start=1):
                if (n + 1) * (1 - c) <= self.factor:
                    count = n
            return max(1, count)
        return number

"""How the next token is drawn from a model's logits.

In this order: repetition penalty (Keskar et al., arXiv:1909.05858, section 4.1, as transformers applies it: logits of
tokens that have occurred are divided by it where positive, multiplied where negative), temperature, the k likeliest,
the smallest set that holds probability p (Holtzman et al., arXiv:1904.09751), and those of at least min_p times the
likeliest one's probability (arXiv:2407.01082).

Legend: n rows, v tokenizer's vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gptoughts.inference.sampling_options import SamplingOptions

_PART = 128


def likeliest(logits: Tensor) -> Tensor:
    """argmax of [n, v], by parts: torch's own is a loop over single numbers on a CPU, ten times slower than amax."""
    n, v = logits.shape
    if v % _PART:
        return logits.argmax(dim=-1)
    parts = logits.view(n, v // _PART, _PART)
    part = parts.amax(dim=-1).argmax(dim=-1)
    return part * _PART + parts[torch.arange(n, device=logits.device), part].argmax(dim=-1)


class Sampler:
    """Draws the tokens of one request, one after the other."""

    def __init__(self, options: SamplingOptions) -> None:
        self.options = options
        self._generator = torch.Generator().manual_seed(options.seed)

    def draw(self, logits: Tensor, seen: Sequence[int]) -> int:
        """The next token from fp32 logits [v] on the CPU, after the tokens ``seen`` (prompt and answer so far)."""
        options = self.options
        if options.repetition_penalty != 1:
            logits = _penalized(logits, seen, options.repetition_penalty)
        if options.temperature == 0:
            return int(logits.argmax())
        scaled = logits / options.temperature
        if 0 < options.top_k < scaled.numel():
            floor = scaled.topk(options.top_k).values[-1]
            scaled = scaled.masked_fill(scaled < floor, -torch.inf)
        probabilities = scaled.softmax(dim=-1)
        if options.top_p < 1:
            probabilities = _within(probabilities, options.top_p)
        if options.min_p > 0:
            probabilities = probabilities.masked_fill(probabilities < options.min_p * probabilities.max(), 0.0)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


def _penalized(logits: Tensor, seen: Sequence[int], penalty: float) -> Tensor:
    ids = torch.tensor(sorted(set(seen)), dtype=torch.int64)
    found = logits[ids]
    return logits.index_copy(0, ids, torch.where(found > 0, found / penalty, found * penalty))


def _within(probabilities: Tensor, share: float) -> Tensor:
    """Probabilities [v] with 0 for all but the likeliest tokens that together hold ``share``."""
    largest, order = probabilities.sort(descending=True)
    # A token stays where those before it do not yet hold the share: the likeliest always does.
    is_out = largest.cumsum(dim=0) - largest >= share * probabilities.sum()
    return probabilities.index_fill(0, order[is_out], 0.0)

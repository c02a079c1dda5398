"""The published sampler of LLaDA and Fast-dLLM's choice of tokens, written plainly and on their own, one row at a time.

As arXiv:2502.09992 (appendices A.3, B.4) and arXiv:2505.22618 (sections 3.2, 3.3) describe them, in Python's own loops;
nothing here is of the package. Where there is noise it is drawn from the generator in the order that is said below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.parity.llada_reference import Attention, LatentAttention, Reference, turn

Logits = Callable[[list[int], Collection[int] | None], Tensor]
"""A row, and which of its positions are computed anew (None: all), to logits [length, v], without the mask's. The
others are looked at as they were when they were computed last."""


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
    cache: str = "none"
    shift: int = 0
    """Logits at a position are about the one so many to the right."""
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    kept_by_step: list[list[int]] = field(default_factory=list)

    def restore(self, row: list[int]) -> list[int]:
        row = list(row)
        given = [i for i, token in enumerate(row) if token != self.mask]
        holes = [i for i, token in enumerate(row) if token == self.mask]
        for start in range(0, len(holes), self.block_length):
            block = holes[start : start + self.block_length]
            size, step = len(block), 0
            window: Collection[int] = range(block[0] - self.shift, block[-1] + 1 if self.cache == "dual" else len(row))
            fresh: list[int] = []
            while any(row[i] == self.mask for i in block):
                wanted = [i for i in block if row[i] == self.mask]
                if self.cache == "delayed":
                    anew = [*wanted, *fresh]
                    window = {*anew, *(i - self.shift for i in anew)}
                predictions = self.predict(
                    self.guided(row, given, window if self.cache != "none" and step else None), wanted
                )
                best_first = sorted(wanted, key=lambda i: -predictions[i][1])
                number = size // self.steps_per_block + (step < size % self.steps_per_block)
                kept = best_first[: self.how_many([predictions[i][1] for i in best_first], number)]
                for i in kept:
                    row[i] = predictions[i][0]
                self.kept_by_step.append(kept)
                fresh = kept
                step += 1
        return row

    def guided(self, row: list[int], given: list[int], window: Collection[int] | None) -> Tensor:
        logits = self.logits_of(row, window)
        if self.guidance == 0:
            return logits
        without = [self.mask if i in given else token for i, token in enumerate(row)]
        other = self.logits_of(without, window)
        return other + (self.guidance + 1) * (logits - other)

    def predict(self, logits: Tensor, wanted: list[int]) -> dict[int, tuple[int, float]]:
        """Position -> token, confidence. Draws [masks, v] for the noise, then [masks, 1] for random confidences."""
        logits = logits.double().roll(self.shift, dims=0)
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


class Freezing:
    """Logits of a reference model that keeps the keys and values of every position's last forward.

    It keeps those of two rows: a guided sampler asks for a row and its unguided side in turn.
    """

    def __init__(self, model: Reference, vocab_size: int, *, sides: int = 1) -> None:
        self.model, self.vocab_size, self.sides = model, vocab_size, sides
        self.kept: list[list[tuple[Tensor, Tensor]]] = []
        self.turn = 0

    def __call__(self, row: list[int], window: Collection[int] | None) -> Tensor:
        side = self.turn % self.sides
        self.turn += 1
        is_new = torch.tensor([window is None or i in window for i in range(len(row))])[:, None]
        found = []
        x = self.model.embedding(torch.tensor([row]))
        for number, block in enumerate(self.model.blocks):
            normed = block.attention_norm(x)
            q, k, v = heads_of(block.attention, normed)
            if window is not None:
                kept_k, kept_v = self.kept[side][number]
                k, v = torch.where(is_new, k, kept_k), torch.where(is_new, v, kept_v)
            found.append((k, v))  # kept below: what is run in one step is looked at by later ones
            scores = (q @ k.transpose(-1, -2) / q.size(-1) ** 0.5).softmax(-1)
            x = x + block.attention.out((scores @ v).transpose(1, 2).reshape(1, len(row), -1))
            normed = block.feed_forward_norm(x)
            x = x + block.down(torch.nn.functional.silu(block.gate(normed)) * block.up(normed))
        self.kept[side : side + 1] = [found]
        return self.model.head(self.model.norm(x))[0, :, : self.vocab_size]


def heads_of(attention: torch.nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [1, np, s, size] of [1, s, width]; where a row stands in its text is its index."""
    b, s, _ = x.shape
    if isinstance(attention, LatentAttention):
        plain, turned, rank = attention.plain, attention.turned, attention.kv_norm.weight.numel()
        q = attention.q(x).view(b, s, attention.heads, -1).transpose(1, 2)
        latent, shared = attention.kv_down(x).split([rank, turned], dim=-1)
        kv = attention.kv_up(attention.kv_norm(latent)).view(b, s, attention.heads, -1).transpose(1, 2)
        shared = turn(shared[:, None], attention.base).expand(-1, attention.heads, -1, -1)
        q = torch.cat((q[..., :plain], turn(q[..., plain:], attention.base)), dim=-1)
        return q, torch.cat((kv[..., :plain], shared), dim=-1), kv[..., plain:]
    assert isinstance(attention, Attention)
    q, k, v = (
        layer(x).view(b, s, -1, attention.size).transpose(1, 2) for layer in (attention.q, attention.k, attention.v)
    )
    k, v = (t.repeat_interleave(attention.heads // attention.groups, dim=1) for t in (turn(k, attention.base), v))
    return turn(q, attention.base), k, v

"""A masked-diffusion model as samplers see it: rows in, logits at some of their positions out.

Classifier-free guidance (LLaDA, arXiv:2502.09992, appendix A.3; *Scaling up Masked Diffusion Models on Text*,
arXiv:2410.18514, section 5) runs each row a second time with what it was given masked:

    l = u + (w + 1)(c - u),    c logits of the row, u of the row without its prompt.

With a cache (Fast-dLLM, arXiv:2505.22618, section 3.2) a forward of whole rows keeps all keys and values, and later
ones run some positions of each row alone: the others are looked at as they were. Where attention looks both ways that
is no exact shortcut, but keys and values change little while a block is restored.

Legend: r rows, s sequence, w window, n positions of all rows, v tokenizer's vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gptoughts.inference.remasking import SpecialTokens
from gptoughts.models.decode_step import DecodeStep, is_decodable
from gptoughts.models.kv_cache import CacheWindow, KVCache, cached_states


@dataclass(frozen=True)
class Rows:
    """Rows of unequal length, padded on the right."""

    tokens: Tensor
    """int64 [r, s]; whatever stands beyond a row's end is never looked at."""
    lengths: Tensor
    """int64 [r]."""
    is_given: Tensor
    """bool [r, s]: what is not to be restored, which guidance takes away."""
    numbers: list[int]
    """Which rows of the batch they are, ascending."""

    def at(self, index: Tensor) -> Rows:
        """Some of the rows, cut to the longest of them."""
        lengths = self.lengths[index]
        longest = int(lengths.max())
        numbers = [self.numbers[i] for i in index.tolist()]
        return Rows(self.tokens[index, :longest], lengths, self.is_given[index, :longest], numbers)


class Denoiser:
    """Logits of a model at masked positions.

    Args:
        model: A ``LanguageModel`` that looks both ways, or (without a cache) what is called like it.
        special: Ids.
        vocab_size: Entries of the tokenizer; what is above is the embedding's padding.
        is_shifted: The output at position i is about token i + 1 (``DiffusionFields.is_shifted``).
        cfg_scale: Guidance; 0: none.
        cache_shape: Rows of the batch and tokens of the longest, where keys and values are kept; unset: they are not.
    """

    def __init__(
        self,
        model: nn.Module,
        special: SpecialTokens,
        *,
        vocab_size: int,
        is_shifted: bool,
        cfg_scale: float,
        cache_shape: tuple[int, int] | None = None,
    ) -> None:
        self.model: Any = model
        self.special = special
        self.vocab_size = vocab_size
        self.shift = int(is_shifted)
        self.cfg_scale = cfg_scale
        self.sides = 1 if cfg_scale == 0 else 2
        self.cache: KVCache | None = None
        self.step: DecodeStep | None = None
        """Stands for forwards with a cache where it knows the model and costs less."""
        if cache_shape is not None:
            if is_decodable(model):
                self.step = DecodeStep(model)
            # One more place, for the padding of windows.
            self.cache = KVCache.of_model(model, rows=self.sides * cache_shape[0], places=cache_shape[1] + 1)
        self.cached: list[int] = []
        """Numbers of the rows that the cache holds; guided ones lie there in order, then their other sides."""
        self.num_forwards = 0
        """Forwards of the model so far; both sides of guided rows are one."""

    def logits(self, rows: Rows, is_wanted: Tensor) -> Tensor:
        """Logits [n, v] at the wanted positions (bool [r, s]), row after row; the cache then holds these rows.

        Collective: tensor-parallel group.
        """
        s = rows.tokens.size(1)
        row, position = is_wanted.nonzero(as_tuple=True)
        if self.cache is not None:
            self.cached = rows.numbers
            positions = torch.arange(s, device=rows.tokens.device).expand(len(rows.numbers), -1)
            return self._guided(rows, positions, row * s + position - self.shift)
        return self._guided(rows, None, row * s + position - self.shift)

    def window_logits(self, rows: Rows, is_wanted: Tensor, is_run: Tensor) -> Tensor:
        """The same, with the positions bool [r, s] of each row run alone, the wanted ones among them.

        All rows have to be among those of the last :meth:`logits` and windows since. Collective: tensor-parallel group.
        """
        assert self.cache is not None
        self._drop_others(rows)
        if self.shift:  # the output about a position is the one before it
            is_run = is_run | torch.cat((is_run[:, 1:], torch.zeros_like(is_run[:, :1])), dim=1)
        counts = is_run.sum(1, keepdim=True)
        width = int(counts.max())
        positions = is_run.int().sort(dim=1, descending=True, stable=True).indices[:, :width]
        positions = positions.where(torch.arange(width, device=positions.device) < counts, self.cache.places - 1)
        row, position = is_wanted.nonzero(as_tuple=True)
        column = (is_run.cumsum(1) - 1)[row, position - self.shift]
        return self._guided(rows, positions, row * width + column)

    def _drop_others(self, rows: Rows) -> None:
        """Move what is kept of the rows to the first places of the cache."""
        assert self.cache is not None
        if rows.numbers == self.cached:
            return
        before = len(self.cached)
        places = [self.cached.index(number) for number in rows.numbers]
        sources = [side * before + place for side in range(self.sides) for place in places]
        for target, source in enumerate(sources):  # never past one that is still to be read: both ascend
            if target != source:
                self.cache.copy_row(source, target, rows.tokens.size(1))
        self.cached = rows.numbers

    def _guided(self, rows: Rows, positions: Tensor | None, selected: Tensor) -> Tensor:
        """Logits [n, v] at indices into the flattened positions [r, w] (unset: whole rows without a cache)."""
        if self.sides == 1:
            return self._forward(rows.tokens, rows.lengths, positions, selected)
        tokens = torch.cat((rows.tokens, rows.tokens.masked_fill(rows.is_given, self.special.mask)))
        count = rows.tokens.numel() if positions is None else positions.numel()
        selected = torch.cat((selected, selected + count))
        if positions is not None:
            positions = torch.cat((positions, positions))
        both = self._forward(tokens, torch.cat((rows.lengths, rows.lengths)), positions, selected).float()
        guided, unguided = both.chunk(2)
        return unguided + (self.cfg_scale + 1.0) * (guided - unguided)

    def _forward(self, tokens: Tensor, lengths: Tensor, positions: Tensor | None, selected: Tensor) -> Tensor:
        self.num_forwards += 1
        if positions is not None:
            return self._cached_forward(tokens, lengths, positions, selected)[:, : self.vocab_size]
        is_beyond = torch.arange(tokens.size(1), device=tokens.device) >= lengths[:, None]
        attention_mask = is_beyond[:, None, None, :] if is_beyond.any() else None
        return self.model(tokens, None, attention_mask, selected_positions=selected)[:, : self.vocab_size]

    def _cached_forward(self, tokens: Tensor, lengths: Tensor, positions: Tensor, selected: Tensor) -> Tensor:
        assert self.cache is not None
        window = CacheWindow.looking_around(self.cache, positions, lengths.tolist())
        inputs = tokens.gather(1, positions.clamp(max=tokens.size(1) - 1))
        width = positions.size(1)
        if self.step is not None and self.step.suits(width):
            return self.step.logits(self.step.window_states(inputs.view(-1), window)[selected])
        states = cached_states(self.model, inputs, window)
        chosen = states.transpose(0, 1)[selected // width, selected % width]
        return self.model.logits(chosen.unsqueeze(1)).squeeze(1)

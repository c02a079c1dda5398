"""What attention layers keep of the tokens that they have seen, so that a forward has to see the new ones only.

A row of a cache belongs to one sequence, and what a layer keeps of its token at position p lies at place p. So rows of
any length start at place 0, nothing is shifted or padded, and a forward of positions that were there before overwrites
what was kept of them. All memory is allocated once.

Keys are kept turned by their positions. Of a token, a layer keeps per key/value head a key and a value; a layer with
latent attention its latent and its shared rotary key instead, whatever the number of heads
(``models.latent_attention``).

Legend: r rows of the cache, b rows of a forward, s tokens of each in a forward, p places, h hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from gptoughts.platform import huge_pages


class CachedAttention(Protocol):
    """An attention layer that can work with a cache."""

    cache: LayerCache | None
    """Set while a forward uses one."""

    def kept_shapes(self) -> tuple[tuple[int, int], ...]:
        """(heads, width) of each tensor that the layer keeps of a token, on this rank."""


class KVCache:
    """Memory for what all layers keep.

    Args:
        layers: Attention layers, in the order of :func:`attention_layers`.
        rows: Sequences.
        places: Tokens of a sequence at the most.
        dtype: Of the layers' activations.
        device: Where they are computed.
    """

    def __init__(
        self, layers: Sequence[Any], *, rows: int, places: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.rows, self.places = rows, places
        self.device = device
        shapes = [layer.kept_shapes() for layer in layers]
        assert len(set(shapes)) == 1, "all layers keep the same"
        with torch.inference_mode(False):  # so that it can be written inside inference_mode and outside
            self.whole: list[Tensor] = [
                # Zeros: a place that was never written must not hold a NaN, which no mask stops.
                _zeros((len(layers), rows, heads, places, width), dtype, device)
                for heads, width in shapes[0]
            ]
        """What all layers keep, [layers, r, heads, p, width] each."""
        self.kept: list[tuple[Tensor, ...]] = list(zip(*self.whole, strict=True))
        """Per layer what it keeps, each [r, heads, p, width]."""

    @classmethod
    def of_model(cls, model: Any, *, rows: int, places: int, with_prediction: bool = False) -> KVCache:
        """A cache for a language model; ``with_prediction`` also for its layers of multi-token prediction."""
        weight = next(model.parameters())
        layers = attention_layers(model, with_prediction=with_prediction)
        return cls(layers, rows=rows, places=places, dtype=weight.dtype, device=weight.device)

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes."""
        return sum(kept.numel() * kept.element_size() for kept in self.whole)

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Make one row hold what another holds of its first ``length`` tokens."""
        for kept in self.whole:
            kept[:, target, :, :length] = kept[:, source, :, :length]


@dataclass(frozen=True)
class CacheWindow:
    """Which tokens a forward sees, and what each may look at."""

    cache: KVCache
    first_row: int
    positions: Tensor
    """int64 [b, s]: of the forward's tokens; rows are ``first_row`` and those after it."""
    num_places: int
    """Attention reads places 0 ... num_places - 1."""
    is_visible: Tensor | None
    """bool [b or 1, 1, s, num_places], True where a token looks at a place; None: everywhere, or :attr:`is_causal`."""
    is_causal: bool = False
    """The tokens are places 0 ... num_places - 1 of each row, and look back only."""
    start: int | None = None
    """Position of the first token where it is the same in all rows and the others follow it."""

    @classmethod
    def looking_back(cls, cache: KVCache, starts: Sequence[int], count: int, *, first_row: int = 0) -> CacheWindow:
        """``count`` tokens of each row, from position ``starts[row]`` on, that look at themselves and what is before.

        Shorter rows are padded behind: what is kept of padding is overwritten before any token looks at it.

        Raises:
            ValueError: they do not fit into the cache.
        """
        num_places = max(starts) + count
        _check_fit(cache, first_row, len(starts), num_places)
        where = cache.device
        if min(starts) == max(starts):
            start = starts[0]
            positions = torch.arange(start, num_places, device=where).expand(len(starts), -1)
            is_visible = None
            if start and count > 1:
                is_visible = torch.ones(count, num_places, dtype=torch.bool, device=where).tril(start)[None, None]
            return cls(cache, first_row, positions, num_places, is_visible, not start and count > 1, start)
        positions = torch.tensor(starts, device=where)[:, None] + torch.arange(count, device=where)
        is_visible = torch.arange(num_places, device=where) <= positions[:, None, :, None]
        return cls(cache, first_row, positions, num_places, is_visible)

    @classmethod
    def looking_around(
        cls, cache: KVCache, positions: Tensor, lengths: Sequence[int], *, first_row: int = 0
    ) -> CacheWindow:
        """Tokens that look at all ``lengths[row]`` tokens of their row, what is kept of the others being as it was.

        Args:
            cache: Holds the others from forwards before, unless ``positions`` has all of them.
            positions: int64 [b, s], any; a position beyond its row's length is padding, kept and looked at by nothing.
            lengths: Tokens of each row.
            first_row: Row of the cache that ``positions[0]`` belongs to.

        Raises:
            ValueError: they do not fit into the cache.
        """
        num_places = max(lengths)
        _check_fit(cache, first_row, len(lengths), max(num_places, int(positions.max()) + 1))
        positions = positions.to(cache.device)
        is_visible = None
        if min(lengths) < num_places:
            ends = torch.tensor(lengths, device=cache.device)
            is_visible = (torch.arange(num_places, device=cache.device) < ends[:, None])[:, None, None]
        return cls(cache, first_row, positions, num_places, is_visible, start=_common_start(positions))

    def layers(self) -> list[LayerCache]:
        """This window into each layer's memory."""
        return [LayerCache(self, kept) for kept in self.cache.kept]

    def memory(self) -> list[StepMemory]:
        """The same, with the views of all layers made at once: what each costs is Python's."""
        if self.start is None:
            return [StepMemory(None, (), layer) for layer in self.layers()]
        b, s = self.positions.shape
        rows = [kept.narrow(1, self.first_row, b) for kept in self.cache.whole]
        new = zip(*(kept.narrow(3, self.start, s).transpose(2, 3).unbind(0) for kept in rows), strict=True)
        seen = zip(*(kept.narrow(3, 0, self.num_places).unbind(0) for kept in rows), strict=True)
        return [StepMemory(*views) for views in zip(new, seen, self.layers(), strict=True)]


@dataclass(frozen=True)
class LayerCache:
    """What one layer sees of a window."""

    window: CacheWindow
    kept: tuple[Tensor, ...]

    def store(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Keep the forward's tokens.

        Args:
            new: [s, b, heads, width] for each tensor that the layer keeps.

        Returns:
            All that attention may look at, views [b, heads, num_places, width].
        """
        window = self.window
        b, s = window.positions.shape
        found = []
        for kept, values in zip(self.kept, new, strict=True):
            rows = kept[window.first_row : window.first_row + b]
            if window.start is not None:
                rows[:, :, window.start : window.start + s] = values.permute(1, 2, 0, 3)
            else:
                each = torch.arange(b, device=rows.device)[:, None]
                # Indices on both sides of a slice put their dimensions first: [b, s, heads, width].
                rows[each, :, window.positions] = values.transpose(0, 1)
            found.append(rows[:, :, : window.num_places])
        return tuple(found)


@dataclass(frozen=True)
class StepMemory:
    """What one layer sees of a window, in few operations (``models.decode_step``)."""

    new: tuple[Tensor, ...] | None
    """Places of the forward's tokens, [b, s, heads, width] of each tensor; unset: rows are at different positions."""
    seen: tuple[Tensor, ...]
    """All that attention may look at, [b, heads, num_places, width]."""
    layer: LayerCache

    def store(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Keep the forward's tokens, [b, s, heads, width] of each tensor; returns what attention may look at."""
        if self.new is None:
            return self.layer.store(*(values.transpose(0, 1) for values in new))
        for place, values in zip(self.new, new, strict=True):
            place.copy_(values)
        return self.seen


def attention_layers(model: Any, *, with_prediction: bool = False) -> list[Any]:
    """The attention modules of a language model in order, those of multi-token prediction last where asked for."""
    layers = list(model.decoder.layers)
    if with_prediction:
        layers += [layer.transformer_layer for layer in model.mtp.layers]
    return [layer.self_attention for layer in layers]


@contextmanager
def attached(layers: Sequence[Any], caches: Sequence[LayerCache]) -> Iterator[None]:
    """Inside, each attention layer works with its cache; megatron-core's layers hand none of ours down to them."""
    for layer, cache in zip(layers, caches, strict=False):
        layer.cache = cache
    try:
        yield
    finally:
        for layer in layers:
            layer.cache = None


def cached_states(model: Any, input_ids: Tensor, window: CacheWindow) -> Tensor:
    """Forward tokens [b, s] at the window's positions; what is kept of them goes to the cache.

    Returns:
        States after the final norm, [s, b, h], for ``model.logits``.

    Collective: tensor-parallel group.
    """
    with attached(attention_layers(model), window.layers()):
        return model.decoder(
            hidden_states=model.embedding(input_ids=input_ids, position_ids=None),
            attention_mask=None,
            rotary_pos_emb=model.rotary_table(window.cache.places, window.positions),
        )


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return huge_pages.empty(shape, dtype).zero_()
    return torch.zeros(shape, dtype=dtype, device=device)


def _common_start(positions: Tensor) -> int | None:
    start = int(positions[0, 0])
    expected = torch.arange(start, start + positions.size(1), device=positions.device)
    return start if bool((positions == expected).all()) else None


def _check_fit(cache: KVCache, first_row: int, rows: int, places: int) -> None:
    if first_row + rows > cache.rows or places > cache.places:
        raise ValueError(
            f"{rows} rows from row {first_row} on, of up to {places} tokens: the cache has {cache.rows} rows of "
            f"{cache.places} tokens"
        )

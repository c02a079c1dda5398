"""How several published tensors make one of ours, and back; each pair is a permutation of values, exact to the bit.

Imports torch only where a tensor is at hand: shapes and configurations are compared without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Transform(Protocol):
    """A two-way mapping between published tensors and one of ours."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Ours from theirs."""

    def split(self, whole: Tensor) -> list[Tensor]:
        """Theirs from ours; the inverse of :meth:`join`."""


@dataclass(frozen=True)
class Same:
    """One tensor, as it is."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Ours from theirs."""
        return parts[0]

    def split(self, whole: Tensor) -> list[Tensor]:
        """Theirs from ours."""
        return [whole]


@dataclass(frozen=True)
class Stacked:
    """Matrices one above the other (SwiGLU's gate and up)."""

    rows: tuple[int, ...]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Ours from theirs."""
        from torch import cat

        return cat(list(parts))

    def split(self, whole: Tensor) -> list[Tensor]:
        """Theirs from ours."""
        return list(whole.split(list(self.rows)))


@dataclass(frozen=True)
class GroupedHeads:
    """Query, key and value rows; ours lie group by group: the group's queries, its key, its value."""

    groups: int
    queries_per_group: int
    head_size: int

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Ours from theirs; matrices or biases."""
        from torch import cat

        grouped = [part.unflatten(0, (self.groups, -1)) for part in parts]
        return cat(grouped, dim=1).flatten(0, 1)

    def split(self, whole: Tensor) -> list[Tensor]:
        """Theirs from ours."""
        sizes = [self.queries_per_group * self.head_size, self.head_size, self.head_size]
        return [part.flatten(0, 1) for part in whole.unflatten(0, (self.groups, -1)).split(sizes, dim=1)]


@dataclass(frozen=True)
class PaddedRows:
    """A vocabulary matrix; ours has rows of zeros below it, up to a multiple that every layout divides."""

    rows: int
    padded_rows: int

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Ours from theirs."""
        whole = parts[0].new_zeros((self.padded_rows, *parts[0].shape[1:]))
        whole[: self.rows] = parts[0]
        return whole

    def split(self, whole: Tensor) -> list[Tensor]:
        """Theirs from ours; what the padding holds is left out."""
        return [whole[: self.rows]]


@dataclass(frozen=True)
class InterleavedRotary:
    """Rows of ``heads`` heads, each with ``plain`` rows first and then ``rotary`` rows that are turned in pairs.

    Published: rows of a pair are neighbours (0, 1), (2, 3), ...; ours: (0, d/2), (1, d/2 + 1), ... .
    """

    heads: int
    plain: int
    rotary: int

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Ours from theirs."""
        return self._turn(parts[0], (self.rotary // 2, 2))

    def split(self, whole: Tensor) -> list[Tensor]:
        """Theirs from ours."""
        return [self._turn(whole, (2, self.rotary // 2))]

    def _turn(self, rows: Tensor, pairs: tuple[int, int]) -> Tensor:
        from torch import cat

        plain, rotary = rows.unflatten(0, (self.heads, -1)).split([self.plain, self.rotary], dim=1)
        turned = rotary.unflatten(1, pairs).transpose(1, 2).flatten(1, 2)
        return cat((plain, turned), dim=1).flatten(0, 1)

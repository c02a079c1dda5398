"""Which sample comes at which position of a run: shuffled per epoch, blended by weight, whatever the run's length.

**Shuffle.** Each epoch of each corpus is a keyed permutation of its samples: a balanced Feistel network on the smallest
even-bit square that holds them, with cycle walking back into range (Black and Rogaway, "Ciphers with arbitrary finite
domains", 2002, section 4). It needs no memory and gives any position at once, so a resumed run starts where it was.

**Blend.** Positions repeat a pattern of fixed length in which each corpus has its share of places, evenly spread. So
the first n samples are the same however many are asked for later.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6
BLEND_PATTERN_SAMPLES = 1 << 16
"""Length of the blend's pattern; weights are kept to one part in so many."""

_U64 = np.uint64


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser: every input bit reaches every output bit."""
    values = (values ^ (values >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> _U64(27))) * _U64(0x94D049BB133111EB)
    return values ^ (values >> _U64(31))


def _key(*parts: int | NDArray[np.int64]) -> NDArray[np.uint64]:
    state = np.zeros(1, dtype=np.uint64)
    for part in parts:
        word = np.asarray(part, dtype=np.int64).astype(np.uint64)
        state = _mix((state ^ word) + _U64(0x9E3779B97F4A7C15))
    return state


def permute(
    positions: NDArray[np.int64], size: int, *, seed: int, epochs: NDArray[np.int64], stream: int
) -> NDArray[np.int64]:
    """Shuffled index of each position; for one epoch a bijection of ``range(size)``.

    Args:
        positions: In ``range(size)``, [n].
        size: Samples of the corpus.
        seed: The run's seed.
        epochs: Epoch of each position, [n].
        stream: Tells corpora of one run apart.
    """
    with np.errstate(over="ignore"):
        half = _U64(max(1, ((size - 1).bit_length() + 1) // 2))
        mask = (_U64(1) << half) - _U64(1)
        keys = _key(seed, stream, epochs) + np.zeros(len(positions), dtype=np.uint64)
        values = positions.astype(np.uint64)
        todo = np.arange(len(values))
        while len(todo):
            left, right = values[todo] >> half, values[todo] & mask
            for number in range(_ROUNDS):
                word = (right + _U64(number + 1) * _U64(0x9E3779B97F4A7C15)) ^ keys[todo]
                left, right = right, left ^ (_mix(word) & mask)
            values[todo] = (left << half) | right
            todo = todo[values[todo] >= _U64(size)]
    return values.astype(np.int64)


class Blend:
    """Maps a position of the run to a corpus and a position within it.

    Args:
        weights: Relative weight of each corpus, positive.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        shares = np.asarray(weights, dtype=np.float64)
        exact = shares / shares.sum() * (BLEND_PATTERN_SAMPLES if len(shares) > 1 else 1)
        counts = np.maximum(np.floor(exact).astype(np.int64), 1)
        # What rounding left over goes to the largest remainders (to be taken back: from the largest counts).
        missing = round(exact.sum()) - int(counts.sum())
        if missing > 0:
            counts[np.argsort(-(exact - np.floor(exact)), kind="stable")[:missing]] += 1
        for _ in range(-missing):
            counts[np.argmax(counts)] -= 1
        places = [(np.arange(count) + 0.5) / count for count in counts]
        owners = np.concatenate([np.full(count, number, dtype=np.int64) for number, count in enumerate(counts)])
        self._pattern = owners[np.argsort(np.concatenate(places), kind="stable")]
        self._ranks = np.empty(len(self._pattern), dtype=np.int64)
        for number, count in enumerate(counts):
            self._ranks[self._pattern == number] = np.arange(count)
        self._counts = counts

    def locate(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Corpus number and position within that corpus of each position, both [n]."""
        rounds, places = np.divmod(positions, len(self._pattern))
        corpora = self._pattern[places]
        return corpora, rounds * self._counts[corpora] + self._ranks[places]

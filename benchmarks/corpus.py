"""A corpus of random tokens, for measurements in which the text does not matter."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gptoughts.data.indexed import IndexedWriter


def random_corpus(prefix: Path, *, num_tokens: int, vocab_size: int) -> Path:
    """Write ``PREFIX.bin`` and ``PREFIX.idx`` with one document of uniform tokens; returns the prefix."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    tokens = np.random.default_rng(0).integers(0, vocab_size, num_tokens).astype(np.uint16)
    writer = IndexedWriter(str(prefix), np.dtype(np.uint16))
    writer.add(tokens, np.array([num_tokens], dtype=np.int32))
    writer.finish()
    return prefix

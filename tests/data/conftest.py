"""A small tokenizer and corpora made with it, shared by the data tests."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gptoughts.data import train_tokenizer
from gptoughts.data.files import write_json
from gptoughts.data.indexed import IndexedWriter, bin_path, index_path, sidecar_path

VOCAB_SIZE = 512
TRAINING_TEXT = Path(sysconfig.get_path("stdlib")) / "email"


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    words = ["--input", str(TRAINING_TEXT), "--suffix", ".py", "--vocab_size", str(VOCAB_SIZE), "--output", str(folder)]
    status = train_tokenizer.main(words)
    assert status == 0
    return folder


MakeCorpus = Callable[..., str]


@pytest.fixture
def make_corpus(tmp_path: Path) -> MakeCorpus:
    """Write a corpus of random tokens."""

    def make(name: str = "corpus", *, lengths: list[int], vocab_size: int = 1000, sidecar: dict | None = None) -> str:
        prefix = str(tmp_path / name)
        generator = np.random.default_rng(len(lengths))
        writer = IndexedWriter(prefix, np.dtype(np.uint16))
        for length in lengths:
            tokens = generator.integers(0, vocab_size, length).astype(np.uint16)
            writer.add(tokens, np.array([length], dtype=np.int32))
        writer.finish()
        if sidecar is not None:
            sizes = {
                "bin_bytes": Path(bin_path(prefix)).stat().st_size,
                "idx_bytes": Path(index_path(prefix)).stat().st_size,
            }
            write_json(sidecar_path(prefix), sizes | sidecar)
        return prefix

    return make

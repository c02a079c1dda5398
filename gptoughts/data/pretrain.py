"""Samples for pretraining: megatron-core's GPTDataset over each corpus, under our order of samples (``data.order``).

A corpus is its documents in an order shuffled by the seed, end to end, cut every ``seq_length`` tokens. megatron-core
would build this for as many epochs as a run needs and shuffle them together, so that a longer run has another order
from its first step on. Here it is built for one epoch, and every epoch shuffles the cuts anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import numpy as np
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split
from numpy.typing import NDArray

from gptoughts.data.files import write_atomically
from gptoughts.data.indexed import bin_path, index_path
from gptoughts.data.order import Blend, permute
from gptoughts.errors import DataError

_CACHE_VERSION = 1
_VALIDATION_SEED = 0
"""Validation has one order, whatever the run's seed: curves of different runs are compared on the same samples."""


def build_sample_index(
    lengths: NDArray[np.int32], document_index: NDArray[np.int32], *, seq_length: int, num_samples: int
) -> NDArray[Any]:
    """Where each sample begins: position in document_index and token within that document, [num_samples + 1, 2].

    The same table as megatron-core's compiled ``helpers.build_sample_idx`` (a test compares them), which is missing
    where its wheel was not built for this platform and would then be compiled by ``make`` in the middle of a run.
    """
    ends = lengths[document_index].astype(np.int64).cumsum()
    starts = np.arange(num_samples + 1, dtype=np.int64) * seq_length
    documents = np.searchsorted(ends, starts, side="right")
    offsets = starts - np.where(documents > 0, ends[documents - 1], 0)
    is_small = max(len(document_index), int(lengths.max())) <= np.iinfo(np.int32).max
    return np.stack([documents, offsets], axis=1).astype(np.int32 if is_small else np.int64)


class CorpusSamples(GPTDataset):
    """One epoch of one corpus; :meth:`read_tokens` gives samples of any length beyond ``seq_length``."""

    def _build_document_sample_shuffle_indices(self) -> tuple[NDArray[Any], NDArray[Any], range]:
        """Load or build the tables.

        Replaces megatron-core's (``gpt_dataset.py:346``, 0.16.1), whose cache is written in place by global rank 0
        alone: an interrupted write leaves a torn file that every later run trusts, and other hosts may find none.
        """
        assert self.config.path_to_cache is not None
        lengths = self.dataset.sequence_lengths
        num_samples = (self._get_num_tokens_per_epoch() - 1) // self.config.sequence_length

        def build() -> dict[str, NDArray[Any]]:
            documents = np.array(self.indices, dtype=np.int32)
            if self.index_split is Split.train:
                np.random.RandomState(self.config.random_seed).shuffle(documents)
            samples = build_sample_index(
                lengths, documents, seq_length=self.config.sequence_length, num_samples=num_samples
            )
            return {"documents": documents, "samples": samples}

        tables = _cached_tables(Path(self.config.path_to_cache), _cache_key(self), build)
        # The order of samples is ours: what megatron-core would look up here stays as it is.
        return tables["documents"], tables["samples"], range(num_samples)

    def read_tokens(self, index: int, num_tokens: int) -> NDArray[np.int64]:
        """Tokens from the start of a sample on, over as many documents as it takes, [num_tokens].

        The last sample of the corpus goes on with its first document where it asks for more than there is.
        """
        place, offset = (int(value) for value in self.sample_index[index])
        tokens = np.empty(num_tokens, dtype=np.int64)
        filled = 0
        while filled < num_tokens:
            document = self.document_index[place % len(self.document_index)]
            length = min(int(self.dataset.sequence_lengths[document]) - offset, num_tokens - filled)
            if length > 0:
                tokens[filled : filled + length] = self.dataset.get(int(document), offset=offset, length=length)
                filled += length
            place, offset = place + 1, 0
        return tokens


def _cache_key(samples: CorpusSamples) -> str:
    prefix = samples.dataset.path_prefix
    stats = [os.stat(path(prefix)) for path in (index_path, bin_path)]
    identity = (
        _CACHE_VERSION,
        os.path.abspath(prefix),
        [(stat.st_size, stat.st_mtime_ns) for stat in stats],
        samples.config.sequence_length,
        samples.config.random_seed,
        samples.index_split.name,
    )
    return hashlib.blake2b(repr(identity).encode(), digest_size=12).hexdigest()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process of this file system builds while the others wait; without lock support each builds for itself."""
    with open(path, "ab") as stream:
        with contextlib.suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _cached_tables(folder: Path, key: str, build: Any) -> dict[str, NDArray[Any]]:
    """Map the tables from the cache, building them first where they are not there; no collective, files are atomic.

    A folder that cannot be written costs every process its own copy in memory, nothing else.
    """
    names = ("documents", "samples")
    paths = {name: folder / f"{key}-{name}.npy" for name in names}
    try:
        if not all(path.is_file() for path in paths.values()):
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder / f"{key}.lock"):
                if not all(path.is_file() for path in paths.values()):
                    for name, table in build().items():
                        write_atomically(paths[name], _saver(table), unique=True)
        return {name: np.load(path, mmap_mode="r") for name, path in paths.items()}
    except OSError:
        return build()


def _saver(table: NDArray[Any]) -> Any:
    def save(stream: IO[bytes]) -> None:
        np.save(stream, table)

    return save


def _open_corpus(prefix: str, *, seq_length: int, seed: int, split: Split, cache_dir: str | None) -> CorpusSamples:
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend=([prefix], None),
        split="1",
        path_to_cache=cache_dir or os.path.join(os.path.dirname(os.path.abspath(prefix)), "index_cache"),
        # Only asked for its size and its special ids, which matter to masks and padding that are not used here.
        tokenizer=SimpleNamespace(vocab_size=None, unique_identifiers={}, pad=-1, eod=-2),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    dataset = IndexedDataset(prefix, multimodal=False, mmap=True)
    num_tokens = int(dataset.sequence_lengths.sum(dtype=np.int64))
    if num_tokens < seq_length + 1:
        raise DataError(f"corpus {prefix!r}: {num_tokens} tokens are fewer than one sample of {seq_length + 1}")
    documents = np.arange(len(dataset.sequence_lengths), dtype=np.int32)
    return CorpusSamples(dataset, prefix, documents, None, split, config)


class Samples:
    """The endless sequence of training samples: sample i depends on corpora, sequence length, seed and i alone."""

    def __init__(
        self,
        prefixes: Sequence[tuple[float, str]],
        *,
        seq_length: int,
        num_extra_tokens: int,
        seed: int,
        cache_dir: str | None = None,
    ) -> None:
        self.prefixes = [prefix for _, prefix in prefixes]
        self.num_tokens = seq_length + num_extra_tokens
        self._seed = seed
        self._corpora = [
            _open_corpus(
                prefix, seq_length=seq_length, seed=(seed + number) % (1 << 32), split=Split.train, cache_dir=cache_dir
            )
            for number, prefix in enumerate(self.prefixes)
        ]
        self._blend = Blend([weight for weight, _ in prefixes])

    @property
    def num_samples_per_epoch(self) -> list[int]:
        """Samples in one pass over each corpus."""
        return [len(corpus) for corpus in self._corpora]

    def locate(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Corpus number, and sample number within that corpus, of each position of the run, both [n]."""
        numbers, positions = self._blend.locate(np.asarray(indices, dtype=np.int64))
        rows = np.empty_like(positions)
        for number in np.unique(numbers):
            chosen = numbers == number
            size = len(self._corpora[number])
            epochs, places = np.divmod(positions[chosen], size)
            rows[chosen] = permute(places, size, seed=self._seed, epochs=epochs, stream=int(number))
        return numbers, rows

    def read(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of the samples at these positions of the run, [n, seq_length + num_extra_tokens]."""
        numbers, rows = self.locate(indices)
        tokens = np.empty((len(rows), self.num_tokens), dtype=np.int64)
        for line, (number, row) in enumerate(zip(numbers, rows, strict=True)):
            tokens[line] = self._corpora[number].read_tokens(int(row), self.num_tokens)
        return tokens

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        """Tokens of sample ``index`` ≥ 0, [seq_length + num_extra_tokens]."""
        return self.read(np.array([index]))[0]

    def prefix_of(self, index: int) -> str:
        """The corpus that a sample comes from, for messages."""
        return self.prefixes[int(self.locate(np.array([index]))[0][0])]


class ValidationSamples(Samples):
    """Every sample of the validation corpora once, in one order that depends on no seed.

    The order is a fixed shuffle, so that the first n samples stand for the whole of it, not for its first documents.
    """

    def __init__(
        self, prefixes: Sequence[str], *, seq_length: int, num_extra_tokens: int, cache_dir: str | None = None
    ) -> None:
        self.prefixes = list(prefixes)
        self.num_tokens = seq_length + num_extra_tokens
        self._corpora = [
            _open_corpus(prefix, seq_length=seq_length, seed=_VALIDATION_SEED, split=Split.valid, cache_dir=cache_dir)
            for prefix in self.prefixes
        ]
        self._ends = np.cumsum([len(corpus) for corpus in self._corpora])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def locate(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        indices = np.asarray(indices, dtype=np.int64)
        if len(indices) and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"validation sample {indices.max()} of {len(self)}")
        places = permute(
            indices, len(self), seed=_VALIDATION_SEED, epochs=np.zeros(len(indices), dtype=np.int64), stream=0
        )
        numbers = np.searchsorted(self._ends, places, side="right")
        return numbers, places - np.where(numbers > 0, self._ends[numbers - 1], 0)


def build_samples(
    prefixes: Sequence[tuple[float, str]], *, seq_length: int, num_extra_tokens: int, seed: int, cache_dir: str | None
) -> Samples:
    """Open the training corpora.

    Args:
        prefixes: Weight and prefix of each.
        seq_length: Tokens per sample that go into the model; samples start so many tokens apart.
        num_extra_tokens: Further tokens per sample (1 for next-token prediction).
        seed: Orders documents and samples.
        cache_dir: Folder for index tables; None: ``index_cache`` beside each corpus.

    Raises:
        DataError: A corpus is shorter than one sample.

    Collective: none; processes that share a cache wait for each other by a file lock.
    """
    return Samples(prefixes, seq_length=seq_length, num_extra_tokens=num_extra_tokens, seed=seed, cache_dir=cache_dir)


def build_validation_samples(
    prefixes: Sequence[tuple[float, str]], *, seq_length: int, num_extra_tokens: int, cache_dir: str | None
) -> ValidationSamples:
    """Open the validation corpora (weights are not used: every sample is read once); arguments as for training."""
    return ValidationSamples(
        [prefix for _, prefix in prefixes],
        seq_length=seq_length,
        num_extra_tokens=num_extra_tokens,
        cache_dir=cache_dir,
    )

"""Batches of a step for one data-parallel rank, read ahead by a background thread.

Sample of microbatch ``m``, rank ``r``, row ``j`` of the step that starts at ``c`` consumed samples, with ``b`` samples
per microbatch and ``dp`` ranks: ``c + m * (dp * b) + r * b + j``. So a step takes the same samples for every ``dp``.
Where ranges of samples are left out (a recovery found them harmful), the step takes those with these places among the
samples from ``c`` on that are left.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from gptoughts.errors import DataError

_POLL_SECONDS = 0.2


class SampleSource(Protocol):
    """What a loader reads from (``data.pretrain.Samples``)."""

    def read(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of these samples, [n, s + extra]."""
        ...

    def prefix_of(self, index: int) -> str:
        """Where a sample comes from, for messages."""
        ...


@dataclass(frozen=True)
class Batch:
    """One microbatch of one rank."""

    tokens: torch.Tensor
    """int64, [b, s + extra]."""
    sample_indices: torch.Tensor
    """Position of each row in the run, int64, [b]."""


SampleRange = tuple[int, int]
"""First sample and the one after the last, positions in the run's order."""


def next_samples(start: int, count: int, skipped: Sequence[SampleRange]) -> NDArray[np.int64]:
    """The first ``count`` samples from ``start`` on that lie in none of the ranges (which may overlap), [count]."""
    found: list[NDArray[np.int64]] = []
    for first, stop in [*sorted(skipped), (np.iinfo(np.int64).max, 0)]:
        number = min(count, max(0, first - start))
        found.append(np.arange(start, start + number))
        count -= number
        start = max(start + number, stop)
        if count == 0:
            break
    return np.concatenate(found)


def as_ranges(samples: NDArray[np.int64]) -> list[SampleRange]:
    """Ascending samples as runs without gaps."""
    if not len(samples):
        return []
    breaks = np.flatnonzero(np.diff(samples) != 1) + 1
    return [(int(part[0]), int(part[-1]) + 1) for part in np.split(samples, breaks)]


class StepLoader:
    """Gives one step's microbatches after another; a context manager.

    Args:
        samples: What is read.
        micro_batch_size: Samples per microbatch, ``b``.
        num_microbatches: Microbatches per step.
        data_parallel_rank: This rank, ``r``.
        data_parallel_size: Ranks, ``dp``.
        consumed_samples: Where to begin, over all ranks.
        prefetch_steps: Steps that the thread reads ahead; 0: read when asked, without a thread.
        vocab_size: Token ids must be below it.
        pin_memory: Put batches where a GPU can copy from without waiting.
        skipped: Ranges of samples that no step takes.
    """

    def __init__(
        self,
        samples: SampleSource,
        *,
        micro_batch_size: int,
        num_microbatches: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        consumed_samples: int,
        prefetch_steps: int,
        vocab_size: int,
        pin_memory: bool = False,
        skipped: Sequence[SampleRange] = (),
    ) -> None:
        self._samples = samples
        self._micro_batch_size = micro_batch_size
        self._vocab_size = vocab_size
        self._pin_memory = pin_memory
        microbatch = data_parallel_size * micro_batch_size
        self._offsets = (
            np.arange(num_microbatches)[:, None] * microbatch
            + data_parallel_rank * micro_batch_size
            + np.arange(micro_batch_size)[None, :]
        ).reshape(-1)
        self._samples_per_step = num_microbatches * microbatch
        self.consumed_samples = consumed_samples
        """Position, over all ranks, behind the steps given out so far: where a resumed loader has to begin."""
        self.samples_of_step = np.empty(0, dtype=np.int64)
        """Samples of the step that was given out last, over all ranks, ascending."""
        self._prefetch_steps = prefetch_steps
        self._skipped = list(skipped)
        self._is_closed = False
        self._start_thread()

    def _start_thread(self) -> None:
        self._stop = threading.Event()
        self._ready: queue.Queue[list[Batch] | BaseException] = queue.Queue(maxsize=max(1, self._prefetch_steps))
        self._thread: threading.Thread | None = None
        if self._prefetch_steps > 0:
            # Its own event and queue: a thread that is slow to end must not fill its successor's.
            work = (self.consumed_samples, self._stop, self._ready)
            self._thread = threading.Thread(target=self._read_ahead, args=work, name="step-loader", daemon=True)
            self._thread.start()

    def seek(self, consumed_samples: int, skipped: Sequence[SampleRange]) -> None:
        """Go on from another position, and leave out these ranges from now on.

        Raises:
            RuntimeError: The loader is closed.
        """
        if self._is_closed:
            raise RuntimeError("this loader is closed")
        self.close()
        self._is_closed = False
        self.consumed_samples = consumed_samples
        self._skipped = list(skipped)
        self._start_thread()

    def _samples_from(self, start: int) -> NDArray[np.int64]:
        return next_samples(start, self._samples_per_step, self._skipped)

    def _read_step(self, samples_of_step: NDArray[np.int64]) -> list[Batch]:
        indices = samples_of_step[self._offsets]
        tokens = self._samples.read(indices)
        is_bad = (tokens >= self._vocab_size) | (tokens < 0)
        if is_bad.any():
            row, column = (int(value) for value in np.argwhere(is_bad)[0])
            raise DataError(
                f"corpus {self._samples.prefix_of(int(indices[row]))!r}: sample {indices[row]} holds token id "
                f"{tokens[row, column]}, but the vocabulary has {self._vocab_size} entries",
                is_rank_local=True,
            )
        whole, rows = torch.from_numpy(tokens), torch.from_numpy(indices)
        if self._pin_memory:
            whole = whole.pin_memory()
        pairs = zip(whole.split(self._micro_batch_size), rows.split(self._micro_batch_size), strict=True)
        return [Batch(tokens=part, sample_indices=numbers) for part, numbers in pairs]

    def _read_ahead(self, start: int, stop: threading.Event, ready: queue.Queue[Any]) -> None:
        def put(item: list[Batch] | BaseException) -> None:
            while not stop.is_set():
                try:
                    ready.put(item, timeout=_POLL_SECONDS)
                    return
                except queue.Full:
                    continue

        while not stop.is_set():
            samples_of_step = self._samples_from(start)
            try:
                batches = self._read_step(samples_of_step)
            except BaseException as error:  # whatever it is, it belongs to the caller's thread
                put(error)
                return
            put(batches)
            start = int(samples_of_step[-1]) + 1

    def next_step(self) -> list[Batch]:
        """Microbatches of the next step, in order.

        Raises:
            DataError: A token id beyond the vocabulary.
            OSError: The corpus can no longer be read.
            RuntimeError: The loader is closed.
        """
        if self._is_closed:
            raise RuntimeError("this loader is closed")
        samples_of_step = self._samples_from(self.consumed_samples)
        try:
            batches = self._read_step(samples_of_step) if self._thread is None else self._ready.get()
            if isinstance(batches, BaseException):
                raise batches
        except BaseException:
            self.close()
            raise
        self.samples_of_step = samples_of_step
        self.consumed_samples = int(samples_of_step[-1]) + 1
        return batches

    def close(self) -> None:
        """Stop the thread; safe to call twice."""
        self._is_closed = True
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=10.0)

    def __enter__(self) -> StepLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

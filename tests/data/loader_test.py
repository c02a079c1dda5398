"""Steps of batches: the same samples for every layout, errors where they belong, nothing left running."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from gptoughts.data.loader import StepLoader, as_ranges, next_samples
from gptoughts.data.pretrain import build_samples
from gptoughts.errors import DataError
from tests.data.conftest import MakeCorpus


class _Counted:
    """Sample i is [i, i, i]."""

    def read(self, indices: np.ndarray) -> np.ndarray:
        return np.repeat(indices[:, None], 3, axis=1).astype(np.int64)

    def prefix_of(self, index: int) -> str:
        return f"corpus_{index}"


class _Failing(_Counted):
    def read(self, indices: np.ndarray) -> np.ndarray:
        if indices.max() >= 8:
            raise OSError("disk is gone")
        return super().read(indices)


def _loader(samples: object = None, **changes: object) -> StepLoader:
    settings = {
        "micro_batch_size": 2,
        "num_microbatches": 2,
        "data_parallel_rank": 0,
        "data_parallel_size": 1,
        "consumed_samples": 0,
        "prefetch_steps": 2,
        "vocab_size": 10**6,
    }
    return StepLoader(samples or _Counted(), **(settings | changes))  # type: ignore[arg-type]


def test_position_of_every_sample() -> None:
    with _loader(data_parallel_rank=1, data_parallel_size=3, consumed_samples=24) as loader:
        first, second = loader.next_step()
        assert first.sample_indices.tolist() == [26, 27]
        assert second.sample_indices.tolist() == [32, 33]
        assert first.tokens.tolist() == [[26] * 3, [27] * 3]
        assert first.tokens.dtype == first.sample_indices.dtype == torch.int64
        assert loader.consumed_samples == 36
        assert loader.next_step()[0].sample_indices.tolist() == [38, 39]


@pytest.mark.parametrize(("size", "micro", "accumulation"), [(1, 8, 1), (1, 2, 4), (2, 4, 1), (2, 1, 4), (4, 2, 1)])
def test_a_step_takes_the_same_samples_for_every_layout(size: int, micro: int, accumulation: int) -> None:
    layout = {"micro_batch_size": micro, "num_microbatches": accumulation, "data_parallel_size": size}
    for step in range(3):
        taken: list[int] = []
        for rank in range(size):
            with _loader(**layout, data_parallel_rank=rank, consumed_samples=8 * step) as loader:
                taken += [int(i) for batch in loader.next_step() for i in batch.sample_indices]
        assert sorted(taken) == list(range(8 * step, 8 * step + 8))


@pytest.mark.parametrize("prefetch_steps", [0, 1, 3])
def test_resumed_loader_goes_on(make_corpus: MakeCorpus, prefetch_steps: int) -> None:
    prefix = make_corpus(lengths=[200, 300, 30])

    def loader(consumed_samples: int) -> StepLoader:
        samples = build_samples([(1.0, prefix)], seq_length=8, num_extra_tokens=1, seed=1, cache_dir=None)
        return _loader(samples, consumed_samples=consumed_samples, prefetch_steps=prefetch_steps)

    with loader(0) as whole:
        steps = [whole.next_step() for _ in range(40)]  # over two epochs
    with loader(4 * 25) as resumed:
        for expected in steps[25:]:
            for ours, theirs in zip(resumed.next_step(), expected, strict=True):
                torch.testing.assert_close(ours.tokens, theirs.tokens, rtol=0, atol=0)


@pytest.mark.parametrize("prefetch_steps", [0, 2])
def test_errors_reach_the_caller(prefetch_steps: int) -> None:
    loader = _loader(_Failing(), prefetch_steps=prefetch_steps)
    loader.next_step()
    loader.next_step()
    with pytest.raises(OSError, match="disk is gone"):
        loader.next_step()
    with pytest.raises(RuntimeError, match="closed"):
        loader.next_step()
    assert "step-loader" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("prefetch_steps", [0, 2])
def test_token_beyond_the_vocabulary(prefetch_steps: int) -> None:
    with _loader(vocab_size=6, prefetch_steps=prefetch_steps) as loader:
        loader.next_step()
        with pytest.raises(DataError, match=r"'corpus_6': sample 6 holds token id 6, .* has 6 entries") as caught:
            loader.next_step()
        assert caught.value.is_rank_local


def test_close_with_a_full_queue_ends_the_thread() -> None:
    loader = _loader(prefetch_steps=1)
    while not loader._ready.full():
        time.sleep(0.01)
    loader.close()
    loader.close()
    assert "step-loader" not in [thread.name for thread in threading.enumerate()]


def test_reading_costs_little(make_corpus: MakeCorpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step reads its own tokens, once, where they lie (``benchmarks.train_step`` takes the time)."""
    prefix = make_corpus(lengths=[700] * 2000)
    samples = build_samples([(1.0, prefix)], seq_length=512, num_extra_tokens=1, seed=1, cache_dir=None)
    lengths: list[int] = []
    read = IndexedDataset.get

    def counted(self: IndexedDataset, idx: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        assert length is not None, "a whole document"
        lengths.append(length)
        return read(self, idx, offset, length)

    monkeypatch.setattr(IndexedDataset, "get", counted)
    with _loader(samples, micro_batch_size=8, num_microbatches=1, prefetch_steps=0) as loader:
        for _ in range(50):
            lengths.clear()
            loader.next_step()
            assert sum(lengths) == 8 * 513
            assert len(lengths) <= 8 * 2, "513 tokens lie in two documents of 700 at most"


def test_left_out_ranges_are_stepped_over_in_every_layout() -> None:
    skipped = [(12, 16), (4, 6), (5, 8), (21, 22)]
    expected = [0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 20, 22, 23, 24]
    for size, micro, accumulation in ((1, 4, 2), (2, 2, 2), (4, 1, 2)):
        steps: list[list[int]] = [[], []]
        for rank in range(size):
            layout = {"data_parallel_size": size, "micro_batch_size": micro, "num_microbatches": accumulation}
            with _loader(**layout, data_parallel_rank=rank, skipped=skipped) as loader:
                for step in steps:
                    step += [i for batch in loader.next_step() for i in batch.sample_indices.tolist()]
                assert loader.consumed_samples == 25
                assert loader.samples_of_step.tolist() == expected[8:]
        assert [sorted(step) for step in steps] == [expected[:8], expected[8:]]


@pytest.mark.parametrize("prefetch_steps", [0, 2])
def test_seeking_back_leaves_ranges_out_from_then_on(prefetch_steps: int) -> None:
    with _loader(prefetch_steps=prefetch_steps) as loader:
        for _ in range(3):
            loader.next_step()
        loader.seek(4, [(8, 12)])
        found = [i for _ in range(2) for batch in loader.next_step() for i in batch.sample_indices.tolist()]
        assert found == [4, 5, 6, 7, 12, 13, 14, 15]
        loader.close()
        with pytest.raises(RuntimeError, match="closed"):
            loader.seek(0, [])


def test_samples_as_ranges() -> None:
    assert as_ranges(next_samples(2, 6, [(4, 9)])) == [(2, 4), (9, 13)]
    assert as_ranges(np.empty(0, dtype=np.int64)) == []

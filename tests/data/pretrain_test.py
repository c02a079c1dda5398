"""Pretraining samples: megatron-core's cuts, our order, safe caches."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from megatron.core.datasets import helpers
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from gptoughts.data.pretrain import Samples, ValidationSamples, build_sample_index, build_samples
from gptoughts.errors import DataError
from tests.data.conftest import MakeCorpus

LENGTHS = [13, 1, 40, 7, 8, 100, 3, 64, 0, 29]


def _samples(prefix: str, **changes: object) -> Samples:
    settings = {"seq_length": 8, "num_extra_tokens": 1, "seed": 5, "cache_dir": None} | changes
    return build_samples([(1.0, prefix)], **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("seq_length", [1, 7, 8, 63])
def test_sample_index_is_megatron_cores(seq_length: int) -> None:
    lengths = np.array(LENGTHS, dtype=np.int32)
    order = np.random.default_rng(0).permutation(len(lengths)).astype(np.int32)
    total = int(lengths.sum())
    theirs = helpers.build_sample_idx(lengths, order, seq_length, 1, total, True, True)
    ours = build_sample_index(lengths, order, seq_length=seq_length, num_samples=(total - 1) // seq_length)
    assert ours.shape == theirs.shape

    def starts(table: np.ndarray) -> list[int]:
        ends = np.concatenate([[0], lengths[order].cumsum()])
        return [int(ends[place] + offset) for place, offset in table]

    # The same token positions; where a document is empty, megatron-core may name the one before.
    assert starts(ours) == starts(theirs)


def test_one_epoch_is_megatron_cores_dataset(make_corpus: MakeCorpus, tmp_path: Path) -> None:
    prefix = make_corpus(lengths=LENGTHS)
    config = GPTDatasetConfig(
        random_seed=5,
        sequence_length=8,
        blend=([prefix], None),
        split="1",
        path_to_cache=str(tmp_path / "theirs"),
        tokenizer=SimpleNamespace(vocab_size=None, unique_identifiers={}, pad=-1, eod=-2),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    dataset = IndexedDataset(prefix)
    theirs = GPTDataset(dataset, prefix, np.arange(len(LENGTHS), dtype=np.int32), None, Split.train, config)
    ours = _samples(prefix)
    size = len(theirs)
    assert ours.num_samples_per_epoch == [size]
    expected = [tuple(row["tokens"].tolist() + row["labels"].tolist()[-1:]) for row in (theirs[i] for i in range(size))]
    found = [tuple(ours[i].tolist()) for i in range(size)]
    assert found != expected  # our order
    assert sorted(found) == sorted(expected)
    second = [tuple(ours[size + i].tolist()) for i in range(size)]
    assert second != found
    assert sorted(second) == sorted(expected)


def test_extra_tokens_go_on_in_the_text(make_corpus: MakeCorpus) -> None:
    prefix = make_corpus(lengths=LENGTHS)
    one, three, none = (_samples(prefix, num_extra_tokens=extra) for extra in (1, 3, 0))
    for index in range(one.num_samples_per_epoch[0]):
        assert three[index].shape == (11,)
        np.testing.assert_array_equal(three[index][:9], one[index])
        np.testing.assert_array_equal(none[index], one[index][:8])


def test_blended_samples_know_their_corpus(make_corpus: MakeCorpus) -> None:
    small, large = make_corpus("a", lengths=[100] * 3), make_corpus("b", lengths=[90] * 9)
    samples = build_samples([(1.0, small), (3.0, large)], seq_length=8, num_extra_tokens=1, seed=0, cache_dir=None)
    owners = [samples.prefix_of(i) for i in range(400)]
    assert owners.count(small) == 100
    ours = {
        tuple(row.tolist())
        for row in (Samples([(1.0, small)], seq_length=8, num_extra_tokens=1, seed=0).read(np.arange(37)))
    }
    assert all((tuple(samples[i].tolist()) in ours) == (owners[i] == small) for i in range(200))


def test_order_depends_on_the_seed_only(make_corpus: MakeCorpus) -> None:
    prefix = make_corpus(lengths=LENGTHS)
    indices = np.arange(100)
    np.testing.assert_array_equal(_samples(prefix).read(indices), _samples(prefix).read(indices))
    assert (_samples(prefix).read(indices) != _samples(prefix, seed=6).read(indices)).any()


def test_validation_reads_every_sample_once(make_corpus: MakeCorpus) -> None:
    prefixes = [make_corpus("a", lengths=[50, 31]), make_corpus("b", lengths=[77])]
    samples = ValidationSamples(prefixes, seq_length=8, num_extra_tokens=1)
    assert len(samples) == 80 // 8 + 76 // 8
    numbers, rows = samples.locate(np.arange(len(samples)))
    assert sorted(zip(numbers.tolist(), rows.tolist(), strict=True)) == [(0, i) for i in range(10)] + [
        (1, i) for i in range(9)
    ]
    corpora = [IndexedDataset(prefix) for prefix in prefixes]
    texts = [np.concatenate(list(corpus)) for corpus in corpora]
    for index, (number, row) in enumerate(zip(numbers, rows, strict=True)):
        np.testing.assert_array_equal(samples[index], texts[number][row * 8 : row * 8 + 9])
    with pytest.raises(IndexError, match="19 of 19"):
        samples[len(samples)]


def test_too_short_corpus(make_corpus: MakeCorpus) -> None:
    with pytest.raises(DataError, match="8 tokens are fewer than one sample of 9"):
        _samples(make_corpus(lengths=[5, 3]))


def test_cache_notices_a_replaced_corpus(make_corpus: MakeCorpus, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    first = _samples(make_corpus(lengths=LENGTHS), cache_dir=cache)
    files = len(os.listdir(cache))
    _samples(make_corpus(lengths=LENGTHS), cache_dir=cache)  # written anew: another modification time
    assert len(os.listdir(cache)) == 2 * files
    again = _samples(make_corpus(lengths=[60, 60]), cache_dir=cache)
    assert again.num_samples_per_epoch != first.num_samples_per_epoch
    assert not [name for name in os.listdir(cache) if name.endswith(".partial")]


def test_cache_folder_that_cannot_be_written(make_corpus: MakeCorpus, tmp_path: Path) -> None:
    prefix = make_corpus(lengths=LENGTHS)
    (tmp_path / "file").write_text("")
    samples = _samples(prefix, cache_dir=str(tmp_path / "file" / "cache"))
    np.testing.assert_array_equal(samples[3], _samples(prefix)[3])


def _read_in_process(prefix: str, cache: str, queue: multiprocessing.Queue) -> None:
    queue.put(_samples(prefix, cache_dir=cache).read(np.arange(50)).tolist())


def test_processes_share_one_cache(make_corpus: MakeCorpus, tmp_path: Path) -> None:
    prefix, cache = make_corpus(lengths=LENGTHS), str(tmp_path / "cache")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_read_in_process, args=(prefix, cache, queue)) for _ in range(4)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert all(result == results[0] for result in results)
    assert len(os.listdir(cache)) == 3

"""Indexed files: megatron-core reads ours, we read theirs, damage is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from gptoughts.data.indexed import IndexedWriter, read_index, scan_max_token_id
from gptoughts.errors import DataError
from tests.data.conftest import MakeCorpus


def test_megatron_core_reads_what_we_write(tmp_path: Path) -> None:
    prefix = str(tmp_path / "c")
    documents = [np.arange(5, dtype=np.uint16), np.arange(100, 107, dtype=np.uint16), np.array([9], dtype=np.uint16)]
    writer = IndexedWriter(prefix, np.dtype(np.uint16))
    writer.add(np.concatenate(documents[:2]), np.array([5, 7], dtype=np.int32))
    writer.add(documents[2], np.array([1], dtype=np.int32))
    assert not (tmp_path / "c.bin").exists()
    writer.finish()
    theirs = IndexedDataset(prefix)
    assert len(theirs) == 3
    for ours, read in zip(documents, theirs, strict=True):
        np.testing.assert_array_equal(ours, read)
    assert theirs.document_indices.tolist() == [0, 1, 2, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.bin", "c.idx"]


def test_we_read_what_megatron_core_writes(tmp_path: Path) -> None:
    prefix = str(tmp_path / "c")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    builder.add_document(torch.arange(6), [4, 2])
    builder.add_document(torch.tensor([70000]), [1])
    builder.finalize(f"{prefix}.idx")
    index = read_index(prefix)
    assert (index.num_tokens, index.num_documents, index.dtype) == (7, 2, np.int32)
    assert index.lengths.tolist() == [4, 2, 1]
    assert scan_max_token_id(index) == 70000


def test_pieces_of_one_document_become_one(tmp_path: Path) -> None:
    prefix = str(tmp_path / "c")
    writer = IndexedWriter(prefix, np.dtype(np.uint16))
    for length, is_continued in ((3, False), (2, True), (0, True), (4, False)):
        writer.add(np.zeros(length, np.uint16), np.array([length], np.int32), is_continued=is_continued)
    writer.finish()
    assert read_index(prefix).lengths.tolist() == [5, 4]


def test_writer_goes_on_where_it_was_synced(tmp_path: Path) -> None:
    prefix, dtype = str(tmp_path / "c"), np.dtype(np.uint16)
    first = IndexedWriter(prefix, dtype)
    first.add(np.arange(5, dtype=np.uint16), np.array([2, 3], np.int32))
    first.sync()
    first.add(np.arange(50, 60, dtype=np.uint16), np.array([10], np.int32))  # lost with the interruption
    first.close()
    assert IndexedWriter.can_resume(prefix, dtype, num_tokens=5, num_documents=2)
    assert not IndexedWriter.can_resume(prefix, dtype, num_tokens=500, num_documents=2)
    second = IndexedWriter(prefix, dtype, num_tokens=5, num_documents=2)
    second.add(np.array([7], np.uint16), np.array([1], np.int32))
    second.finish()
    assert [row.tolist() for row in IndexedDataset(prefix)] == [[0, 1], [2, 3, 4], [7]]


def test_two_writers_of_one_corpus_are_refused(tmp_path: Path) -> None:
    writer = IndexedWriter(str(tmp_path / "c"), np.dtype(np.uint16))
    with pytest.raises(DataError, match="another process is writing"):
        IndexedWriter(str(tmp_path / "c"), np.dtype(np.uint16))
    writer.close()


def _truncate(path: str, size: int) -> None:
    with open(path, "r+b") as stream:
        stream.truncate(size)


def _patch(path: str, offset: int, content: bytes) -> None:
    with open(path, "r+b") as stream:
        stream.seek(offset)
        stream.write(content)


DAMAGES = {
    "truncated .bin": (lambda p: _truncate(f"{p}.bin", 10), r"c\.bin: truncated: 10 bytes"),
    "grown .bin": (lambda p: _patch(f"{p}.bin", 24, b"\0\0"), r"c\.idx: does not fit its \.bin"),
    "no magic": (lambda p: _patch(f"{p}.idx", 0, b"XX"), "does not begin with"),
    "empty .idx": (lambda p: _truncate(f"{p}.idx", 0), "does not begin with"),
    "version": (lambda p: _patch(f"{p}.idx", 9, b"\7"), "version 7"),
    "float type": (lambda p: _patch(f"{p}.idx", 17, b"\6"), "type code 6"),
    "truncated .idx": (lambda p: _truncate(f"{p}.idx", 40), "its header asks for"),
    "lengths": (lambda p: _patch(f"{p}.idx", 34, b"\1"), "contradict each other"),
    "negative length": (lambda p: _patch(f"{p}.idx", 34, b"\xff\xff\xff\xff"), "contradict each other"),
    "bounds": (lambda p: _patch(f"{p}.idx", -8 + 34 + 12 * 2 + 8 * 3, b"\9"), "document bounds"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(make_corpus: MakeCorpus, damage: str) -> None:
    prefix = make_corpus("c", lengths=[5, 7])
    read_index(prefix)
    spoil, message = DAMAGES[damage]
    spoil(prefix)
    with pytest.raises(DataError, match=message):
        read_index(prefix)


def test_missing_files_are_named(make_corpus: MakeCorpus, tmp_path: Path) -> None:
    prefix = make_corpus("c", lengths=[5])
    Path(f"{prefix}.bin").unlink()
    with pytest.raises(DataError, match=r"no such file: .*c\.bin "):
        read_index(prefix)

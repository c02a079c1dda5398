"""Fragments written by one layout, read by another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from gptoughts.checkpoint import layout
from gptoughts.checkpoint.portable import CheckpointReader, ShardContent
from gptoughts.engine.interface import StateFragment
from gptoughts.errors import CheckpointError
from gptoughts.parallel import partition

TENSORS = {
    "matrix": (torch.arange(48.0).view(8, 6), 0, 1),
    "row": (torch.arange(24.0).view(4, 6) + 100, 1, 1),
    "swiglu": (torch.arange(32.0).view(8, 4) + 200, 0, 2),
    "norm": (torch.arange(6.0) + 300, None, 1),
}


def fragments_of(tensor_rank: int, tensor_size: int, data_rank: int, data_size: int) -> list[StateFragment]:
    """What a ZeRO layout holds: each shard, flattened, in (unequal) contiguous pieces."""
    found = []
    for name, (full, dim, stride) in TENSORS.items():
        shard = partition.split(full, dim, stride, tensor_rank, tensor_size).contiguous()
        flat = shard.reshape(-1)
        bounds = [flat.numel() * i // data_size for i in range(data_size + 1)]
        start, stop = bounds[data_rank], bounds[data_rank + 1]
        found += [
            StateFragment(name, "weight", flat[start:stop].clone(), start, tuple(shard.shape), dim, stride,
                          dim is not None or tensor_rank == 0)
        ]  # fmt: skip
    return found


def save(run: Path, tensor_size: int, data_size: int) -> CheckpointReader:
    folder = layout.step_folder(run, 1)
    partial = layout.start_partial(folder)
    records = {}
    for rank in range(tensor_size * data_size):
        tensor_rank, data_rank = rank % tensor_size, rank // tensor_size
        name = layout.shard_file(rank)
        content = ShardContent(
            fragments_of(tensor_rank, tensor_size, data_rank, data_size),
            {"torch": torch.full((3,), rank, dtype=torch.uint8)},
            tensor_rank=tensor_rank,
            tensor_size=tensor_size,
        )
        records[name] = content.write(partial / name)
    layout.write_manifest(partial, records, {"step": 1})
    layout.publish(folder, keep_last=0)
    return CheckpointReader(folder)


@pytest.mark.parametrize("saved", [(1, 1), (2, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("wanted", [(1, 1), (2, 1), (1, 2), (2, 3)])
def test_every_layout_reads_what_every_other_wrote(tmp_path: Path, saved, wanted) -> None:
    reader = save(tmp_path, *saved)
    tensor_size, data_size = wanted
    for tensor_rank in range(tensor_size):
        for data_rank in range(data_size):
            for fragment in fragments_of(tensor_rank, tensor_size, data_rank, data_size):
                read = reader.fragment(fragment, tensor_rank=tensor_rank, tensor_size=tensor_size)
                assert torch.equal(read, fragment.tensor), fragment.name


@pytest.mark.parametrize("saved", [(1, 1), (2, 3)])
def test_whole_tensors(tmp_path: Path, saved) -> None:
    reader = save(tmp_path, *saved)
    assert reader.names() == sorted(TENSORS)
    for name, (full, _, _) in TENSORS.items():
        assert reader.describe(name).full_shape == tuple(full.shape)
        assert torch.equal(reader.full(name), full)


def test_each_rank_gets_its_generators_back(tmp_path: Path) -> None:
    reader = save(tmp_path, 2, 1)
    assert reader.rng(1)["torch"].tolist() == [1, 1, 1]
    assert reader.rng(5) == {}


def _wanted(name: str, shape: tuple[int, ...]) -> StateFragment:
    tensor: Tensor = torch.zeros(torch.Size(shape).numel())
    return StateFragment(name, "weight", tensor, 0, shape, None, 1, True)


def test_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    reader = save(tmp_path, 1, 1)
    with pytest.raises(CheckpointError, match=r"norm has shard shape \(6,\) there, \(7,\) here"):
        reader.fragment(_wanted("norm", (7,)), tensor_rank=0, tensor_size=1)


def test_names_that_one_side_lacks_are_all_listed(tmp_path: Path) -> None:
    reader = save(tmp_path, 1, 1)
    names = ["matrix", "row", "swiglu", "new.one"]
    with pytest.raises(CheckpointError) as caught:
        reader.check_names([], names=names)
    assert len(caught.value.problems) == 2
    assert "new.one" in str(caught.value)
    assert "norm" in str(caught.value)


def test_a_hole_is_noticed(tmp_path: Path) -> None:
    reader = save(tmp_path, 1, 2)
    reader._pieces["matrix", "weight", 0].pop()
    with pytest.raises(CheckpointError, match=r"matrix .* lacks elements 24 to 48"):
        reader.full("matrix")


def test_no_safetensors_is_named(tmp_path: Path) -> None:
    reader = save(tmp_path, 1, 1)
    file = reader.folder / layout.shard_file(0)
    file.write_bytes(b"not a tensor file")
    with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors: cannot be read"):
        CheckpointReader(reader.folder)

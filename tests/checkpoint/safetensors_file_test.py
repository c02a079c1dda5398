"""Files written tensor by tensor: the library reads them, and the checksum is theirs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from gptoughts.checkpoint import safetensors_file
from gptoughts.checkpoint.layout import FileRecord
from gptoughts.checkpoint.safetensors_file import TensorHeader, write_file

TENSORS = {
    "a": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
    "transposed": torch.arange(12.0).view(3, 4).t(),
    "bf16": torch.randn(7, generator=torch.Generator().manual_seed(1)).bfloat16(),
    "empty": torch.zeros(0, 4),
    "bytes": torch.arange(5, dtype=torch.uint8),
}


def _in_pieces(name: str) -> Iterator[torch.Tensor]:
    yield TENSORS[name][:2]
    yield TENSORS[name][2:]


@pytest.mark.parametrize("chunk_bytes", [1 << 24, 7])
def test_the_library_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    monkeypatch.setattr(safetensors_file, "_CHUNK_BYTES", chunk_bytes)
    sizes: list[int] = []
    headers = [TensorHeader.of(name, tensor) for name, tensor in TENSORS.items()]
    path = tmp_path / "x.safetensors"
    record = write_file(path, headers, _in_pieces, metadata={"k": "v"}, written=sizes.append)
    assert record == FileRecord.of(path)
    assert sum(sizes) == sum(header.num_bytes for header in headers)
    read = load_file(path)
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    with safe_open(path, framework="pt") as handle:
        assert handle.metadata() == {"k": "v"}


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        write_file(Path("/dev/full"), [TensorHeader.of("a", TENSORS["a"])], _in_pieces, metadata={})

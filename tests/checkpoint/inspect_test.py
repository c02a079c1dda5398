"""What the inspection of a checkpoint prints, and that it finds what differs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gptoughts.checkpoint import layout
from gptoughts.checkpoint.inspect import main
from gptoughts.checkpoint.portable import CheckpointReader
from gptoughts.errors import CheckpointError
from tests.checkpoint.portable_test import TENSORS, save

CONFIG = "model_type: gpt\nsize: debug\nparallel: {tensor: 2}\n"


def make(run: Path, tensor_size: int, data_size: int, *, step: int = 1) -> Path:
    """A checkpoint of portable_test's tensors with the files that a run writes beside them."""
    reader: CheckpointReader = save(run, tensor_size, data_size)
    folder = reader.folder
    (folder / layout.CONFIG).write_text(CONFIG)
    (folder / layout.TRAIN_STATE).write_text(json.dumps({"step": step, "consumed_samples": 8, "consumed_tokens": 512}))
    return folder


def printed(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def test_overview(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = make(tmp_path, 2, 1)
    found = json.loads(printed(capsys, tmp_path, "--json"))
    numel = sum(full.numel() for full, _, _ in TENSORS.values())
    assert found["folder"] == str(folder)
    assert found["kinds"] == {"weight": {"tensors": 4, "elements": numel, "dtypes": ["float32"]}}
    assert set(found["files"]) == {"rank_00000.safetensors", "rank_00001.safetensors"}
    text = printed(capsys, folder)
    for expected in ("gpt debug, step 1", "512 tokens", "tensor 2", "rank_00001.safetensors"):
        assert expected in text


def test_tensors(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make(tmp_path, 2, 2)
    rows = {row["name"]: row for row in json.loads(printed(capsys, tmp_path, "--stats", "--json"))}
    assert rows.keys() == TENSORS.keys()
    for name, (full, dim, _) in TENSORS.items():
        row = rows[name]
        assert row["shape"] == list(full.shape)
        assert row["divided"] == ("whole" if dim is None else f"dimension {dim} over 2 tensor-parallel ranks")
        assert (row["min"], row["max"], row["not_finite"]) == (full.min(), full.max(), 0)
        assert row["rms"] == pytest.approx(full.square().mean().sqrt().item(), rel=1e-6)
    text = printed(capsys, tmp_path, "--tensors", "--match", "s*")
    assert "swiglu" in text
    assert "norm" not in text
    with pytest.raises(CheckpointError, match="no weight has a name like 'x'"):
        main([str(tmp_path), "--match", "x"])


def test_comparison(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "a", 2, 1)
    make(tmp_path / "b", 1, 3)
    assert printed(capsys, tmp_path / "a", "--compare", tmp_path / "b") == "equal to the bit\n"
    changed = TENSORS["row"][0].clone()
    changed[1, 2] += 0.5
    monkeypatch.setitem(TENSORS, "row", (changed, 1, 1))
    make(tmp_path / "c", 1, 1)
    assert main([str(tmp_path / "a"), "--compare", str(tmp_path / "c"), "--json"]) == 1
    (only,) = json.loads(capsys.readouterr().out)
    assert (only["name"], only["what"]) == ("row", "1 of 24 elements differ, by up to 0.5")
    assert only["relative"] == pytest.approx(0.5 / changed.abs().max().item())
    monkeypatch.setitem(TENSORS, "extra", (torch.zeros(2), None, 1))
    make(tmp_path / "d", 1, 1)
    assert main([str(tmp_path / "c"), "--compare", str(tmp_path / "d")]) == 1
    assert "not in" in capsys.readouterr().out


def test_damage_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = make(tmp_path, 1, 1)
    assert "every file is as it was written" in printed(capsys, folder, "--verify")
    file = folder / layout.shard_file(0)
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors: checksum differs"):
        main([str(folder), "--verify"])

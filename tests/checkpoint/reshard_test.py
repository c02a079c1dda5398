"""Checkpoints divided for another layout: as it divides them, whole again bit by bit, read like any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from gptoughts.checkpoint import layout
from gptoughts.checkpoint.portable import KINDS, CheckpointReader
from gptoughts.checkpoint.reshard import Target, reshard
from gptoughts.errors import ConfigError
from gptoughts.models.registry import FAMILIES
from tests.distributed import run_distributed
from tests.harness import Layout, ToyRun

EXTRA = {"gpt": ("--model.num_query_groups=2", "--model.add_qkv_bias=true", "--model.qk_layernorm=true"),
         "mla": ("--model.q_lora_rank=64",), "deepseek": (), "llada": ()}  # fmt: skip


def train(family: str, folder: str) -> str:
    run = ToyRun(family, Layout(extra=EXTRA[family]), Path(folder))
    list(run.train(2))
    saved = run.save()
    run.close()
    return str(saved)


def resume_and_save(family: str, run_folder: str, folder: str) -> list[str]:
    """Go on at two tensor-parallel ranks from a checkpoint, save at once; where this rank's file is, and the loss."""
    run = ToyRun(family, Layout(tensor=2, extra=EXTRA[family]), Path(folder))
    reader = CheckpointReader(layout.locate(Path(run_folder)))
    run.step = run.manager.restore(reader, run.engine, list(run.parameters))["step"]
    saved = run.save()
    (result,) = run.train(1)
    run.close()
    return [str(saved), str(result.loss)]


@pytest.mark.parametrize("family", FAMILIES)
def test_divided_as_the_layout_divides_and_whole_again(family: str, tmp_path: Path) -> None:
    (saved,) = run_distributed(train, 1, family, str(tmp_path / "source"))
    reshard(Path(saved), tmp_path / "divided", Target(tensor=2, pipeline=2))
    divided = layout.locate(tmp_path / "divided")
    layout.check_files(divided)
    assert sorted(path.name for path in divided.glob("*.safetensors")) == [
        f"mp_rank_0{rank}_00{stage}.safetensors" for rank in range(2) for stage in range(2)
    ]
    before, between = CheckpointReader(Path(saved)), CheckpointReader(divided)
    reshard(divided, tmp_path / "whole", Target(tensor=1, pipeline=1))
    after = CheckpointReader(layout.locate(tmp_path / "whole"))
    for kind in KINDS:
        assert before.names(kind) == between.names(kind) == after.names(kind)
        for name in before.names(kind):
            for reader in (between, after):
                assert torch.equal(reader.full(name, kind), before.full(name, kind)), (name, kind)

    # A live run of two tensor-parallel ranks goes on from it, and divides every tensor in the same way.
    (live, loss), _ = run_distributed(resume_and_save, 2, family, str(tmp_path / "divided"), str(tmp_path / "a"))
    for name in before.names():
        there, here = CheckpointReader(Path(live)).describe(name), between.describe(name)
        assert there.shard_shape == here.shard_shape, name
        if there.tensor_size > 1:
            assert (there.partition_dim, there.partition_stride) == (here.partition_dim, here.partition_stride), name
    (_, expected), _ = run_distributed(resume_and_save, 2, family, saved, str(tmp_path / "b"))
    assert loss == expected


def test_a_file_holds_what_its_rank_needs(tmp_path: Path) -> None:
    (saved,) = run_distributed(train, 1, "gpt", str(tmp_path / "source"))
    copied = Path(saved).rename(tmp_path / "under another name")
    reshard(copied, tmp_path / "divided", Target(tensor=2, pipeline=2))
    folder = layout.locate(tmp_path / "divided")
    assert folder.name == Path(saved).name
    first, last = (safe_open(folder / f"mp_rank_01_00{stage}.safetensors", framework="pt") for stage in (0, 1))
    assert json.loads(first.metadata()["fragments"])["weight/0/embedding.word_embeddings.weight"] == [[128, 256], 0, 1]
    names = [{key.split("/", 2)[2] for key in file.keys()} for file in (first, last)]  # noqa: SIM118
    assert not names[0] & names[1]
    assert "decoder.layers.0.input_layernorm.weight" in names[0]
    assert {"decoder.layers.1.input_layernorm.weight", "output_layer.weight"} <= names[1]


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        (Target(3, 1), "target_tensor_parallel=3 (command line): num_attention_heads=4 is not divisible by it"),
        (Target(1, 3), "target_pipeline_parallel=3 (command line): num_layers=4 is not divisible by it"),
        (Target(0, 1), "target_tensor_parallel=0 (command line): must be 1 or greater"),
    ],
)
def test_what_cannot_be_divided_is_named(target: Target, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        target.check(FAMILIES["gpt"].presets["debug"].model)
    assert problem in caught.value.problems

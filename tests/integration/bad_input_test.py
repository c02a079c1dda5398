"""Bad input: one clear message, exit status 2, no traceback."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from gptoughts.checkpoint import layout
from tests.integration.conftest import TINY, Corpus, run_program

PRETRAIN = "launchers/pretrain.py"


def check(done: subprocess.CompletedProcess[str], *expected: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for text in expected:
        assert text in done.stderr


@pytest.fixture
def data(corpus: Corpus, tmp_path: Path) -> Path:
    """A copy of the corpus that a test may damage."""
    for suffix in (".bin", ".idx", ".json"):
        for split in ("_train", "_valid"):
            shutil.copy(f"{corpus.prefix}{split}{suffix}", tmp_path / f"text{split}{suffix}")
    shutil.copytree(corpus.prefix.with_name("text_tokenizer"), tmp_path / "text_tokenizer")
    return tmp_path / "text"


def pretrain(data: Path, *arguments: str, world_size: int = 1) -> subprocess.CompletedProcess[str]:
    output = f"--output_dir={data.parent / 'run'}"
    return run_program(PRETRAIN, *TINY, f"--data={data}", output, *arguments, world_size=world_size)


@pytest.mark.parametrize(
    ("arguments", "world_size", "expected"),
    [
        (["--train.stepz=5"], 1, ["train.stepz", "train.steps"]),
        (["--model_type=rwkv"], 1, ["rwkv", "gpt", "mla", "deepseek"]),
        (["--parallel.tensor=3"], 3, ["parallel.tensor=3", "num_attention_heads=2", "not divisible by 3"]),
        (["--parallel.tensor=2"], 3, ["world size", "3", "parallel.tensor=2"]),
        (["--data.tokenizer=/nowhere/tokenizer.json"], 1, ["/nowhere/tokenizer.json"]),
        (["--output_dir=/dev/null/run"], 1, ["output_dir=/dev/null/run"]),
        (["--resume=/nowhere/step_00000001"], 1, ["/nowhere/step_00000001", "no such checkpoint"]),
        (["--block_size=1000000"], 1, ["1000000"]),
        (["--use_fp8=true", "--fp8.backend=te"], 1, ["fp8.backend=te", "compute capability 8.9"]),
        (["--train.steps=0"], 1, ["train.steps=0"]),
    ],
    ids=lambda value: value[0].split("=")[0].strip("-") if isinstance(value, list) else "",
)
def test_flags(data: Path, arguments: list[str], world_size: int, expected: list[str]) -> None:
    check(pretrain(data, *arguments, world_size=world_size), *expected)


@pytest.mark.parametrize(
    ("content", "arguments", "expected"),
    [
        (
            {"gradient_acumulation_steps": 2},
            [],
            ["gradient_acumulation_steps", "gradient_accumulation_steps", "ds.json"],
        ),
        ({"train_micro_batch_size_per_gpu": 4}, [], ["batch_size=2", "train_micro_batch_size_per_gpu=4", "ds.json"]),
        ({"zero_optimization": {"stage": 7}}, [], ["stage", "7", "ds.json"]),
    ],
)
def test_deepspeed_json(data: Path, tmp_path: Path, content: dict, arguments: list[str], expected: list[str]) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(content))
    check(pretrain(data, f"--deepspeed_config={tmp_path / 'ds.json'}", *arguments), *expected)


def test_all_problems_come_together(data: Path) -> None:
    done = pretrain(data, "--train.stepz=5", "--parallel.tensor=2", "--output_dir=/dev/null/run")
    check(done, "train.stepz", "parallel.tensor=2", "/dev/null/run")


def truncate_bin(data: Path) -> None:
    path = Path(f"{data}_train.bin")
    path.write_bytes(path.read_bytes()[:-100])


def swap_index(data: Path) -> None:
    shutil.copy(f"{data}_valid.idx", f"{data}_train.idx")


def cut_index(data: Path) -> None:
    path = Path(f"{data}_train.idx")
    path.write_bytes(path.read_bytes()[:20])


def large_token(data: Path) -> None:
    tokens = np.fromfile(f"{data}_train.bin", dtype=np.uint16)
    tokens[17] = 60000
    tokens.tofile(f"{data}_train.bin")
    Path(f"{data}_train.json").unlink()  # as an index made elsewhere, with a tokenizer given on the command line


def remove_corpus(data: Path) -> None:
    Path(f"{data}_train.idx").unlink()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (truncate_bin, ["text_train.bin"]),
        (swap_index, ["text_train"]),
        (cut_index, ["text_train.idx"]),
        (remove_corpus, ["text"]),
        (large_token, ["60000", "512"]),
    ],
)
def test_damaged_corpus(data: Path, corpus: Corpus, damage, expected: list[str]) -> None:
    damage(data)
    check(pretrain(data, f"--data.tokenizer={corpus.tokenizer}"), *expected)


def test_an_empty_text_makes_no_corpus(corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    done = run_program(
        "tools/preprocess_data.py", "--input", str(tmp_path / "empty.txt"), "--tokenizer", str(corpus.tokenizer),
        "--output_prefix", str(tmp_path / "out"),
    )  # fmt: skip
    check(done, "holds no text")


def test_a_checkpoint_of_another_model(data: Path) -> None:
    first = pretrain(data, "--train.steps=2")
    assert first.returncode == 0, first.stderr
    check(pretrain(data, "--train.steps=4", "--model.ffn_hidden_size=192"), "another model", "ffn_hidden_size=128")


def test_a_full_disk_keeps_the_last_good_checkpoint(data: Path) -> None:
    """A limit on file sizes stands in for a full disk: both fail the write in its middle."""
    assert pretrain(data, "--train.steps=2").returncode == 0
    run = data.parent / "run"
    kept = layout.step_folder(run, 2)
    done = run_program(
        PRETRAIN, *TINY, f"--data={data}", f"--output_dir={run}", "--train.steps=4", "--log.plot=false",
        prefix=["bash", "-c", 'ulimit -f 100; exec "$@"', "limited"],
    )  # fmt: skip
    check(done, "could not be saved", "too large", f"the last good checkpoint is {kept}")
    assert layout.list_checkpoints(run) == [kept]
    assert not list(layout.checkpoints_folder(run).glob("*.partial"))
    again = pretrain(data, "--train.steps=4")
    assert again.returncode == 0, again.stderr
    assert f"resumed from {kept}" in again.stdout


def test_prompts_and_sampling_options(tmp_path: Path) -> None:
    check(run_program("launchers/generate.py", "--checkpoint", str(tmp_path), "--prompt", "x"), "holds no checkpoint")
    check(run_program("launchers/generate.py", "--checkpoint", "/nowhere", "--prompt", "x"), "no such checkpoint")

"""A small corpus and small runs through the real programs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from gptoughts.data import preprocess, train_tokenizer

ROOT = Path(__file__).parent.parent.parent
TINY = (
    "--model_type=gpt", "--size=debug", "--model.num_layers=1", "--model.hidden_size=64", "--model.ffn_hidden_size=128",
    "--model.num_attention_heads=2", "--block_size=64", "--batch_size=2", "--train.precision=fp32",
    "--train.valid_samples=4", "--log.interval_steps=1",
)  # fmt: skip


@dataclass(frozen=True)
class Corpus:
    """An indexed corpus with its validation split and tokenizer."""

    prefix: Path
    tokenizer: Path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Python's json and email packages, 512 tokens of vocabulary."""
    folder = tmp_path_factory.mktemp("corpus")
    inputs = [os.path.dirname(__import__(name).__file__ or "") for name in ("json", "email")]
    train_tokenizer.main(
        ["--input", *inputs, "--suffix", ".py", "--vocab_size", "512", "--output", str(folder / "tokenizer")]
    )
    preprocess.main(
        ["--input", *inputs, "--suffix", ".py", "--tokenizer", str(folder / "tokenizer"), "--output_prefix",
         str(folder / "text"), "--append_eod", "--validation_fraction", "0.2", "--workers", "1"]
    )  # fmt: skip
    return Corpus(folder / "text", folder / "tokenizer")


def python_path() -> str:
    """The project ahead of what was on the path."""
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def run_program(
    program: str, *arguments: str, world_size: int = 1, prefix: Sequence[str] = (), timeout_seconds: float = 240
) -> subprocess.CompletedProcess[str]:
    """Run ``python PROGRAM ARGUMENTS`` at the project's root; ``world_size`` is only claimed, no rank is started."""
    environment = os.environ | {"WORLD_SIZE": str(world_size), "PYTHONPATH": python_path()}
    if world_size == 1:
        del environment["WORLD_SIZE"]
    return subprocess.run(
        [*prefix, sys.executable, program, *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_seconds, check=False,
    )  # fmt: skip

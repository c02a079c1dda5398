"""The Makefile: every target expands, and what it calls exists."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TARGETS = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def expand(target: str, *variables: str) -> str:
    done = subprocess.run(
        ["make", "-n", "-B", target, *variables], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("target", TARGETS)
def test_targets_expand_and_name_files_that_exist(target: str) -> None:
    for path in re.findall(r"(?:launchers|tools|ds_configs|requirements)/[\w./]+", expand(target)):
        assert (ROOT / path).exists(), path


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_variables_reach_the_commands() -> None:
    text = expand(
        "pretrain", "MODEL_TYPE=gpt", "SIZE=small", "RANKS=3", "TORCH_INDEX=https://example.org/cpu", "ARGS=--x 1"
    )
    for expected in (
        "--model_type gpt",
        "--size small",
        "--num_accelerators 3",
        "--index-url https://example.org/cpu",
        "--x 1",
    ):
        assert expected in text


def test_ci_runs_the_readme_command() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert "make check" in script
    assert "make test" in script

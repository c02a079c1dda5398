"""Console scripts: each is there, and ends on bad input as the programs in launchers/ and tools/ do."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = re.findall(r'"(gptoughts-[\w-]+)=([\w.]+):(\w+)"', (ROOT / "setup.py").read_text())


@pytest.mark.parametrize(("script", "module", "function"), SCRIPTS, ids=[script for script, _, _ in SCRIPTS])
def test_scripts_exist_in_both_forms(script: str, module: str, function: str) -> None:
    assert callable(getattr(importlib.import_module(module), function))
    assert any((ROOT / folder / f"{function}.py").is_file() for folder in ("launchers", "tools"))


def test_a_mistake_is_a_message_here_too() -> None:
    call = "from gptoughts.training.console import pretrain; pretrain()"
    done = subprocess.run(
        [sys.executable, "-c", call, "--train.stepz=1"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "--train.stepz (command line): unknown flag" in done.stderr

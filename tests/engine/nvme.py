"""What tests of offload to NVMe share: toys large enough that DeepSpeed swaps them, and when they cannot run."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

SHIPPED = Path(__file__).parents[2] / "ds_configs" / "zero3_infinity.json"
LARGE = ("--model.vocab_size=4096", "--model.ffn_hidden_size=2048")
"""Matrices of which a rank of two has 1 MiB or more, below which DeepSpeed swaps nothing; others stay in memory."""


@functools.cache
def why_not() -> str | None:
    """Why nothing can be swapped here; builds the operator the first time, which takes minutes."""
    from gptoughts.platform import async_io
    from gptoughts.platform.doctor import put_ninja_on_path

    put_ninja_on_path()
    return async_io.operator_problem()


@pytest.fixture
def async_io() -> None:
    """Skips where DeepSpeed's operator cannot be built."""
    problem = why_not()
    if problem is not None:
        pytest.skip(problem)


def write_json(folder: Path, name: str, **changes: dict[str, Any] | None) -> str:
    """The shipped file with blocks of ``zero_optimization`` replaced (None: taken out); returns its path."""
    content = json.loads(SHIPPED.read_text())
    zero = content["zero_optimization"]
    for block, change in changes.items():
        if change is None:
            del zero[block]
        else:
            zero[block] = change
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content))
    return str(path)
